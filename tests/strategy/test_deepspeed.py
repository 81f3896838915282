"""Every ZeRO stage against DDP and against one process, on forked ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pytest
from forked_function import on_ranks
from forked_ranks import Ranks
from runs import PATIENCE, ROOT, TINY, metrics, tiny_config
from speech_models import END, PAD, PREFIX, asr, batch_of, noise

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.plan import rank_share
from speechllm.errors import CheckpointError
from speechllm.generate import generate
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prepare import prepare_model
from speechllm.step import agree, run_step
from speechllm.strategy.base import Strategy, TrainableState
from speechllm.strategy.build import build_strategy
from speechllm.train import train as train_run
from speechllm.types import Batch, Microbatch, StepData
from speechllm.world import World, connected

pytestmark = pytest.mark.distributed

ALONE = World(0, 1, 0, torch.device("cpu"))
# As shipped; in `released`, no weight is small enough to stay gathered, as all here are else.
STAGES = ("zero1", "zero2", "zero3", "zero3_offload", "released")
IN_BF16 = ("zero1", "zero2", "zero3_offload", "released")
MICROBATCHES = 4  # of a step: two a rank where there are two ranks
CTC_STEPS, CUT, LAST = 1, 2, 4  # the state is exchanged before step CUT; step LAST comes last
LONGEST = (3, 7)  # tokens that each rank's rows may have
Curve = list[tuple[float, float]]  # (loss, gradient norm) of each step


@lru_cache
def released() -> str:
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = Path(tempfile.mkdtemp()) / "released.json"
    file.write_text(json.dumps(settings))
    return str(file)


def config_of(kind: str, precision: str = "fp32") -> Config:
    chosen = [f"strategy.kind={kind}"]
    if kind != "ddp":
        file = released() if kind == "released" else f"{ROOT}/ds_configs/{kind}.json"
        chosen[0] = "strategy.kind=deepspeed"
        chosen += [f"strategy.config={file}"]
    options = ["optim.max_grad_norm=0.2", "model.connector.hidden_size=36", "train.ctc_steps=1"]
    return load_config(TINY, [f"precision={precision}", *options, *chosen])


def build(config: Config, world: World) -> tuple[SpeechLLM, Strategy]:
    prefix = PREFIX if world.size > 1 else ()  # alone it is run in every row
    model = prepare_model(config, world.device, prefix=prefix, ctc=True, sharded=True)
    return model, build_strategy(config, model, world)


def batch(config: Config, seed: int, *, with_target: bool = True) -> Batch:
    """Two utterances with targets of different lengths."""
    targets = [range(10, 13 + (seed + i) % 5) if with_target else () for i in range(2)]
    lengths = [2_000 + 700 * ((seed + i) % 4) for i in range(2)]
    examples = [
        asr(noise(length, seed=seed), tuple(target))
        for length, target in zip(lengths, targets, strict=True)
    ]
    return batch_of(config.model, examples, pad_left=not with_target)


def train(
    strategy: Strategy, config: Config, world: World, steps: Sequence[int], *, broken: bool = False
) -> Curve:
    """`broken`: the loss of rank 0's first microbatch is infinite."""
    curve = []
    for step in steps:
        data = StepData(0, step, [
            Microbatch(
                number, math.inf if broken and number == 0 else float(not repeat),
                batch(config, MICROBATCHES * step + number), 2, 1.0,
            )
            for number, repeat in rank_share(MICROBATCHES, world.rank, world.size)
        ])  # fmt: skip
        totals = agree(data, world, stop=False)
        done = run_step(
            strategy, data, totals, objective="ctc" if step < CTC_STEPS else "lm", lr=2e-3, seed=1,
            step=step, device=world.device,
        )  # fmt: skip
        (loss,) = world.sum([float(done.loss)])
        curve.append((loss / totals.target_tokens, float(done.grad_norm)))
    return curve


def said(model: SpeechLLM, config: Config, rank: int, num_beams: int = 1) -> list[list[int]]:
    return generate(
        model, batch(config, rank, with_target=False), max_new_tokens=LONGEST[rank],
        num_beams=num_beams, end_token_ids=(END,), pad_id=PAD,
    )  # fmt: skip


@torch.no_grad()
def evaluated(model: SpeechLLM, config: Config) -> float:
    model.eval()
    loss = float(model(batch(config, 99)).loss)
    model.train()
    return loss


class Alone:
    """What one process gives with DDP's strategy: that to which all else is compared."""

    def __init__(self) -> None:
        config = config_of("ddp")
        model, strategy = build(config, ALONE)
        self.start = whole(strategy)
        self.curve = train(strategy, config, ALONE, range(CUT))
        self.cut = whole(strategy)
        self.curve += train(strategy, config, ALONE, range(CUT, LAST))
        self.end = whole(strategy)
        self.said = [[said(model, config, rank, beams) for beams in (1, 2)] for rank in range(2)]
        self.evaluated = evaluated(model, config)
        self.curve += train(strategy, config, ALONE, [LAST])
        self.dtypes = [t.dtype for t in tensors_of(model)]


@lru_cache(maxsize=1)
def alone() -> Alone:
    return Alone()


def imported() -> None:
    """So that forks need not import it; not at the top, where every process that only collects
    the tests would."""
    import deepspeed  # noqa: F401


def whole(strategy: Strategy) -> TrainableState:
    state = strategy.full_state()
    assert state is not None
    return state


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def distance(found: TrainableState | None, wanted: TrainableState | None) -> dict[str, float]:
    """Largest differences; nothing on the ranks that have no state."""
    if found is None or wanted is None:
        return {}
    assert found.step == wanted.step
    result = {}
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        ours, theirs = getattr(found, part), getattr(wanted, part)
        assert ours.keys() == theirs.keys()
        result[part] = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    return result


def one_life(kind: str, given: TrainableState | None, world: World) -> dict[str, Any]:
    """Train, hand out and take in states, skip a step, decode, evaluate, train on."""
    expected, config = alone(), config_of(kind)
    model, strategy = build(config, world)
    record: dict[str, Any] = {"sharded": model.sharded, "start": distance(
        strategy.full_state(), expected.start
    )}  # fmt: skip
    record["held"] = sum(
        p.numel() if not hasattr(p, "ds_tensor") else p.ds_tensor.numel()
        for p in model.parameters() if not p.requires_grad
    )  # fmt: skip
    record["dtypes"] = [t.dtype for t in tensors_of(model)] == expected.dtypes
    curve = train(strategy, config, world, range(CUT))
    handed_out = strategy.full_state()
    record["cut"] = distance(handed_out, expected.cut)
    train(strategy, config, world, [LAST])  # away from there, so that it matters what comes in
    strategy.load_full_state(given)
    record["given"] = distance(strategy.full_state(), given)
    curve += train(strategy, config, world, range(CUT, LAST))
    before = strategy.full_state()
    record["end"] = distance(before, expected.end)
    ((_, record["skipped_norm"]),) = train(strategy, config, world, [LAST], broken=True)
    record["skipped"] = distance(strategy.full_state(), before)
    strategy.load_full_state(expected.end if world.is_main else None)
    record["said"] = [said(model, config, world.rank, beams) for beams in (1, 2)]
    record["evaluated"] = evaluated(model, config)
    record["curve"] = [*curve, *train(strategy, config, world, [LAST])]
    record["refusal"] = refusal(strategy, expected.end, world)
    return record | {"state": handed_out}


def refusal(strategy: Strategy, state: TrainableState, world: World) -> str:
    weights = dict(state.weights)
    weights["connector.odd"] = weights.popitem()[1]
    odd = TrainableState(weights, state.exp_avg, state.exp_avg_sq, state.step)
    try:
        strategy.load_full_state(odd if world.is_main else None)
    except CheckpointError as error:
        return str(error)
    return ""


def lives(world: World) -> dict[str, Any]:
    """The state that each has at the cut is the one that the next goes on from."""
    records, handed = {}, alone().cut if world.is_main else None
    for kind in ("zero1", "zero3", "zero2", "zero3_offload", "released", "ddp"):
        records[kind] = one_life(kind, handed, world)
        handed = records[kind].pop("state")
    return records


def low_precision(world: World) -> dict[str, Any]:
    """Curves in bf16, and in fp16 with the scale before and after a step that overflows."""
    records: dict[str, Any] = {}
    for kind in ("ddp", *IN_BF16):
        config = config_of(kind, "bf16")
        model, strategy = build(config, world)
        types = sorted({str(t.dtype) for t in tensors_of(model)})
        records[f"{kind} bf16"] = (train(strategy, config, world, (1, 2)), types)
    for kind in ("ddp", "zero2", "zero3"):
        config = config_of(kind, "fp16")
        _, strategy = build(config, world)
        scales = []
        curve = []
        for step, broken in ((1, False), (2, True), (3, False)):
            curve += train(strategy, config, world, [step], broken=broken)
            scales.append(world.from_main(_scale(strategy.full_state())))
        records[f"{kind} fp16"] = (curve, scales)
    return records


def _scale(state: TrainableState | None) -> float | None:
    return state.loss_scale if state is not None else None


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    imported(), alone(), released()  # once, before the fork
    return on_ranks(
        2, tmp_path_factory.mktemp("ranks"),
        lambda world: lives(world) | low_precision(world), patience=400,
    )  # fmt: skip


EVERY = ("ddp", *STAGES)


@pytest.mark.parametrize("kind", EVERY)
def test_loss_norm_and_weights_are_those_of_one_process(
    kind: str, two_ranks: list[dict[str, Any]]
) -> None:
    for record in two_ranks:
        losses, norms = zip(*record[kind]["curve"], strict=True)
        assert losses == pytest.approx([loss for loss, _ in alone().curve], abs=1e-5)
        assert norms == pytest.approx([norm for _, norm in alone().curve], rel=1e-5)
        assert max(norms) > 0.2  # clipping was at work
    assert max(two_ranks[0][kind]["cut"].values()) < 2e-4
    assert max(two_ranks[0][kind]["end"].values()) < 2e-4


@pytest.mark.parametrize("kind", STAGES)
def test_what_trains_begins_as_the_seed_says(kind: str, two_ranks: list[dict[str, Any]]) -> None:
    assert set(two_ranks[0][kind]["start"].values()) == {0.0}
    assert all(record[kind]["dtypes"] for record in two_ranks)


@pytest.mark.parametrize("kind", EVERY)
def test_a_state_comes_out_as_it_went_in(kind: str, two_ranks: list[dict[str, Any]]) -> None:
    assert set(two_ranks[0][kind]["given"].values()) == {0.0}


@pytest.mark.parametrize("kind", EVERY)
def test_a_gradient_that_is_not_finite_moves_nothing(
    kind: str, two_ranks: list[dict[str, Any]]
) -> None:
    assert not any(math.isfinite(record[kind]["skipped_norm"]) for record in two_ranks)
    assert set(two_ranks[0][kind]["skipped"].values()) == {0.0}


@pytest.mark.parametrize("kind", EVERY)
def test_decoding_and_evaluation_between_steps_are_those_of_one_process(
    kind: str, two_ranks: list[dict[str, Any]]
) -> None:
    for rank, record in enumerate(two_ranks):
        assert record[kind]["said"] == alone().said[rank]
        assert {len(row) for row in record[kind]["said"][0]} == {LONGEST[rank]}
        assert record[kind]["evaluated"] == pytest.approx(alone().evaluated, abs=1e-4)


def test_only_stage_3_shards_what_is_frozen(two_ranks: list[dict[str, Any]]) -> None:
    everything = two_ranks[0]["ddp"]["held"]
    for kind in EVERY:
        held = [record[kind]["held"] for record in two_ranks]
        is_3 = kind.startswith("zero3") or kind == "released"
        assert [record[kind]["sharded"] for record in two_ranks] == [is_3, is_3]
        assert held == pytest.approx([everything / 2] * 2 if is_3 else [everything] * 2, rel=1e-3)


@pytest.mark.parametrize("kind", STAGES)
def test_every_rank_refuses_a_state_of_another_model(
    kind: str, two_ranks: list[dict[str, Any]]
) -> None:
    for record in two_ranks:
        assert "connector.odd: in the checkpoint, not in this model" in record[kind]["refusal"]


@pytest.mark.parametrize("kind", IN_BF16)
def test_bf16_is_as_under_ddp(kind: str, two_ranks: list[dict[str, Any]]) -> None:
    for record in two_ranks:
        (found, types), (expected, expected_types) = record[f"{kind} bf16"], record["ddp bf16"]
        losses, norms = zip(*found, strict=True)
        assert losses == pytest.approx([loss for loss, _ in expected], abs=1e-2)
        assert norms == pytest.approx([norm for _, norm in expected], rel=5e-2)
        assert types == expected_types == ["torch.bfloat16", "torch.float32"]


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_the_loss_scale_of_fp16_is_that_of_ddp(kind: str, two_ranks: list[dict[str, Any]]) -> None:
    for record in two_ranks:
        (found, scales), (expected, expected_scales) = record[f"{kind} fp16"], record["ddp fp16"]
        assert scales == expected_scales
        assert scales[1] == scales[0] / 2 == scales[2]
        for number in (0, 2):
            assert found[number][0] == pytest.approx(expected[number][0], abs=1e-2)
            assert found[number][1] == pytest.approx(expected[number][1], rel=5e-2)
        assert not math.isfinite(found[1][1])


def test_one_process_will_do(tmp_path: Path) -> None:
    def rank(_: World) -> dict[str, Any]:
        records = {}
        with connected("cpu", alone_in_group=True) as world:
            for kind in ("zero2", "zero3_offload"):
                config = config_of(kind)
                model, strategy = build(config, world)
                curve = train(strategy, config, world, range(CUT))
                far = distance(strategy.full_state(), alone().cut)
                records[kind] = (model.sharded, curve, far)
        return records

    imported(), alone()
    (records,) = on_ranks(1, tmp_path, rank)
    for sharded, curve, far in records.values():
        assert not sharded
        for (loss, norm), (wanted_loss, wanted_norm) in zip(curve, alone().curve, strict=False):
            assert loss == pytest.approx(wanted_loss, abs=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-5)
        assert max(far.values()) < 2e-4


def finished(launchers: Sequence[Sequence[str]], command: Sequence[str]) -> list[str]:
    """What each launcher printed. They run at once; whatever happens, none is left running."""
    running = [
        subprocess.Popen(
            [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], *command],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )
        for launcher in launchers
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=3 * PATIENCE)[0] for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in running] == [0] * len(running), outputs
    return outputs


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_every_launcher_carries_the_same_run_on(tmp_path: Path, shards: Path) -> None:
    """Two ranks each: deepspeed's launcher over two nodes, the same on one, and forks."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port, other_port = free_port(), free_port()
    nodes = [
        ["deepspeed", "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(rank),
         "--master_addr", "127.0.0.1", "--master_port", port, "--module", "speechllm"]
        for rank in range(2)
    ]  # fmt: skip
    here = ["deepspeed", "--num_accelerators", "2", "--master_port", other_port]

    def command(kind: str, steps: int) -> list[str]:
        return [
            "train", TINY, f"run_dir={tmp_path / 'run'}", f"data.train={shards}",
            "strategy.kind=deepspeed", f"strategy.config={ROOT}/ds_configs/{kind}.json",
            f"train.steps={steps}", "optim.schedule=constant", "data.num_workers=0",
        ]  # fmt: skip

    outputs = finished(nodes, command("zero2", 2))
    outputs += finished([[*here, "--module", "speechllm"]], command("zero3", 4))
    imported()
    ended = Ranks(tmp_path / "ranks", command("zero3_offload", 6)).wait()
    assert ended.codes == [0, 0], ended.logs
    for output in (*outputs, *ended.logs):
        lines = [line for line in output.splitlines() if not line.startswith("[20")]
        assert all(line[2:3] == ":" for line in lines), output  # nothing but our own log
    config = tiny_config(
        tmp_path / "alone", shards, "train.steps=6", "optim.schedule=constant", "data.num_workers=0"
    )
    assert train_run(config, ALONE) == 0
    expected, found = metrics(tmp_path / "alone"), metrics(tmp_path / "run")
    assert len(found) == len(expected) == 6
    for theirs, ours in zip(expected, found, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
