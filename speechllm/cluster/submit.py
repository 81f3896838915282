"""speechllm-submit: work goes to the batch system by one command, and is looked after by others."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from speechllm.cluster.batch import BatchAway
from speechllm.cluster.doctor import add_doctor
from speechllm.cluster.manage import add_cancel, add_logs
from speechllm.cluster.status import add_status
from speechllm.cluster.submit_data import add_generate, add_shard
from speechllm.cluster.submit_train import add_sweep, add_train
from speechllm.errors import UserError

WRONG_INPUT = 2

EXAMPLES = """\
examples:
  speechllm-submit train configs/demo.yaml --site but --nodes 4 --gpus-per-node 2
  speechllm-submit train configs/demo.yaml run_dir=exp/b optim.lr=3e-4 --site but --dry-run
  speechllm-submit sweep configs/demo.yaml --vary optim.lr=1e-4,3e-4 --vary seed=1,2 --site but
  speechllm-submit shard data/train.jsonl --out data/train --tasks 16 --site but
  speechllm-submit generate exp/b --split test=data/test --parts 4 --site but
  speechllm-submit status exp/b
  speechllm-submit doctor --site but

exit codes: 0 done; 2 wrong input, or the batch system refuses (the message says why); 1 the batch
system does not answer, or `doctor` found what will not work.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="speechllm-submit",
        description="Train and decode on a batch system, Grid Engine above all.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        *(add_train, add_sweep, add_shard, add_generate),
        *(add_status, add_logs, add_cancel, add_doctor),
    ):
        add(commands)
    options, rest = parser.parse_known_args(arguments)
    _place_rest(parser, options, rest)
    try:
        code: int = options.command(options)
    except BatchAway as error:
        print(f"speechllm-submit: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"speechllm-submit: {error}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:  # `speechllm-submit status ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _place_rest(
    parser: argparse.ArgumentParser, options: argparse.Namespace, rest: list[str]
) -> None:
    """argparse takes no `a.b=value` behind an option; `shard` hands unknown options on."""
    if hasattr(options, "source"):
        options.passed = rest
    elif hasattr(options, "overrides") and all("=" in r and not r.startswith("-") for r in rest):
        options.overrides = [*options.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
