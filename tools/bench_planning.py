"""What planning costs at millions of utterances, and how well simulated ranks are balanced."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import pyarrow as pa

from speechllm.data.index import SCHEMA, index_path, open_corpus, write_batch
from speechllm.data.plan import EpochPlan, PlanSettings, plan_epoch
from speechllm.data.selection import CostSettings, populate

SETTINGS = CostSettings(
    prompt_tokens=30,
    characters_per_token=3.0,
    min_seconds=0.1,
    max_seconds=60.0,
    budget=4096,
)
PER_SHARD = 4000  # of 16 s in FLAC: a gigabyte
WINDOW = 20_000
LIBRISPEECH = 281_241  # utterances of its 960 hours


def seconds_like_librispeech(count: int, seed: int) -> np.ndarray:
    """float64 [count]: three quarters just under 16 s, a flat tail down to 1.3 s; mean 12.5 s."""
    random = np.random.default_rng(seed)
    long = random.normal(14.5, 1.2, count)
    return np.where(random.random(count) < 0.75, long, random.uniform(1.3, 14, count)).clip(1.3, 35)


def audio_tokens(samples: np.ndarray) -> np.ndarray:
    """Of an encoder with 50 frames a second and a connector that takes 6 to one."""
    return -(-samples * 50 // 16_000 // 6)


def measure_ranks(utterances: int = LIBRISPEECH) -> list[dict[str, Any]]:
    """Padding and the balance of a step for one microbatch a rank, over a whole epoch.

    imbalance: positions of the costliest rank over the mean of the ranks, by step.
    """
    seconds = seconds_like_librispeech(utterances, 0)
    tokens = audio_tokens(np.ceil(seconds * 16_000).astype(np.int64))
    costs = tokens + SETTINGS.prompt_tokens + np.ceil(seconds * 15 / 3).astype(np.int64)
    sizes = np.full(-(-utterances // 1000), 1000)
    sizes[-1] -= sizes.sum() - utterances
    found = []
    for ranks in (8, 64, 1024):
        settings = PlanSettings(1, SETTINGS.budget, ranks, WINDOW)
        plan = plan_epoch(sizes, costs, np.arange(utterances), settings, 0).flat()
        starts = plan.step_starts
        steps = [plan.positions[a:b] for a, b in itertools.pairwise(starts)]
        spread = [step.max() / step.mean() for step in steps]
        found.append(
            {
                "ranks": ranks,
                "utterances": utterances,
                "steps": len(steps),
                "padding": plan.padding_fraction,
                "imbalance_mean": float(np.mean(spread)),
                "imbalance_worst": float(np.max(spread)),
                "microbatch_fill": float(plan.positions.mean() / SETTINGS.budget),
            }
        )
    return found


def measure_planning(utterances: int, ranks: int = 3) -> dict[str, Any]:
    """Indexes of so many utterances, opened and planned by `ranks` processes of one node.

    The first process builds what the others share. `extra_rank_megabytes` is the memory that would
    be given back if one of them ended, the interpreter's and the libraries' included.
    """
    with tempfile.TemporaryDirectory() as directory:
        shards, temporary = Path(directory) / "shards", Path(directory) / "tmp"
        began = time.perf_counter()
        write_indexes(shards, utterances)
        written = time.perf_counter() - began
        temporary.mkdir()
        (first,) = _run_ranks(shards, temporary, 1, epoch=True)
        together = _run_ranks(shards, temporary, ranks, epoch=False)
    return {
        "utterances": utterances,
        "shards": -(-utterances // PER_SHARD),
        "writing_indexes_seconds": written,
        "first_open_seconds": first["open_seconds"],
        "first_costs_seconds": first["costs_seconds"],
        "open_seconds": together[0]["open_seconds"],
        "costs_seconds": together[0]["costs_seconds"],
        "first_batch_seconds": max(rank["first_batch_seconds"] for rank in together),
        "resume_at_90_percent_seconds": max(rank["resume_seconds"] for rank in together),
        "epoch_seconds": first["epoch_seconds"],
        "first_batch_core_seconds": max(rank["first_batch_core_seconds"] for rank in together),
        "resume_at_90_percent_core_seconds": max(rank["resume_core_seconds"] for rank in together),
        "epoch_core_seconds": first["epoch_core_seconds"],
        "steps": first["steps"],
        "extra_rank_megabytes": max(rank["private_megabytes"] for rank in together),
    }


def write_indexes(directory: Path, utterances: int) -> None:
    """Indexes beside tars that hold nothing but their size."""
    directory.mkdir()
    seconds = seconds_like_librispeech(utterances, 1)
    for shard in range(-(-utterances // PER_SHARD)):
        durations = seconds[shard * PER_SHARD : (shard + 1) * PER_SHARD]
        sizes = (durations * 16_000).astype(np.int64)
        offsets = np.cumsum(sizes + 1536) - sizes
        count = len(durations)
        columns = [
            pa.array([f"{shard:06d}-{row:06d}" for row in range(count)]),
            pa.array(offsets),
            pa.array(sizes),
            pa.array(["flac"] * count),
            pa.array(offsets + sizes),
            pa.array(np.full(count, 200)),
            pa.array(["json"] * count),
            pa.array(durations),
            pa.array(np.full(count, 16_000, np.int32)),
            pa.array((durations * 15).astype(np.int32)),
        ]
        tar = directory / f"train-{shard:06d}.tar"
        tar_size = int(offsets[-1] + sizes[-1] + 10240)
        with tar.open("wb") as file:
            file.truncate(tar_size)
        batch = pa.record_batch(columns, schema=SCHEMA)
        write_batch(index_path(str(tar)), batch, tar_size, lambda offset, size: bytes(size))


def _run_ranks(shards: Path, temporary: Path, count: int, *, epoch: bool) -> list[dict[str, Any]]:
    """Processes that are all there when each of them measures its memory."""
    command = [sys.executable, __file__, str(shards), *(["--epoch"] if epoch else [])]
    environment = os.environ | {"TMPDIR": str(temporary)}
    ranks = []
    for _ in range(count):  # one after the other, so that none slows another's measurement down
        rank = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        ranks.append((rank, _answer(rank)))
    results = []
    for rank, found in ranks:
        _ask(rank)
        results.append(found | _answer(rank))
    for rank, _ in ranks:
        _ask(rank)
        rank.wait()
    return results


def _ask(rank: subprocess.Popen[str]) -> None:
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()


def _answer(rank: subprocess.Popen[str]) -> dict[str, Any]:
    assert rank.stdout is not None
    line = rank.stdout.readline()
    if not line:
        raise SystemExit(f"a simulated rank ended with status {rank.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


def _be_a_rank(shards: str, epoch: bool) -> None:
    times: dict[str, float] = {}
    with _timed(times, "open"):
        corpus = open_corpus([shards])
    with _timed(times, "costs"):
        found = populate(corpus, audio_tokens, SETTINGS)

    def plan(number: int) -> EpochPlan:
        settings = PlanSettings(1, SETTINGS.budget, 8, WINDOW)
        kept = found.selection.kept
        return plan_epoch(corpus.shard_sizes, found.costs, kept, settings, number, found.table)

    for name, part in (("first_batch", 0.0), ("resume", 0.9)):
        with _timed(times, name):
            planned = plan(0)
            microbatch = planned.step(int(part * planned.num_steps))[0]
        corpus.location(int(microbatch[0]))
    if epoch:
        with _timed(times, "epoch"):
            planned = plan(1)
            for k in range(planned.num_steps):
                planned.step(k)
    times["steps"] = planned.num_steps
    for k in range(0, planned.num_steps, max(1, planned.num_steps // 20)):
        for microbatch in planned.step(k):
            for number in microbatch.tolist():
                corpus.location(number)
    print(json.dumps(times), flush=True)
    sys.stdin.readline()
    print(json.dumps({"private_megabytes": _private_megabytes()}), flush=True)
    sys.stdin.readline()


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    wall, core = time.perf_counter(), time.process_time()
    yield
    times[f"{name}_seconds"] = time.perf_counter() - wall
    times[f"{name}_core_seconds"] = time.process_time() - core


def _private_megabytes() -> float:
    """Memory that no other process maps."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--epoch", action="store_true")
    options = parser.parse_args()
    _be_a_rank(options.shards, options.epoch)
