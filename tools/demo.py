"""From nothing to a scored speech LLM on pretrained models: models, speech, shards, training,
decoding, WER, each by the same command that a user would type.

    python tools/demo.py --out exp/demo --data exp/demo_data

Steps that are already done are not done again; a training that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from rich.console import Console
from rich.table import Table
from whisper_reference import transcribe_shards

from speechllm.config.load import load_config
from speechllm.report.metrics import read_lines
from speechllm.wer import score

TOOLS = Path(__file__).parent
CONFIG = TOOLS.parent / "configs" / "demo.yaml"
SPLITS = ("train", "validation", "test")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("exp/demo"), help="run directory")
    parser.add_argument("--data", type=Path, default=Path("exp/demo_data"), help="speech, shards")
    parser.add_argument("--count", type=int, default=7500, help="utterances to synthesise")
    options = parser.parse_args()
    console = Console(stderr=True)
    started = time.monotonic()

    ranks, environment = _ranks()

    def stage(title: str, *command: str | Path, launcher: Sequence[str] = ()) -> float:
        console.rule(f"[bold]{title}")
        begun = time.monotonic()
        line = [sys.executable, *launcher, *map(str, command)]
        code = subprocess.run(line, env=environment if launcher else None).returncode
        if code:
            sys.exit(code)
        return time.monotonic() - begun

    speech, shards = options.data / "speech", options.data / "shards"
    stage("1/6 Pretrained models", TOOLS / "fetch_models.py")
    stage(
        f"2/6 {options.count} synthetic utterances",
        TOOLS / "synth_speech.py", "--out", speech, "--count", str(options.count),
    )  # fmt: skip
    console.rule("[bold]3/6 Shards")
    for split in SPLITS:
        stage(
            split, TOOLS / "make_shards.py", speech / f"{split}.jsonl",
            "--out", shards / split, "--shard-size", "32MB",
        )  # fmt: skip
    train_seconds = stage(
        "4/6 Training the connector",
        "-m", "speechllm", "train", CONFIG, f"run_dir={options.out}",
        f"data.train={shards / 'train'}", f"data.validation={shards / 'validation'}",
        launcher=ranks,
    )  # fmt: skip
    stage(
        "5/6 Decoding unseen voices and sentences",
        "-m", "speechllm", "generate", options.out, "--split", f"test={shards / 'test'}",
        launcher=ranks,
    )  # fmt: skip
    console.rule("[bold]6/6 Whisper alone, and the score")
    result = _score(options.out, shards / "test")
    result["train_seconds"] = round(train_seconds, 1)
    result["seconds"] = round(time.monotonic() - started, 1)
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _show(result, options.out, speech)
    return 0


def _ranks() -> tuple[list[str], dict[str, str]]:
    """torchrun over the GPUs there are, or over two halves of the CPU; and its environment.

    At these small matrices two processes of one thread do the work of 6.6 utterances a second where
    one process of two threads does 4.5 (two AVX2 cores, LLM steps). The losses are the same.
    """
    count, threads = torch.cuda.device_count(), torch.get_num_threads()
    if count == 0:
        count = min(2, threads)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return launcher, {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // count))}


def _score(run: Path, test_shards: Path) -> dict[str, float]:
    """{"wer", "reference_wer", "trained_parameters", "steps"}; rates are fractions."""
    predictions = read_lines(run / "predictions" / "test.jsonl")
    references = [line["ref"] for line in predictions]
    config = load_config(str(run / "config.yaml"))
    assert config.model.encoder.kind == "whisper"
    heard = transcribe_shards(config.model.encoder.id, test_shards)
    alone = [heard[line["id"]] for line in predictions]
    return {
        "wer": score(references, [line["hyp"] for line in predictions])["wer"],
        "reference_wer": score(references, alone)["wer"],
        "trained_parameters": _count_trained(run),
        "steps": read_lines(run / "metrics.jsonl")[-1]["step"],
    }


def _count_trained(run: Path) -> int:
    from safetensors import safe_open

    from speechllm.checkpoint import find_checkpoint

    with safe_open(find_checkpoint(run) / "trainable.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total


def _show(result: dict[str, float], run: Path, speech: Path) -> None:
    table = Table(title="Unseen voices, unseen sentences", show_header=False)
    table.add_row("WER of the trained speech LLM", f"{100 * result['wer']:.1f} %")
    table.add_row("WER of whisper-tiny.en alone", f"{100 * result['reference_wer']:.1f} %")
    table.add_row("trained parameters", f"{result['trained_parameters'] / 1e6:.2f} M")
    table.add_row("steps", str(result["steps"]))
    table.add_row("training took", f"{result['train_seconds'] / 60:.1f} min")
    table.add_row("all of it took", f"{result['seconds'] / 60:.1f} min")
    Console().print(table)
    print("Transcribe a file of your own (speech like the demo's: spoken commands):")
    print(f"  {sys.executable} -m speechllm transcribe {run} FILE.wav")


if __name__ == "__main__":
    sys.exit(main())
