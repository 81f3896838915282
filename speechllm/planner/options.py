"""The options of `speechllm plan`. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from speechllm.errors import UserError
from speechllm.planner.links import DEFAULT, PRESETS

WORLDS = ",".join(str(2**k) for k in range(11))

EXAMPLES = """\
examples:
  speechllm plan configs/demo.yaml
  speechllm plan configs/whisper-large-v3_olmo2-1b_pre_norm.yaml --gpus 8 --gpu-memory 24GB
  speechllm plan configs/whisper-large-v3_olmo2-1b_pre_norm.yaml --gpus 8 --nodes 8 \\
      --gpu-memory 80GB model.llm.id=meta-llama/Llama-3.1-8B-Instruct --json
  speechllm plan configs/demo.yaml --scale --measured exp/demo
  speechllm plan configs/whisper-large-v3_olmo2-1b_pre_norm.yaml data.microbatches_per_step=64 \\
      strategy.kind=fsdp2 --scale 1,8,64,512 --step-seconds 20 --link nvlink+eth100
"""


def add_plan_options(plan: argparse.ArgumentParser) -> None:
    plan.epilog = EXAMPLES
    plan.formatter_class = argparse.RawDescriptionHelpFormatter
    plan.add_argument(
        "--gpus", type=int, metavar="N",
        help="GPUs (ranks) of each node (default: those of this machine, or one)",
    )  # fmt: skip
    plan.add_argument(
        "--nodes", type=int, metavar="K", help="nodes, of N GPUs each: N x K ranks (default: 1)"
    )
    plan.add_argument(
        "--gpu-memory", metavar="SIZE",
        help="memory of each GPU, as in 80GB (GB and GiB both mean 2**30 bytes; default: what this "
        "machine's GPU has or, without one, what the ranks share of its free memory)",
    )  # fmt: skip
    plan.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="JSON in place of the table, sizes in bytes; with FILE, beside the table and in there",
    )  # fmt: skip
    scale = plan.add_argument_group(
        "scaling", "the time of a step on more GPUs, from what it takes on one"
    )
    scale.add_argument(
        "--scale", nargs="?", const=WORLDS, metavar="1,2,...",
        help="numbers of GPUs (without any: the powers of two up to 1024)",
    )  # fmt: skip
    one = scale.add_mutually_exclusive_group()
    one.add_argument(
        "--step-seconds", type=float, metavar="S",
        help="a step of data.microbatches_per_step microbatches on one GPU takes S seconds",
    )  # fmt: skip
    one.add_argument(
        "--measured", type=Path, metavar="FILE",
        help="it takes what was measured: a run directory, its metrics.jsonl, or the JSON of "
        "tools/bench_train.py",
    )  # fmt: skip
    scale.add_argument(
        "--link", metavar="LINK",
        help="the network, each way: intra=300GB/s,inter=25GB/s,latency=5us (between GPUs of a "
        f"node, of each node to the others, of a hop) or {', '.join(PRESETS)} (default: "
        f"{DEFAULT})",
    )  # fmt: skip
    scale.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="GPUs that share a node (default: 8)"
    )
    scale.add_argument(
        "--overlap", metavar="PARTS",
        help="parts of a microbatch's compute that the reduction of gradients and the gathering of "
        "weights may run beside, as in gradients=0.2,weights=0.8 (default: neither)",
    )  # fmt: skip


def sort_out(options: argparse.Namespace) -> None:
    """Give back overrides that stood after an option without a value (`--json a.b=value`).

    Raises UserError for options that belong to the other kind of plan.
    """
    for name, default in (("json", "-"), ("scale", WORLDS)):
        value = getattr(options, name)
        if value is not None and "=" in value:
            options.overrides = [*options.overrides, value]
            setattr(options, name, default)
    wrong, meant = ["gpus", "nodes"], "with --scale write --scale 8,64 --gpus-per-node 8"
    if options.scale is None:
        wrong = ["step_seconds", "measured", "link", "gpus_per_node", "overlap"]
        meant = "only with --scale"
    for name in wrong:
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: {meant}")


def write_json(file: str, text: str) -> None:
    """Raises UserError."""
    try:
        Path(file).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot be written: {error}") from error
