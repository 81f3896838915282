"""The scaling model of `speechllm plan --scale` beside real steps of one and two processes.

python tools/bench_scaling.py [--strategies ddp,fsdp2,zero2,zero3] [--steps 9] [--json FILE]

Under torchrun with one and with two processes (gloo, one thread each) the same steps run under each
strategy. The compute of a microbatch comes from one process, the link from all-reduces between two
that do nothing else, the bytes from the configuration; from these the step of two processes is
predicted. Two processes also compute beside each other without talking: what they then lose to
shared caches and memory is no matter of communication, and a second prediction starts from there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.audio import encode_flac
from speechllm.data.shards import Sample, write_shard
from speechllm.model.tiny import build_tiny_llm
from speechllm.planner.advice import Machine, job_of
from speechllm.planner.architecture import read_architecture
from speechllm.planner.links import Link, Network
from speechllm.planner.messages import step_messages
from speechllm.planner.scaling import Compute, Overlap, layout_of, predict_step
from speechllm.run import Run, open_run
from speechllm.step import agree, run_step
from speechllm.types import SAMPLE_RATE, StepData
from speechllm.world import World, connected

ROOT = Path(__file__).parent.parent
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
MICROBATCHES = 4
SIZES = (64, 2**16, 2**20, 2**22, 2**24)  # bytes
ROUNDS = 12
WARM = 2  # steps before the clock runs
KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "all_reduce": "all_reduce",  # of _c10d_functional
}


class Counted(TorchDispatchMode):
    """Counts collectives and the bytes of their whole tensors, {kind: [count, bytes]}."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        space, _, name = function._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name != "wait_tensor":
            kind = KINDS.get(name, name)
            # The whole tensor is the larger side: an output of gathers, an input of scatters.
            whole = max(map(_bytes, arguments[:2]))
            entry = self.found.setdefault(kind, [0, 0])
            entry[0] += 1
            entry[1] += whole
        return function(*arguments, **(keywords or {}))


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0


def configuration(directory: Path, strategy: str, *more: str) -> Config:
    """A small model whose matrices are large enough that every strategy shards them."""
    chosen = [f"strategy.kind={strategy}"]
    if strategy.startswith("zero"):
        file = ROOT / "ds_configs" / f"{strategy}.json"
        chosen = ["strategy.kind=deepspeed", f"strategy.config={file}"]
    return load_config(
        str(ROOT / "configs" / "tiny.yaml"),
        [
            f"data.train={directory / 'shards'}", "data.microbatch_tokens=128",
            f"data.microbatches_per_step={MICROBATCHES}", "data.num_workers=0", "precision=fp32",
            f"model.llm.id={directory / 'llm'}", "model.llm.attention=sdpa",
            "performance.packing=off",
            "model.connector.hidden_size=256", "train.steps=1000", *chosen, *more,
        ],
    )  # fmt: skip


def write_data(
    directory: Path, *, hidden: int = 384, layers: int = 4, utterances: int = 400
) -> None:
    """Utterances of one length, so that all microbatches cost the same; and the LLM."""
    build_tiny_llm(directory / "llm", kind="llama", hidden=hidden, layers=layers, heads=6)
    random = np.random.default_rng(3)
    audio = encode_flac((random.standard_normal(3 * SAMPLE_RATE) * 3000).astype(np.int16))
    text = {"text": "turn the light in the kitchen on"}
    samples = [
        Sample(f"utt-{i:05d}", audio, "flac", text, 3.0, SAMPLE_RATE) for i in range(utterances)
    ]
    (directory / "shards").mkdir()
    write_shard(str(directory / "shards" / "train-000000.tar"), samples)


def opened(
    config: Config, world: World, stack: ExitStack, steps: int
) -> tuple[Run, list[StepData]]:
    """The run, and its first steps as they come from the loader."""
    run = open_run(config, world, stack)
    with closing(run.loader.steps(0, 0)) as data:
        return run, list(itertools.islice(data, WARM + steps + 1))


def run_one(run: Run, data: StepData, number: int) -> None:
    """As the training loop does."""
    totals = agree(data, run.world, stop=False)
    run_step(
        run.strategy, data, totals, objective="lm", lr=1e-4, seed=1, step=number,
        device=run.world.device,
    )  # fmt: skip


def measure(
    directory: Path, world: World, strategies: Sequence[str], steps: int, stack: ExitStack
) -> dict[str, Any]:
    """Seconds of each step on the slowest rank, by name, all taking turns; and the collectives of
    one more step.

    side_by_side: each rank for itself, all at once. solo: rank 0 for itself while the others wait.
    """
    alone = World(0, 1, 0, world.device)
    place = f"run_dir={directory / 'runs'}/{world.size}_{world.rank}"
    runs = {"side_by_side": opened(configuration(directory, "ddp", place), alone, stack, steps)}
    for name in strategies:
        place = f"run_dir={directory / 'runs'}/{world.size}_{name}"
        runs[name] = opened(configuration(directory, name, place), world, stack, steps)
    runs["solo"] = runs["side_by_side"]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(WARM + steps):
        for name, (run, data) in runs.items():
            dist.barrier()
            began = time.perf_counter()
            if name != "solo" or world.is_main:
                run_one(run, data[number], number)
            spent = time.perf_counter() - began
            seconds[name].append(max(world.gather(spent)))
    collectives = {}
    for name in strategies:
        run, data = runs[name]
        with Counted() as counted:
            run_one(run, data[-1], len(data))
        collectives[name] = dict(sorted(counted.found.items()))
    timed = {name: spent[WARM:] for name, spent in seconds.items()}
    middle = {name: statistics.median(spent) for name, spent in timed.items()}
    return {"seconds": middle, "steps": timed, "collectives": collectives}


def measure_link(world: World) -> dict[str, dict[int, float]]:
    """{kind: {bytes of the whole tensor: seconds}}, medians over repetitions."""
    found: dict[str, dict[int, float]] = {}
    for size in SIZES:
        whole = torch.ones(size // 4)
        part = torch.ones(size // 4 // world.size)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": functools.partial(dist.all_reduce, whole),
            "all_gather": functools.partial(dist.all_gather_into_tensor, whole, part),
            "reduce_scatter": functools.partial(dist.reduce_scatter_tensor, part, whole),
        }
        for kind, call in calls.items():
            times = []
            for _ in range(ROUNDS):
                dist.barrier()
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            found.setdefault(kind, {})[size] = max(world.gather(statistics.median(times)))
    return found


def fit_link(seconds: dict[int, float]) -> Link:
    """Of two ranks' all-reduces of n bytes, which take 2 alpha + n / B: a line through the smallest
    and the mean of the three largest."""
    sizes = sorted(seconds)
    alpha = seconds[sizes[0]] / 2
    rates = [size / max(seconds[size] - 2 * alpha, 1e-9) for size in sizes[-3:]]
    return Link(alpha, statistics.harmonic_mean(rates))


def work(directory: Path, strategies: Sequence[str], steps: int) -> None:
    """What each process under torchrun runs; rank 0 writes DIRECTORY/WORLD.json."""
    torch.set_num_threads(1)
    with connected("cpu", timeout=300, alone_in_group=True) as world:
        link = measure_link(world) if world.size > 1 else {}
        with ExitStack() as stack:
            found = {"link": link, **measure(directory, world, strategies, steps, stack)}
        if world.is_main:
            (directory / f"{world.size}.json").write_text(json.dumps(found))


def launch(
    directory: Path, processes: int, strategies: Sequence[str], steps: int
) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__,
        "--work", str(directory), "--strategies", ",".join(strategies), "--steps", str(steps),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(directory / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{processes} process(es) failed:\n{done.stdout}\n{done.stderr}")
    found: dict[str, Any] = json.loads((directory / f"{processes}.json").read_text())
    return found


def compare(
    directory: Path, strategies: Sequence[str], one: dict[str, Any], two: dict[str, Any]
) -> dict[str, Any]:
    """Predictions for two processes beside what they took; errors are (predicted - measured) /
    measured.

    A strategy's own work in one process is that of the launch with one, in parts of the step
    without any strategy; seconds are those of one process in the launch with two.
    """
    link = fit_link({int(size): value for size, value in two["link"]["all_reduce"].items()})
    solo, together = two["seconds"]["solo"], two["seconds"]["side_by_side"]
    rows = {}
    for name in strategies:
        factor = one["seconds"][name] / one["seconds"]["solo"]
        config = configuration(directory, name)
        job = job_of(config, read_architecture(config.model), Machine(2, 0, on_cpu=True))
        messages = step_messages(job, name)
        alone, beside = (
            predict_step(
                Compute(factor * base / MICROBATCHES, 1.0), layout_of(2, MICROBATCHES), messages,
                Network("measured", link, link), 2, Overlap(),
            )
            for base in (solo, together)
        )  # fmt: skip
        took = two["seconds"][name]
        expected: dict[str, list[int]] = {}
        for message in messages:
            entry = expected.setdefault(message.kind, [0, 0])
            entry[0] += message.count
            entry[1] += message.size
        rows[name] = {
            "one_process_seconds": factor * solo,
            "communication_seconds": alone.communication,
            "predicted_seconds": alone.seconds,
            "predicted_side_by_side_seconds": beside.seconds,
            "measured_seconds": took,
            "error": alone.seconds / took - 1,
            "error_side_by_side": beside.seconds / took - 1,
            "collectives_predicted": dict(sorted(expected.items())),
            "collectives_counted": two["collectives"][name],
        }
    return {
        "threads": 1,
        "microbatches_per_step": MICROBATCHES,
        "torch": torch.__version__,
        "link": {"latency_seconds": link.seconds, "bytes_per_second": link.bytes_per_second},
        "link_measured_seconds": two["link"],
        "side_by_side_slowdown": together / solo,
        "steps_of_one": one["steps"],
        "steps_of_two": two["steps"],
        "strategies": rows,
    }


def table(found: dict[str, Any]) -> str:
    link = found["link"]
    lines = [
        f"link: {link['latency_seconds'] * 1e6:.0f} us, {link['bytes_per_second'] / 1e9:.2f} GB/s; "
        f"two processes side by side, not talking: {found['side_by_side_slowdown']:.2f} x the time",
        "strategy  one process  predicted  (side by side)  measured    error  (side by side)",
    ]
    for name, row in found["strategies"].items():
        lines.append(
            f"{name:8}  {row['one_process_seconds']:9.3f} s  {row['predicted_seconds']:7.3f} s  "
            f"{row['predicted_side_by_side_seconds']:12.3f} s  {row['measured_seconds']:6.3f} s  "
            f"{row['error']:+7.1%}  {row['error_side_by_side']:+14.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=9, help="timed steps (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    strategies = options.strategies.split(",")
    unknown = sorted(set(strategies) - {"ddp", "fsdp2", "zero1", "zero2", "zero3"})
    if unknown:
        parser.error(f"--strategies: {', '.join(unknown)}: none of ddp, fsdp2, zero1, zero2, zero3")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: give 1 or more")
    if options.work is not None:
        work(options.work, strategies, options.steps)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(directory / "cache")
        write_data(directory)
        one, two = (launch(directory, n, strategies, options.steps) for n in (1, 2))
        found = compare(directory, strategies, one, two)
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
