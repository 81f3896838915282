from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pytest
from runs import TINY, metrics, tiny_config

import speechllm.settle
from speechllm.checkpoint import find_checkpoint
from speechllm.config.load import dump_config, load_config
from speechllm.config.schema import Config
from speechllm.model.tiny import build_tiny_llm
from speechllm.planner.workload import assumed
from speechllm.settle import measured_in_training, settle
from speechllm.train import train
from speechllm.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
AUTO = "precision=auto"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An LLM just above the size up to which nothing is measured."""
    directory = tmp_path_factory.mktemp("models") / "llm"
    return f"model.llm.id={build_tiny_llm(directory, hidden=512, layers=5, heads=8)}"


@pytest.fixture(autouse=True)
def _nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speechllm.planner.preference.speed_directory", lambda: tmp_path / "speed")


@pytest.fixture
def fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speechllm.settle, "bf16_is_fast", lambda device: True)


def never(*args: Any, **kwargs: Any) -> dict[str, float]:
    raise AssertionError("nothing is to be measured")


def says(**seconds: float) -> Callable[..., dict[str, float]]:
    return lambda *args, **kwargs: seconds


def settled(config: Config, **measures: Any) -> Config:
    return settle(config, CPU, ALONE, utterances=assumed(config), **measures)


def test_small_models_are_settled_by_rule() -> None:
    found = settled(load_config(TINY, []), time_attention=never, time_products=never)
    assert (found.precision, found.model.llm.attention) == ("fp32", "sdpa")
    assert found.performance.packing == "off"
    assert found.performance.prefix_cache == "auto"
    assert found.train.activation_checkpointing is False
    assert load_config(TINY, []) == load_config(TINY, [])  # and the original is untouched
    assert settled(load_config(TINY, ["precision=bf16"])).model.llm.attention == "eager"


def test_without_training_data_nothing_is_measured(large: str) -> None:
    found = settle(load_config(TINY, [large, AUTO]), CPU, time_attention=never)
    assert found.model.llm.attention in ("eager", "sdpa")
    assert found.precision != "auto"


def test_what_training_will_measure_is_known_before(large: str, fast_bf16: None) -> None:
    def measured(*overrides: str) -> set[str]:
        return measured_in_training(load_config(TINY, [large, *overrides]), CPU)

    kernels = {"model.llm.attention"}
    assert measured("performance.packing=off") == kernels
    assert measured(AUTO, "performance.packing=off") == kernels | {"precision"}
    assert measured("performance.packing=off", "model.llm.attention=eager") == set()
    assert measured(AUTO, "performance.preset=plain") == {"precision"}
    assert measured_in_training(load_config(TINY, [AUTO]), CPU) == set(), "is small"


def test_the_faster_attention_is_taken_where_it_is_faster_by_a_tenth(large: str) -> None:
    config = load_config(TINY, [large])
    near = settled(config, time_attention=says(sdpa=1.0, eager=0.95))
    assert near.model.llm.attention == "sdpa"


def test_a_clearly_faster_attention_is_taken_and_remembered(
    large: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(TINY, [large])
    with caplog.at_level("INFO", logger="speechllm"):
        assert (
            settled(config, time_attention=says(sdpa=1.0, eager=0.8)).model.llm.attention == "eager"
        )
    assert "attention is eager" in caplog.text
    assert "800.0 ms (eager)" in caplog.text
    assert settled(config, time_attention=never).model.llm.attention == "eager"


def test_what_is_asked_for_is_not_measured(large: str) -> None:
    config = load_config(TINY, [large, "model.llm.attention=eager"])
    assert settled(config, time_attention=never).model.llm.attention == "eager"


def test_attention_is_really_measured(large: str) -> None:
    config = load_config(TINY, [large, "data.microbatch_tokens=256"])
    assert settled(config).model.llm.attention in ("eager", "sdpa", "grouped")


@pytest.mark.parametrize(("fp32", "chosen"), [(2.0, "bf16"), (0.95, "bf16"), (0.5, "fp32")])
def test_bf16_must_not_be_slower_where_the_device_has_it(
    large: str, fast_bf16: None, fp32: float, chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(TINY, [large, AUTO, "model.llm.attention=sdpa"])
    with caplog.at_level("INFO", logger="speechllm"):
        found = settled(config, time_products=says(fp32=fp32, bf16=1.0))
    assert found.precision == chosen
    assert f"{fp32:.2f} times as fast" in caplog.text


def test_a_device_without_bf16_takes_fp32(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speechllm.settle, "bf16_is_fast", lambda device: False)
    config = load_config(TINY, [large, AUTO, "model.llm.attention=sdpa"])
    assert settled(config, time_products=never).precision == "fp32"


def test_lora_forbids_the_prefix_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="speechllm"):
        found = settle(load_config(TINY, ["model.lora.rank=4"]), CPU)
    assert found.performance.prefix_cache == "off"
    assert "LoRA changes" in caplog.text


def test_the_plain_preset_is_spelled_out_and_reads_back(tmp_path: Path) -> None:
    config = load_config(TINY, ["performance.preset=plain"])
    found = settle(config, CPU)
    assert found.model.encoder.context == "pad30"
    assert found.model.llm.attention == "sdpa"
    performance = found.performance
    assert (performance.prefix_cache, performance.packing) == ("off", "off")
    assert performance.label_logits is False
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(found))
    assert load_config(str(file)) == found
    assert settle(found, CPU) == found


def test_memory_decides_on_activation_checkpointing(
    large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def needs(config: Config, *rest: Any) -> bool:
        asked.append(config.model.llm.attention)
        return True

    monkeypatch.setattr(speechllm.settle, "needs_checkpointing", needs)
    attention = "model.llm.attention=sdpa"
    assert settled(load_config(TINY, [large, attention])).train.activation_checkpointing is True
    assert asked == ["sdpa"]
    off = load_config(TINY, [large, attention, "train.activation_checkpointing=false"])
    assert settled(off).train.activation_checkpointing is False
    assert len(asked) == 1


def test_a_run_that_goes_on_keeps_its_choices(large: str, tmp_path: Path, fast_bf16: None) -> None:
    config = load_config(TINY, [large, AUTO])
    before = settled(
        config, time_attention=says(sdpa=0.5, eager=1.0), time_products=says(fp32=0.5, bf16=1.0)
    )
    assert (before.precision, before.model.llm.attention) == ("fp32", "sdpa")
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(before))
    assert settled(config, recorded=file, time_attention=never, time_products=never) == before
    changed = load_config(TINY, [large, "precision=fp32", "model.llm.attention=eager"])
    assert settled(changed, recorded=file).model.llm.attention == "eager"


def test_choices_that_cannot_run_here_are_made_anew(
    large: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speechllm.settle, "bf16_is_fast", lambda device: False)
    there = ["precision=bf16", "model.llm.attention=flash_attention_2", "performance.packing=on"]
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(load_config(TINY, there)))
    found = settle(load_config(TINY, [AUTO]), CPU, recorded=file)
    assert (found.precision, found.model.llm.attention) == ("fp32", "sdpa")
    file.write_text("no: configuration")
    assert settle(load_config(TINY, [AUTO]), CPU, recorded=file).precision == "fp32"


def test_other_ranks_are_told(large: str) -> None:
    class Second(World):
        def from_main(self, value: Any) -> Any:
            return {
                "model.llm.attention": "eager",
                "performance.packing": "on",
                "precision": "fp16",
            }

    config = load_config(TINY, [large, AUTO])
    world = Second(1, 2, 1, CPU)
    found = settle(config, CPU, world, utterances=assumed(config), time_attention=never)
    assert (found.precision, found.model.llm.attention) == ("fp16", "eager")
    assert found.performance.packing == "on"


def test_a_resumed_run_takes_the_choice_of_its_checkpoint(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(steps: int) -> Config:
        return tiny_config(tmp_path / "run", shards, f"train.steps={steps}", "data.num_workers=0")

    train(config(1), ALONE)
    checkpoint = find_checkpoint(tmp_path / "run", prefer="last")
    recorded = load_config(str(checkpoint / "config.yaml"))
    assert recorded.model.llm.attention == "sdpa"
    monkeypatch.setattr(speechllm.settle, "usual_attention", lambda device, dtype: "eager")
    train(config(2), ALONE)
    assert load_config(str(tmp_path / "run" / "config.yaml")).model.llm.attention == "sdpa"
    assert len(metrics(tmp_path / "run")) == 2


def test_plain_microbatches_hold_so_many_utterances(tmp_path: Path, shards: Path) -> None:
    plain = ["performance.preset=plain", "performance.plain_utterances=5", "train.steps=2"]
    train(tiny_config(tmp_path, shards, "data.num_workers=0", *plain), ALONE)
    assert [line["utterances"] for line in metrics(tmp_path)] == [10, 10]
    # The LLM runs all 30 s of them.
    assert min(line["padding_fraction"] for line in metrics(tmp_path)) > 0.7
    assert "5 utterances in each" in (tmp_path / "train.log").read_text()
