"""Whether a configuration trains the same under every strategy.

Trains the first steps in one process in fp32, then under each strategy in several processes, each
in a run directory of its own that is thrown away, and compares loss and gradient norm of every step
and the weights after the last. Evaluation is left out; everything else is as in the configuration.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rich.table import Table
from shard_console import run, show

from speechllm.config.load import load_config
from speechllm.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
EXAMPLES = """\
examples:
  python tools/parity.py configs/tiny.yaml data.train=data/train
  python tools/parity.py configs/demo.yaml --strategies ddp fsdp2 zero3 --steps 20 --nproc 4
  python tools/parity.py configs/demo.yaml --precision bf16 --json > parity.json
  python tools/parity.py configs/demo.yaml --strategies ds_configs/zero3_offload.json

exit codes: 0 all within tolerance; 1 one is not, or its training failed; 2 wrong input.
"""


@dataclass(frozen=True)
class Differences:
    """Largest of all steps. loss: absolute, nats a token. norm: relative. weight: absolute, after
    the last step; None as a tolerance where they are not judged."""

    loss: float
    norm: float
    weight: float | None


# Measured on five strategies, 12 steps: fp32 up to 6e-7 in loss and 4e-7 in norm; bf16 up to 7e-3
# and 2.3e-2. Weights are not judged in low precision: the first steps of Adam go by the sign of a
# gradient, so a small one that rounds differently moves a weight by a whole learning rate.
FP32 = Differences(loss=1e-5, norm=1e-5, weight=2e-4)
LOW = Differences(loss=1e-2, norm=5e-2, weight=None)


class Failed(Exception):
    """A training that did not end well; the message holds the end of what it said."""


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    strategies = {name: strategy_overrides(name) for name in options.strategies}
    load_config(options.config, options.overrides)  # a wrong key is found before any training
    tolerance = FP32 if options.precision == "fp32" else LOW
    found: dict[str, Differences | str] = {}
    with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
        alone, several = Path(scratch) / "alone", Path(scratch) / "several"
        say("one process, fp32")
        try:
            train(options, alone, ["strategy.kind=ddp"], precision="fp32", processes=1)
        except Failed as error:
            raise ConfigError(
                f"{options.config} does not train in one process:\n{error}"
            ) from error
        for name, overrides in strategies.items():
            run_dir = several / str(len(found))
            say(f"{name}, {options.precision}, {options.nproc} processes")
            try:
                train(
                    options, run_dir, overrides, precision=options.precision,
                    processes=options.nproc,
                )  # fmt: skip
                found[name] = compare(run_dir, alone, options.steps)
            except Failed as error:
                print(f"{name} failed:\n{error}", file=sys.stderr)
                found[name] = str(error)
    verdicts = {
        name: isinstance(value, Differences) and within(value, tolerance)
        for name, value in found.items()
    }
    if options.json:
        print(json.dumps(summary(options, found, verdicts, tolerance), indent=1))
    else:
        show(table(options, found, verdicts, tolerance))
    return 0 if all(verdicts.values()) else 1


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="parity.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "--strategies", nargs="+", metavar="NAME", default=list(STRATEGIES),
        help="ddp, fsdp2, the name of a file in ds_configs/ or the path of one "
        f"(default: {' '.join(STRATEGIES)})",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (default 12)")
    parser.add_argument("--nproc", type=int, default=2, help="processes of each (default 2)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
        help="of the strategies; one process always trains in fp32 (default fp32)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="override a key")
    options, rest = parser.parse_known_args(arguments)
    # `--strategies ddp fsdp2 a.b=value` gives the overrides to the option before them.
    options.overrides += [x for x in [*options.strategies, *rest] if is_override(x)]
    options.strategies = [x for x in options.strategies if not is_override(x)]
    if unknown := [x for x in rest if not is_override(x)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.steps < 1 or options.nproc < 1:
        parser.error("--steps and --nproc must be at least 1")
    return options


def is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def strategy_overrides(name: str) -> list[str]:
    """Raises ConfigError for a name that is no strategy."""
    if name in ("ddp", "fsdp2"):
        return [f"strategy.kind={name}"]
    file = ROOT / "ds_configs" / f"{name}.json"
    if not file.is_file():
        file = Path(name).resolve()
    if not file.is_file():
        known = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
        raise ConfigError(
            f"--strategies {name}: neither ddp, fsdp2, one of {', '.join(known)}, nor a JSON file"
        )
    return ["strategy.kind=deepspeed", f"strategy.config={file}"]


def train(
    options: argparse.Namespace,
    run_dir: Path,
    overrides: Sequence[str],
    *,
    precision: str,
    processes: int,
) -> None:
    """The real command line. Raises Failed."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    steps = options.steps
    command = [
        *launcher, "-m", "speechllm", "train", options.config, *options.overrides, *overrides,
        f"run_dir={run_dir}", f"precision={precision}", f"train.steps={steps}", "train.log_every=1",
        f"train.checkpoint_every={steps}", "evaluation.every=0", "evaluation.patience=0",
    ]  # fmt: skip
    start = time.monotonic()
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        raise Failed("\n".join(ended.stdout.splitlines()[-30:]))
    say(f"  {steps} steps in {time.monotonic() - start:.0f} s")


def compare(one: Path, other: Path, steps: int) -> Differences:
    """How far run `one` is from run `other`."""
    from safetensors.numpy import load_file

    from speechllm.checkpoint import checkpoint_path
    from speechllm.report.metrics import read_lines

    curves = [read_lines(run / "metrics.jsonl") for run in (one, other)]
    losses, norms = (
        np.array([[line[key] for line in curve] for curve in curves], dtype=np.float64)
        for key in ("loss", "grad_norm")
    )
    assert losses.shape == (2, steps), f"{losses.shape} of {steps} steps were logged"
    weights = [
        load_file(checkpoint_path(run, steps) / "trainable.safetensors") for run in (one, other)
    ]
    assert weights[0].keys() == weights[1].keys()
    return Differences(
        loss=float(np.abs(losses[0] - losses[1]).max()),
        norm=float((np.abs(norms[0] - norms[1]) / np.maximum(norms[1], 1e-12)).max()),
        weight=float(np.max([np.abs(weights[0][n] - weights[1][n]).max() for n in weights[0]])),
    )


def within(found: Differences, allowed: Differences) -> bool:
    """False also where a difference is not a number."""
    pairs = zip(asdict(found).values(), asdict(allowed).values(), strict=True)
    return all(most is None or (value is not None and value <= most) for value, most in pairs)


def summary(
    options: argparse.Namespace,
    found: dict[str, Differences | str],
    verdicts: dict[str, bool],
    tolerance: Differences,
) -> dict[str, object]:
    """For scripts; null where a difference is not a number, or not judged."""
    strategies: dict[str, object] = {}
    for name, value in found.items():
        if isinstance(value, str):
            strategies[name] = {"within_tolerance": False, "error": value}
        else:
            strategies[name] = {**named(value), "within_tolerance": verdicts[name]}
    return {
        "config": options.config, "overrides": options.overrides, "steps": options.steps,
        "processes": options.nproc, "precision": options.precision,
        "tolerance": named(tolerance), "strategies": strategies,
    }  # fmt: skip


def named(values: Differences) -> dict[str, float | None]:
    return {
        f"max_{name}_difference": value if value is not None and math.isfinite(value) else None
        for name, value in asdict(values).items()
    }


def table(
    options: argparse.Namespace,
    found: dict[str, Differences | str],
    verdicts: dict[str, bool],
    tolerance: Differences,
) -> Table:
    shown = Table(
        title=f"{options.config}: {options.nproc} processes, {options.precision}, against one "
        f"process in fp32; the largest difference of {options.steps} steps"
    )
    for column in ("strategy", "loss (nats)", "gradient norm (relative)", "weight", ""):
        shown.add_column(column, justify="left" if column in ("strategy", "") else "right")
    for name, value in found.items():
        if isinstance(value, str):
            shown.add_row(name, "", "", "", "failed")
        else:
            verdict = "within tolerance" if verdicts[name] else "OUT OF TOLERANCE"
            shown.add_row(name, *map(cell, asdict(value).values()), verdict)
    shown.add_section()
    shown.add_row("tolerance", *map(cell, asdict(tolerance).values()), "")
    return shown


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
