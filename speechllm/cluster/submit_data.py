"""speechllm-submit shard and generate: an array of tasks, and the held job that finishes it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from speechllm.cluster.job import Job, Variant
from speechllm.cluster.options import (
    add_job_options,
    checked_name,
    make_job,
    processes_of,
    require_data,
    site_of,
    submit_all,
)
from speechllm.cluster.profile import SiteProfile
from speechllm.cluster.submission import REPOSITORY
from speechllm.config.load import load_config
from speechllm.config.splits import parse_splits
from speechllm.errors import ConfigError

MAKE_SHARDS = REPOSITORY / "tools" / "make_shards.py"


def add_shard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "shard",
        help="make shards by an array job, then check that none is missing",
        usage="%(prog)s [MANIFEST] [--source KIND:PATH ...] --out DIR --tasks N [option ...]",
        epilog="MANIFEST (a JSONL file, as the first word) and further options go to "
        "tools/make_shards.py, as in --shard-size 100MB --reencode",
    )
    parser.add_argument(
        "--source", action="append", default=[], metavar="KIND:PATH[,key=value...]",
        help="a corpus of another kind, see docs/sources.md; may be given several times",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the shards")
    parser.add_argument("--tasks", type=int, required=True, metavar="N", help="of the array")
    add_job_options(parser)
    parser.set_defaults(command=shard, overrides=[])


def add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "generate", help="decode splits by an array job, then merge and score"
    )
    parser.add_argument("run", metavar="RUN", help="run or checkpoint directory")
    parser.add_argument(
        "--split", action="append", required=True, metavar="NAME=DIR_OR_GLOB",
        help="shards to decode; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--parts", type=int, default=1, metavar="N", help="tasks for each split (default: 1)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="as in train")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="of each task")
    parser.add_argument("--procs-per-node", type=int, metavar="N", help="default: one for each GPU")
    add_job_options(parser)
    parser.set_defaults(command=generate)


def shard(options: argparse.Namespace) -> int:
    plan, array, check = shard_jobs(options, site_of(options))
    _refuse_what_the_tool_refuses([*array.arguments, *array.variants[0].arguments])
    submit_all([plan, array, check], options)
    return 0


def _refuse_what_the_tool_refuses(arguments: Sequence[str]) -> None:
    """An array held on a job starts when that has failed, too: then every task would say it."""
    command = [sys.executable, *arguments, "--options-only"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise ConfigError(f"these options are refused: {asked.stderr.strip()}")


def shard_jobs(options: argparse.Namespace, site: SiteProfile) -> list[Job]:
    """The job that looks at the whole corpus once, the array that is held on it, and the job that
    is held on that and checks that every shard is there.

    options.passed: what make_shards.py gets besides.
    """
    if options.tasks < 1:
        raise ConfigError("--tasks must be 1 or more")
    manifest = [word for word in options.passed[:1] if not word.startswith("-")]
    if not manifest and not options.source:
        raise ConfigError("no corpus is given: say MANIFEST.jsonl or --source KIND:PATH")
    if manifest and not os.path.isfile(manifest[0]):
        raise ConfigError(f"{manifest[0]}: no such file")
    sources = [word for source in options.source for word in ("--source", source)]
    out = os.path.abspath(options.out)
    # Before what is handed on, of which the tool takes the last.
    workers = ("--num-workers", str(site.cpus.slots))
    same = (str(MAKE_SHARDS), *workers, *options.passed, *sources, "--out", out)
    name = checked_name(options, f"shard_{Path(out).name}")
    plan = make_job(
        site,
        name=f"{name}_plan",
        kind="shard",
        run_dir=out,
        arguments=(*same, "--plan-only"),
    )
    array = make_job(
        site,
        name=name,
        kind="shard",
        run_dir=out,
        arguments=(*same, "--num-tasks", str(options.tasks)),
        variants=tuple(Variant(arguments=("--task", str(k))) for k in _numbers(options.tasks)),
    )
    check = make_job(
        site,
        name=f"{name}_check",
        kind="shard",
        run_dir=out,
        arguments=(*same, "--check-complete"),
    )
    return [plan, array, check]


def generate(options: argparse.Namespace) -> int:
    submit_all(generate_jobs(options, site_of(options)), options)
    return 0


def generate_jobs(options: argparse.Namespace, site: SiteProfile) -> list[Job]:
    """The array, one task for each part of each split, and the held job that merges and scores."""
    if options.parts < 1:
        raise ConfigError("--parts must be 1 or more")
    run = os.path.abspath(options.run)
    run_dir = run_of(run, options)
    for split, patterns in parse_splits(options.split).items():
        require_data(f"--split {split}", patterns, options)
    if (config := Path(run_dir, "config.yaml")).is_file():
        load_config(str(config), options.overrides)
    name = checked_name(options, f"{Path(run_dir).name}_generate")
    array = make_job(
        site,
        name=name,
        kind="generate",
        run_dir=run_dir,
        arguments=("generate", run, *options.overrides),
        variants=tuple(
            Variant(arguments=("--split", split, "--part", f"{part}/{options.parts}"))
            for split in options.split
            for part in _numbers(options.parts)
        ),
        **processes_of(options, site),
    )
    splits = [word for split in options.split for word in ("--split", split)]
    score = make_job(
        site,
        name=f"{name}_score",
        kind="score",
        run_dir=run_dir,
        arguments=(
            *("-m", "speechllm", "generate", run, *splits),
            *("--merge", str(options.parts), *options.overrides),
        ),
    )
    return [array, score]


def run_of(path: str, options: argparse.Namespace) -> str:
    """The run directory of a run or checkpoint directory. Raises ConfigError for anything else,
    save where a job is waited for, which may make the run."""
    resolved = Path(path).resolve()
    for run in (Path(path), resolved, *resolved.parents[:2]):
        if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
            return str(run)
    is_checkpoint = Path(path).name == "best" or Path(path).parent.name == "checkpoints"
    if options.hold and not is_checkpoint:
        return path
    raise ConfigError(f"{path}: neither a run directory with checkpoints nor a checkpoint of one")


def _numbers(count: int) -> Sequence[int]:
    return range(1, count + 1)
