"""The command line. Torch is imported only once the configuration has been found right."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from speechllm import __version__
from speechllm.config.load import load_config
from speechllm.config.splits import parse_splits
from speechllm.errors import UserError
from speechllm.garbage import libraries_stay
from speechllm.planner.options import add_plan_options, sort_out

WRONG_INPUT = 2

EXAMPLES = """\
examples:
  speechllm check configs/demo.yaml data.train=data/train
  speechllm plan configs/demo.yaml --gpus 2 --gpu-memory 24GB
  speechllm train configs/demo.yaml run_dir=exp/first data.train=data/train optim.lr=5e-4
  torchrun --nproc-per-node 2 -m speechllm train configs/demo.yaml run_dir=exp/first
  speechllm generate exp/first --split test=data/test
  speechllm wer exp/first/predictions/test.jsonl exp/second/test_predictions.json
  speechllm transcribe exp/first a.wav b.flac
  speechllm report exp/first exp/second
  speechllm export exp/first --out exp/first/export

exit codes: 0 done; 2 wrong input (the message says what and how to mend it); 99 stopped by a signal
with a checkpoint written, run the same command again; 1 anything else. torchrun itself exits with 1
whatever its processes exit with; the deepspeed launcher hands their code on.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no `a.b=value` after `--split X`; where overrides are meant, they are one list.
    if rest and not (hasattr(options, "overrides") and all(map(_is_override, rest))):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    # Forked loader processes share one tokenizer; its own thread pool would deadlock in them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code: int = options.command(options)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank finds the same: once a host
            print(f"speechllm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `speechllm wer ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="speechllm",
        description="Train speech LLMs: frozen Whisper encoder, trainable connector, frozen LLM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    # Where the deepspeed launcher puts it: before the command.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or go on with a run that was interrupted")
    _config_arguments(train)
    train.add_argument(
        "--probe", action="store_true",
        help="first run the step that needs most memory, and end at once where it does not fit",
    )  # fmt: skip
    train.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    train.set_defaults(command=_train)

    check = commands.add_parser(
        "check", help="say what a configuration lacks (weights, shards, memory), without training"
    )
    _config_arguments(check)
    check.add_argument(
        "--preview", type=Path, metavar="DIR",
        help="also write a few utterances with data.augmentation there, as wav files and pictures",
    )  # fmt: skip
    check.set_defaults(command=_check)

    plan = commands.add_parser(
        "plan",
        help="predict memory, traffic and scaling of every strategy, and recommend one",
        description="Memory of a rank and bytes on the wire of a step under every strategy, which "
        "of them fit, which to take, and the largest token budget under it; with --scale the time "
        "of a step on more GPUs. Downloads nothing and needs no weights: of models that are not on "
        "this machine, published shapes are known.",
    )
    _config_arguments(plan)
    add_plan_options(plan)
    plan.set_defaults(command=_plan)

    generate = commands.add_parser("generate", help="decode splits with a run's best checkpoint")
    _run_arguments(generate)
    generate.add_argument(
        "--split", action="append", required=True, metavar="NAME=DIR_OR_GLOB",
        help="shards to decode, and the name of their predictions; may be given several times",
    )  # fmt: skip
    slices = generate.add_mutually_exclusive_group()
    slices.add_argument(
        "--part", type=_part_of, metavar="K/N", help="decode the K-th of N slices, to be merged"
    )
    slices.add_argument(
        "--merge", type=int, metavar="N", help="decode nothing: merge N slices, and score"
    )
    generate.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=value", help="as in train"
    )
    generate.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    generate.set_defaults(command=_generate)

    transcribe = commands.add_parser("transcribe", help="text from audio files of any length")
    _run_arguments(transcribe)
    transcribe.add_argument("audio", nargs="+", metavar="AUDIO")
    transcribe.add_argument("--json", action="store_true", help="one JSON list instead of text")
    transcribe.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", help="override a key"
    )
    transcribe.set_defaults(command=_transcribe)

    wer = commands.add_parser("wer", help="score predictions: WER, CER, S/D/I, sentence errors")
    wer.add_argument("predictions", nargs="+", metavar="FILE", help="JSONL, JSON, or run directory")
    wer.add_argument(
        "--normalizer", choices=("whisper_en", "basic", "none"), default="whisper_en",
        help="applied to both sides first (default: %(default)s)",
    )  # fmt: skip
    shown = wer.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true")
    shown.add_argument(
        "--errors", type=int, default=0, metavar="N", help="also show the N most frequent errors"
    )
    wer.set_defaults(command=_wer)

    report = commands.add_parser("report", help="where runs stand: steps, losses, best, WER")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.add_argument("--json", action="store_true")
    report.set_defaults(command=_report)

    export = commands.add_parser(
        "export",
        help="write trained weights for other software: connector, LoRA as peft has it",
        epilog="example: speechllm export exp/first --out exp/first/export",
    )
    _run_arguments(export)
    export.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new or empty directory"
    )
    export.set_defaults(command=_export)
    return parser


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=value", help="override a key of the file"
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="run or checkpoint directory")


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    with libraries_stay():
        _quiet_transformers()
        from speechllm.train import train
        from speechllm.world import connected

    with connected(
        config.device,
        timeout=config.collective_timeout,
        alone_in_group=config.strategy.kind != "ddp",
    ) as world:
        return train(config, world, probe_first=options.probe)


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    with libraries_stay():
        _quiet_transformers()
        from speechllm.check import check

    findings = check(config, preview=options.preview)
    print("\n".join(findings.lines))
    return 0 if findings.ready else WRONG_INPUT


def _plan(options: argparse.Namespace) -> int:
    sort_out(options)
    config = load_config(options.config, options.overrides)
    with libraries_stay():
        _quiet_transformers()
        if options.scale is None:
            from speechllm.planner.command import plan_command as command
        else:
            from speechllm.planner.scaling_command import scale_command as command
    print(command(config, options))
    return 0


def _generate(options: argparse.Namespace) -> int:
    splits = parse_splits(options.split)
    if options.merge is not None:
        return _merge(options, list(splits))
    with libraries_stay():
        _quiet_transformers()
        from speechllm.checkpoint import find_checkpoint
        from speechllm.decode import Slice, generate_run
        from speechllm.failure import FailureReport
        from speechllm.log import set_up_logging
        from speechllm.world import connected

    checkpoint = find_checkpoint(options.run)
    config = load_config(str(checkpoint / "config.yaml"), options.overrides)
    failures = checkpoint.parents[1] / "predictions" / "failures"
    with (
        connected(config.device, timeout=config.collective_timeout) as world,
        FailureReport(failures, world),
    ):
        set_up_logging(world.rank)
        part = options.part and Slice(*options.part)
        written = generate_run(options.run, splits, options.overrides, world, part=part)
        if world.is_main:
            for path in written.values():
                print(path)
    return 0


def _part_of(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as K/N with K from 1 to N")
    return int(number), int(count)


def _merge(options: argparse.Namespace, names: Sequence[str]) -> int:
    with libraries_stay():
        from speechllm.checkpoint import find_checkpoint
        from speechllm.decode import merge_slices
        from speechllm.wer import read_predictions, score, wer_command

    checkpoint = find_checkpoint(options.run)
    config = load_config(str(checkpoint / "config.yaml"), options.overrides)
    normalizer = config.generation.normalizer
    written = merge_slices(checkpoint.parents[1], names, options.merge)
    scores = {
        name: score(*read_predictions(str(file))[name], normalizer=normalizer)
        for name, file in written.items()
    }
    rates = checkpoint.parents[1] / "predictions" / "wer.json"
    rates.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    print(wer_command([str(file) for file in written.values()], normalizer))
    return 0


def _transcribe(options: argparse.Namespace) -> int:
    with libraries_stay():
        _quiet_transformers()
        from speechllm.checkpoint import find_checkpoint
        from speechllm.transcribe import load_files, transcribe
        from speechllm.world import connected

    audio = load_files(options.audio)
    config = load_config(str(find_checkpoint(options.run) / "config.yaml"), options.set)
    with connected(config.device, timeout=config.collective_timeout) as world:
        transcripts = transcribe(options.run, audio, options.set, world)
    if options.json:
        print(json.dumps([asdict(t) for t in transcripts], ensure_ascii=False, indent=1))
    else:
        for transcript in transcripts:
            prefix = f"{transcript.audio}\t" if len(transcripts) > 1 else ""
            print(prefix + transcript.text)
    return 0


def _quiet_transformers() -> None:
    """Weights load in a moment; a bar for each model would bury what we have to say."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _wer(options: argparse.Namespace) -> int:
    from speechllm.wer import wer_command

    print(wer_command(options.predictions, options.normalizer, options.json, options.errors))
    return 0


def _report(options: argparse.Namespace) -> int:
    from speechllm.report.summary import report_command

    print(report_command([Path(run) for run in options.runs], options.json))
    return 0


def _export(options: argparse.Namespace) -> int:
    with libraries_stay():
        from speechllm.export import export_run

    written = export_run(options.run, options.out)
    print("\n".join(map(str, written)))
    if not any(path.name == "adapter_config.json" for path in written):
        print(f"{options.run} has no LoRA: nothing for peft", file=sys.stderr)
    return 0
