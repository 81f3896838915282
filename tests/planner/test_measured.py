"""Predictions beside what real steps take on a CPU, to within 15 %."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pytest
from runs import ROOT, TINY
from speech_models import asr, batch_of, noise

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.model.build import build_model
from speechllm.model.hub import fetched_models
from speechllm.model.speech_llm import SpeechLLM
from speechllm.model.tiny import build_tiny_llm, build_tiny_whisper
from speechllm.planner.advice import Machine, job_of
from speechllm.planner.architecture import read_architecture
from speechllm.planner.measure import peak_growth
from speechllm.planner.memory import estimate_memory
from speechllm.planner.workload import shape_of
from speechllm.settle import settle
from speechllm.strategy.ddp import DDPStrategy
from speechllm.types import Batch
from speechllm.world import World

TOLERANCE = 0.15
CPU = torch.device("cpu")
PREFIX = tuple(range(5, 45))  # of the prompt, which by default no row repeats


def batch_for(config: Config, *, rows: int, seconds: float, text: int) -> Batch:
    """The first row is the longest: a microbatch has a little padding."""
    examples = [
        asr(
            noise(int(16_000 * seconds) - (160 if row else 0), seed=row),
            [7] * (text - 2 * (row > 0)),
            prefix=PREFIX,
        )
        for row in range(rows)
    ]
    return batch_of(config.model, examples)


def built(config: Config) -> SpeechLLM:
    return build_model(
        config.model,
        precision=config.precision,
        device=CPU,
        seed=1,
        performance=config.performance,
        prefix=PREFIX,
        ctc=config.train.ctc_steps > 0,
        activation_checkpointing=config.train.activation_checkpointing is True,
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages that the tensors have, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def standing_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what lives through a training step: weights, buffers, gradients, moments."""
    parameters = list(model.parameters())
    tensors: list[Tensor] = [*parameters, *model.buffers()]
    tensors += [p.grad for p in parameters if p.grad is not None]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return storage_bytes(tensors)


def predicted_and_measured(
    config: Config,
    model: SpeechLLM,
    *,
    rows: int = 8,
    seconds: float = 1.0,
    text: int = 100,
    microbatches: int = 1,
) -> tuple[float, float]:
    """Bytes of a step of one process; the optimizer has its moments already."""
    strategy = DDPStrategy(model, config, World(0, 1, 0, CPU))

    def step(batch: Batch, count: int) -> None:
        for _ in range(count):
            strategy.backward(strategy.model(batch, "lm").loss * 1e-3)
        strategy.step(1e-4)

    step(batch_for(config, rows=1, seconds=0.1, text=4), 1)
    batch = batch_for(config, rows=rows, seconds=seconds, text=text)
    prefix = model.shortcuts.prefix
    standing = standing_bytes(model, strategy.optimizer)
    if len(prefix):
        standing += storage_bytes(x for pair in prefix.keys_values(len(prefix)) for x in pair)
    growth = peak_growth(lambda: step(batch, microbatches), CPU)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"microbatches_per_step": microbatches})}
    )
    job = job_of(config, read_architecture(config.model), Machine(1, 0, on_cpu=True))
    shape = shape_of(config, batch, prefix.length(batch.opening))
    if not model.shortcuts.plain:
        layout, _ = model.shortcuts.lay_out(batch)
        run = layout.tokens_RC.numel()  # without what pads the other rows, where they are packed
        assert job.rows(shape).positions == pytest.approx(run, rel=0.02)
    parts = estimate_memory(job, shape, "ddp")
    return sum(parts.values()), standing + growth + parts["batch"]


def check(config: Config, model: SpeechLLM | None = None, **microbatch: Any) -> None:
    predicted, measured = predicted_and_measured(config, model or built(config), **microbatch)
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.llm.id=random:llama"],
        ["performance.prefix_cache=off"],
        ["performance.packing=on"],
        ["performance.logits_megabytes=1"],
        ["model.llm.id=random:olmo2"],
        ["model.llm.attention=eager"],
        ["model.llm.attention=grouped"],
        ["train.activation_checkpointing=true"],
        ["model.lora.rank=8", "model.lora.targets=all-linear"],
        ["model.connector.hidden_size=256"],
    ],
    ids=lambda overrides: overrides[0].partition(".")[2],
)
def test_tiny_models(overrides: list[str]) -> None:
    check(load_config(TINY, overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.activation_checkpointing=true"],
        ["model.lora.rank=8"],
        ["model.frozen_dtype=fp32"],
    ],
    ids=lambda overrides: overrides[0].partition(".")[2] if overrides else "frozen",
)
def test_tiny_models_in_bf16(overrides: list[str]) -> None:
    check(load_config(TINY, ["precision=bf16", *overrides]), rows=4, text=60)


def test_plain() -> None:
    """Audio as long as 30 s up to the LLM, logits of all positions, the prompt in every row."""
    overrides = ["performance.preset=plain", "performance.plain_utterances=2"]
    config = settle(load_config(TINY, overrides), CPU)
    check(config, rows=2)


def test_earlier_microbatches_leave_their_gradients() -> None:
    check(load_config(TINY, ["model.connector.hidden_size=256"]), microbatches=2)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_long_audio_and_layers_of_the_encoder_that_train(checkpointing: str) -> None:
    overrides = ["model.unfreeze_encoder_layers=1"]
    overrides.append(f"train.activation_checkpointing={checkpointing}")
    check(load_config(TINY, overrides), rows=4, seconds=6.0, text=40)


def test_filterbank(tmp_path: Path) -> None:
    file = tmp_path / "fbank.yaml"
    file.write_text(
        "precision: fp32\nmodel: {encoder: {kind: fbank}, llm: {id: 'random:llama'},"
        " connector: {kind: mlp, hidden_size: 128}}\n"
    )
    check(load_config(file, []), rows=4, seconds=6.0, text=40)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_larger_models(tmp_path: Path, checkpointing: str) -> None:
    llm = build_tiny_llm(tmp_path / "llm", kind="olmo2", hidden=256, layers=6, heads=8)
    whisper = build_tiny_whisper(tmp_path / "whisper", hidden=128, layers=3)
    overrides = [f"model.llm.id={llm}", f"model.encoder.id={whisper}"]
    overrides.append(f"train.activation_checkpointing={checkpointing}")
    check(load_config(TINY, overrides), seconds=4.0, text=60)


@pytest.mark.models
def test_pretrained_models() -> None:
    if not (fetched_models() / "whisper-tiny.en").is_dir():
        pytest.skip("tools/fetch_models.py has not been run")
    overrides = ["precision=fp32", "train.activation_checkpointing=true"]
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    model = built(config)
    check(config, model, rows=2, seconds=3.0, text=20)
    for layer in model.checkpointed:
        layer.gradient_checkpointing = False
    overrides[-1] = "train.activation_checkpointing=false"
    config = load_config(ROOT / "configs" / "demo.yaml", overrides)
    check(config, model, rows=2, seconds=3.0, text=20)


def test_what_is_measured_is_what_is_allocated() -> None:
    kept = []

    def work() -> None:
        kept.append(torch.zeros(1000))  # 4,000 bytes that stay
        torch.zeros(3000)  # 12,000 that do not
        torch.zeros(500)

    assert peak_growth(work, CPU) == 16_000
    assert peak_growth(lambda: None, CPU) == 0
