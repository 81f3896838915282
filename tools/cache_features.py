"""Write the frozen encoder's outputs beside the shards, so that training need not run the encoder.

Beside each x.tar an x.features-KEY-DTYPE.bin is written, KEY naming encoder, front end, precision
and what else the outputs follow from. Training with `performance.encoder_cache=DTYPE` reads them.
Shards whose outputs are there already are left alone, so an interrupted run goes on with the same
command. Files of other encoders or settings stay until somebody removes them.

  python tools/cache_features.py configs/demo.yaml --dtype int8 --dry-run
  python tools/cache_features.py configs/demo.yaml --dtype int8
  torchrun --nproc-per-node 8 tools/cache_features.py CONFIG data.train=DIR --dtype bf16
  python tools/cache_features.py CONFIG --dtype bf16 --task 3 --num-tasks 16   # on 16 hosts

Several processes, be they torchrun's or tasks, divide the shards among them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rich.table import Table
from shard_console import hours, progress_bar, run, show, size

from speechllm.caching import ShardEncoder, Written
from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.features import frame_bytes, open_features
from speechllm.data.files import local_path
from speechllm.data.index import open_corpus
from speechllm.data.pool import available_cores
from speechllm.errors import UserError
from speechllm.features import Kind, kind_of, other_files, why_not
from speechllm.model.frontend import num_frames
from speechllm.planner.workload import of_split
from speechllm.prepare import prepare_text
from speechllm.settle import settle
from speechllm.training_data import open_training
from speechllm.types import SAMPLE_RATE
from speechllm.world import World, connected

# Ranks meet once, at the end, and one may have more to do than another.
_PATIENCE = 7 * 24 * 3600.0
_BATCH_SECONDS = {"cpu": 60.0, "cuda": 1920.0}


@dataclass(frozen=True)
class Work:
    """tars: in the order in which they are shared out, the longest first. seconds: of audio in
    each. bytes: that its frames will take. mine: those of this process."""

    tars: list[str]
    seconds: dict[str, float]
    bytes: dict[str, int]
    mine: list[str]


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    with connected(config.device, timeout=_PATIENCE) as world:
        config = _settled(config, world)
        kind = kind_of(config, options.dtype)
        work = _work(config, options, kind, world)
        todo = [t for t in work.mine if options.overwrite or why_not(t, kind) is not None]
        _say_needs(work, todo, kind, world, options.dry_run)
        if options.dry_run:
            return 0
        written = _write(config, kind, todo, world, options)
        there = [_recorded(tar, kind) for tar in work.mine if tar not in set(todo)]
        gathered = world.gather([asdict(sum(written, Written())), asdict(sum(there, Written()))])
        if world.is_main:
            new = sum((Written(**one) for one, _ in gathered), Written())
            old = sum((Written(**two) for _, two in gathered), Written())
            report = _report(new, old, kind, config)
            _show(report, work, kind)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="of the training that will read them")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="as for training")
    parser.add_argument("--dtype", choices=("bf16", "int8"), required=True, help="int8: half")
    parser.add_argument(
        "--split",
        action="append",
        metavar="train|validation|SHARDS",
        help="may be repeated; default: all that training reads, train and validation",
    )
    parser.add_argument("--batch-seconds", type=float, help="of audio encoded at once")
    parser.add_argument("--num-workers", type=int, help="threads that decode audio")
    parser.add_argument("--overwrite", action="store_true", help="write all files anew")
    parser.add_argument("--dry-run", action="store_true", help="say what it takes, write nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("--task", type=int, default=1, metavar="K", help="do the K-th share")
    parser.add_argument("--num-tasks", type=int, default=1, metavar="N", help="number of shares")
    options = parser.parse_intermixed_args(arguments)
    if not 1 <= options.task <= options.num_tasks:
        raise UserError(f"--task {options.task}: tasks are numbered 1 to {options.num_tasks}")
    for name in ("batch_seconds", "num_workers"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number above 0")
    return options


def _settled(config: Config, world: World) -> Config:
    """With the precision that training would choose, which may depend on its data."""
    if config.precision != "auto":
        return config
    text = prepare_text(config)
    lengths = of_split(open_training(config, text), text)
    return settle(config, world.device, world, utterances=lengths)


def _work(config: Config, options: argparse.Namespace, kind: Kind, world: World) -> Work:
    """Raises UserError where there are no shards, or some are not on this machine."""
    named = {"train": config.data.training_shards, "validation": config.data.validation}
    splits = options.split or [split for split, patterns in named.items() if patterns]
    patterns = [p for split in splits for p in named.get(split, (split,))]
    if not patterns:
        raise UserError("no shards: set data.train=DIR, or give --split DIR")
    corpus = open_corpus(patterns)
    remote = [tar for tar in corpus.shards if local_path(tar) is None]
    if remote:
        raise UserError(f"{remote[0]}: outputs are written beside local shards only; copy it here")
    seconds, sizes = {}, {}
    parts = np.split(corpus.durations, np.cumsum(corpus.shard_sizes)[:-1])
    for tar, durations in zip(corpus.shards, parts, strict=True):
        frames = num_frames(np.rint(durations * SAMPLE_RATE).astype(np.int64))
        seconds[tar] = float(durations.sum())
        sizes[tar] = frame_bytes(kind.dtype, kind.width, int(frames.sum()), len(frames))
    tars = sorted(corpus.shards, key=lambda tar: (-seconds[tar], tar))
    first = (options.task - 1) * world.size + world.rank
    return Work(tars, seconds, sizes, tars[first :: options.num_tasks * world.size])


def _say_needs(work: Work, todo: list[str], kind: Kind, world: World, dry: bool) -> None:
    """What is to be written and whether there is room; of all ranks' shares. Raises UserError."""
    lists = world.gather(todo)
    everyone = [tar for one in lists for tar in one]
    need = sum(work.bytes[tar] for tar in everyone)
    free = shutil.disk_usage(os.path.dirname(work.tars[0])).free
    if world.is_main:
        table = Table(title="nothing written" if dry else None, show_header=False)
        table.add_row("shards to write", f"{len(everyone):,} of {len(work.tars):,}")
        table.add_row("audio", hours(sum(work.seconds[tar] for tar in everyone)))
        an_hour = 3600 / max(sum(work.seconds.values()), 1e-9)
        table.add_row("an hour of audio takes", size(sum(work.bytes.values()) * an_hour))
        table.add_row("needed", size(need))
        table.add_row("free", size(free))
        show(table)
    if need > free and not dry:
        raise UserError(
            f"{os.path.dirname(work.tars[0])}: {size(need)} are needed, {size(free)} are free; "
            "make room, take --dtype int8, or copy the shards to a larger disk"
        )


def _write(
    config: Config, kind: Kind, todo: list[str], world: World, options: argparse.Namespace
) -> list[Written]:
    if not todo:
        return []
    encoder = ShardEncoder(
        config,
        kind,
        world.device,
        batch_seconds=options.batch_seconds or _BATCH_SECONDS[world.device.type],
        threads=options.num_workers or max(1, available_cores() // world.size),
    )
    total = sum(len(open_corpus([tar])) for tar in todo)
    done = 0
    written = []
    with progress_bar() as progress:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if world.is_main:
                progress("Encoding", done, total)

        for tar in todo:
            written.append(encoder.write(tar, advance))
    return written


def _recorded(tar: str, kind: Kind) -> Written:
    """What was written when a shard was finished."""
    file = open_features(kind.path(tar))
    return Written(**file.about["written"]) + Written(bytes=os.path.getsize(file.path))


def _report(new: Written, old: Written, kind: Kind, config: Config) -> dict[str, Any]:
    both = new + old
    an_hour = 3600 / both.audio_seconds if both.audio_seconds else 0.0
    return {
        "encoder": config.model.encoder.model_dump(mode="json").get("id"),
        "key": kind.key,
        "dtype": kind.dtype,
        "precision": config.precision,
        "utterances": both.utterances,
        "utterances_written_now": new.utterances,
        "not_decodable": both.bad,
        "audio_hours": both.audio_seconds / 3600,
        "bytes": both.bytes,
        "gigabytes_per_hour": both.bytes * an_hour / 1e9,
        "seconds": both.seconds,
        "encoder_seconds": both.encoder_seconds,
        "utterances_per_second": both.utterances / both.seconds if both.seconds else 0.0,
        "break_even_epochs": both.break_even_epochs,
        "relative_rms_error": both.relative_rms_error,
        "largest_error": both.worst,
        "largest_output": both.largest,
    }


def _show(report: dict[str, Any], work: Work, kind: Kind) -> None:
    table = Table(title=f"*.features-{kind.key}-{kind.dtype}.bin", show_header=False)
    table.add_row("utterances", f"{report['utterances']:,}")
    table.add_row("of these written now", f"{report['utterances_written_now']:,}")
    if report["not_decodable"]:
        table.add_row("could not be decoded", f"{report['not_decodable']:,}")
    table.add_row("audio", hours(3600 * report["audio_hours"]))
    per_hour = size(1e9 * report["gigabytes_per_hour"])
    table.add_row("size", f"{size(report['bytes'])} ({per_hour} an hour)")
    table.add_row("relative RMS error", f"{report['relative_rms_error']:.2e}")
    largest = f"{report['largest_error']:.2e} (largest output: {report['largest_output']:.1f})"
    table.add_row("largest error", largest)
    spent, encoder = report["seconds"], report["encoder_seconds"]
    table.add_row("time, of all processes", f"{spent:.1f} s, of the encoder {encoder:.1f} s")
    table.add_row("break-even", f"after {report['break_even_epochs']:.2f} epochs")
    show(table)
    stale = [path for tar in work.tars for path in other_files(tar, [kind.path(tar)])]
    if stale:
        taken = size(sum(os.path.getsize(path) for path in stale))
        print(f"{len(stale):,} files of other encoders or settings lie there too ({taken}), e.g.")
        print(f"  {stale[0]}")


if __name__ == "__main__":
    run(main)
