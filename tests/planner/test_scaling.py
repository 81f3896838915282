from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import pytest
from bench_scaling import Counted, configuration, opened, run_one
from forked_function import on_ranks
from runs import ROOT

from speechllm.config.load import load_config
from speechllm.data.plan import rank_share
from speechllm.errors import UserError
from speechllm.model.tiny import build_tiny_llm
from speechllm.planner.advice import Machine, job_of
from speechllm.planner.architecture import read_architecture
from speechllm.planner.links import (
    PRESETS,
    Kind,
    Link,
    Network,
    collective_seconds,
    parse_link,
    sent_bytes,
)
from speechllm.planner.memory import STRATEGIES, Job
from speechllm.planner.messages import step_messages
from speechllm.planner.scaling import (
    Compute,
    Overlap,
    busiest_costs,
    efficiency,
    layout_of,
    parse_overlap,
    parse_worlds,
    predict_step,
)
from speechllm.planner.traffic import estimate_traffic
from speechllm.world import World

NETWORK = Network("test", Link(1e-5, 1e9), Link(1e-4, 1e8))  # 10 us and 1 GB/s, 100 us and 0.1
LARGE = str(ROOT / "configs" / "whisper-large-v3_olmo2-1b_pre_norm.yaml")
KEPT = ("strategy.kind=fsdp2", "strategy.reshard_after_forward=false")


@cache
def large(*more: str) -> Job:
    config = load_config(LARGE, ["precision=bf16", *more])
    return job_of(config, read_architecture(config.model), Machine(1, 0, on_cpu=False))


def large_job(ranks: int, microbatches: int, *more: str) -> Job:
    return replace(large(*more), ranks=ranks, microbatches=microbatches)


@dataclass(frozen=True)
class OneMessage:
    kind: Kind
    size: int
    count: int
    beside: str | None
    microbatches: int


@pytest.mark.parametrize(
    ("kind", "size", "ranks", "seconds"),
    [
        # 3 hops of 10 us, 3/4 of 4 MB over 1 GB/s.
        ("all_gather", 4_000_000, 4, 3e-5 + 3e-3),
        ("reduce_scatter", 4_000_000, 4, 3e-5 + 3e-3),
        ("all_reduce", 4_000_000, 4, 2 * (3e-5 + 3e-3)),
        # A tree: up and down 3 levels, against 14 hops.
        ("all_reduce", 8, 8, 2 * (3e-5 + 8e-9)),
        # Two nodes: 14 hops within and one between, at the pace of the slower link.
        ("all_gather", 16_000_000, 16, 14e-5 + 1e-4 + 15 / 16 * 0.16),
        # Four nodes: 3 levels within, 2 between.
        ("all_reduce", 8, 32, 2 * (3e-5 + 2e-4 + 8e-8)),
    ],
)
def test_a_collective_by_hand(kind: Kind, size: int, ranks: int, seconds: float) -> None:
    assert collective_seconds(kind, size, ranks, NETWORK, 8) == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize("network", [*PRESETS.values(), NETWORK], ids=lambda n: n.name)
def test_more_ranks_and_more_bytes_take_longer(kind: Kind, network: Network) -> None:
    sizes, worlds = (8, 10**4, 10**7, 10**9), (1, 2, 3, 8, 9, 64, 100, 1024)
    seconds = np.array(
        [[collective_seconds(kind, n, w, network, 8) for w in worlds] for n in sizes]
    )
    assert (seconds[:, 0] == 0).all()
    assert (np.diff(seconds[:, 1:], axis=0) > 0).all()
    assert (np.diff(seconds, axis=1) > 0).all()


def test_a_ring_sends_all_but_its_own_part() -> None:
    assert sent_bytes("all_gather", 1000, 4) == 750
    assert sent_bytes("all_reduce", 1000, 4) == 1500
    assert sent_bytes("reduce_scatter", 1000, 1) == 0


def test_links_are_read() -> None:
    found = parse_link("intra=300GB/s, inter=200Gb/s,latency=5us")
    assert found.intra == Link(5e-6, 300e9)
    assert found.inter == Link(5e-6, 25e9)
    assert found.given
    preset = PRESETS["pcie+eth10"]
    assert parse_link("pcie+eth10") == preset
    assert parse_link("pcie+eth10,latency=1ms").inter == Link(1e-3, preset.inter.bytes_per_second)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nvlink", "nvlink+ib200"),
        ("intra=300", "25GB/s"),
        ("intra=0GB/s", "25GB/s"),
        ("latency=5", "5us"),
        ("speed=1GB/s", "intra=300GB/s"),
    ],
)
def test_wrong_links(text: str, word: str) -> None:
    with pytest.raises(UserError, match=word.replace("+", r"\+")):
        parse_link(text)


def test_wrong_numbers() -> None:
    assert parse_worlds("8,1,8") == (1, 8)
    assert parse_overlap("weights=0.5") == Overlap(0.0, 0.5)
    for text in ("", "0,2", "a"):
        with pytest.raises(UserError, match="--scale"):
            parse_worlds(text)
    for text in ("weights", "weights=2", "speed=1"):
        with pytest.raises(UserError, match="--overlap"):
            parse_overlap(text)


def test_a_step_by_hand() -> None:
    compute = Compute(microbatch=0.5, utterances=10, update=0.1)
    gathers = OneMessage("all_gather", 8_000_000, 2, "compute", 3)  # 2 x (10 us + 2 ms)
    grads = OneMessage("all_reduce", 4_000_000, 1, "backward", 1)  # 2 x (10 us + 2 ms)
    counts = OneMessage("all_reduce", 0, 1, None, 1)
    layout = layout_of(2, 5)
    step = predict_step(compute, layout, (gathers, grads, counts), NETWORK, 8, Overlap())
    assert layout.rounds == 3
    assert layout.waste == pytest.approx(1 / 6)
    assert step.compute == pytest.approx(3 * 0.5 + 0.1)
    assert step.communication == pytest.approx(2 * 2.01e-3 + 2 * 2.01e-3 + 2e-5)
    assert step.exposed == step.communication
    assert step.sent == pytest.approx(4e6 + 4e6)
    assert step.utterances_per_second == pytest.approx(50 / (1.6 + step.communication))
    # 0.001 of three microbatches' compute hides 1.5 ms; 0.004 of one hides 2 ms.
    hidden = predict_step(
        compute, layout, (gathers, grads, counts), NETWORK, 8, Overlap(0.004, 0.001)
    )
    assert step.exposed - hidden.exposed == pytest.approx(2e-3 + 1.5e-3)
    everything = predict_step(compute, layout, (gathers, grads, counts), NETWORK, 8, Overlap(1, 1))
    assert everything.exposed == pytest.approx(2e-5)


@pytest.mark.parametrize(("microbatches", "ranks"), [(7, 1), (8, 4), (7, 3), (3, 8), (5, 4)])
def test_the_costliest_rank(microbatches: int, ranks: int) -> None:
    costs_KM = np.random.default_rng(0).integers(1, 100, (3, microbatches)).astype(float)
    expected = [
        max(sum(costs[m] for m, _ in rank_share(microbatches, r, ranks)) for r in range(ranks))
        for costs in costs_KM
    ]
    assert busiest_costs(costs_KM, ranks).tolist() == expected
    layout = layout_of(ranks, microbatches, costs_KM)
    assert layout.busiest == pytest.approx(np.mean(expected) / costs_KM.mean())
    even = layout_of(ranks, microbatches, np.ones((2, microbatches)))
    assert even == layout_of(ranks, microbatches)
    assert even.imbalance == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scaling_gets_worse_with_every_gpu(strategy: str) -> None:
    compute = Compute(0.5, 10.0)
    one = predict_step(compute, layout_of(1, 64), (), NETWORK, 8, Overlap())
    for grows in (False, True):
        found = []
        for ranks in (1, 2, 4, 8, 16, 64, 256, 1024):
            layout = layout_of(ranks, 64 * ranks if grows else 64)
            messages = step_messages(large_job(ranks, layout.rounds), strategy)
            step = predict_step(compute, layout, messages, NETWORK, 8, Overlap())
            assert bool(messages) == (ranks > 1)
            assert (step.communication > 0) == (ranks > 1)
            found.append(efficiency(step, one))
        assert found[0] == 1
        assert found == sorted(found, reverse=True)
        assert found[-1] > 0


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "fsdp2", "zero3"])
@pytest.mark.parametrize("more", [(), KEPT], ids=["resharded", "kept"])
def test_bytes_agree_with_the_plan(strategy: str, more: tuple[str, ...]) -> None:
    job = large_job(8, 4, *more)
    sent = sum(sent_bytes(m.kind, m.size, 8) for m in step_messages(job, strategy))
    exact = strategy in ("ddp", "zero1", "zero2") or (strategy == "fsdp2" and not job.reshard)
    # The plan counts each layer of the sharded ones as gathered whenever it runs.
    assert sent == pytest.approx(estimate_traffic(job, strategy), rel=1e-4 if exact else 0.35)


def test_the_formulas_start_without_torch() -> None:
    code = (
        "import sys, speechllm.planner.options, speechllm.planner.links\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "import speechllm.planner.scaling, speechllm.planner.step_time\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


CASES = {
    "ddp": ("ddp",),
    "fsdp2": ("fsdp2",),
    "adapted": ("fsdp2", "model.lora.rank=4", "model.unfreeze_encoder_layers=1"),
    "kept": ("fsdp2", "strategy.reshard_after_forward=false"),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Any]:
    """{case: {kind: [count, bytes]}} of a step of two rounds on two ranks."""
    directory = tmp_path_factory.mktemp("counted")
    build_tiny_llm(directory / "llm", hidden=64, layers=3)
    (directory / "shards").symlink_to(shards)

    def work(world: World) -> dict[str, Any]:
        found = {}
        for case, chosen in CASES.items():
            config = configuration(directory, *chosen, f"run_dir={directory / case}")
            with ExitStack() as stack:
                run, data = opened(config, world, stack, 0)
                for number in range(3):  # DDP rearranges its buckets after the first
                    with Counted() as counter:
                        run_one(run, data[number], number)
            found[case] = counter.found
        return found

    first, second = on_ranks(2, directory, work)
    assert first == second
    return {"directory": directory, **first}


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_messages_are_those_of_real_steps(counted: dict[str, Any], case: str) -> None:
    config = configuration(counted["directory"], *CASES[case])
    job = job_of(config, read_architecture(config.model), Machine(2, 0, on_cpu=True))
    assert job.microbatches == 2
    expected: dict[str, list[int]] = {}
    for message in step_messages(job, CASES[case][0]):
        if message.what == "norm":
            continue  # of a DTensor, whose own collectives the counter does not see
        entry = expected.setdefault(message.kind, [0, 0])
        entry[0] += message.count
        entry[1] += message.size
    assert counted[case] == expected
    trained = job.architecture.trained_parameters
    gradients = expected["all_reduce" if case == "ddp" else "reduce_scatter"]
    assert gradients[1] >= 4 * trained
