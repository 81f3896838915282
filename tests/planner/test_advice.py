"""Memory, traffic and advice of whole plans, by what they must be to each other."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from runs import ROOT

from speechllm.config import model as schema
from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.errors import UserError
from speechllm.planner.activations import Rows, Shape
from speechllm.planner.advice import (
    GIB,
    SHIPPED,
    Machine,
    Plan,
    config_name,
    job_of,
    largest_budget,
    machine_here,
    make_plan,
    parse_size,
)
from speechllm.planner.architecture import Architecture, read_architecture
from speechllm.planner.memory import PARTS, STRATEGIES, Job, estimate_memory, moments
from speechllm.planner.traffic import estimate_traffic
from speechllm.planner.workload import assumed, microbatch, row_of
from speechllm.strategy.zero_config import ZERO, ZeRO, read_zero_config

LARGE = str(ROOT / "configs" / "whisper-large-v3_olmo2-1b_pre_norm.yaml")
TORCHS_LINEAR = SHIPPED["zero3"].model_copy(update={"memory_efficient_linear": False})
LLAMA = "model.llm.id=meta-llama/Llama-3.1-8B-Instruct"

pytestmark = pytest.mark.usefixtures("offline")


def large(*overrides: str) -> Config:
    return load_config(LARGE, list(overrides))


def plan_of(config: Config, *, gpus: int, gib: int) -> Plan:
    machine = Machine(ranks=gpus, memory=gib * GIB, on_cpu=False)
    return make_plan(config, architecture(config.model), machine, assumed(config))


@lru_cache
def architecture(model: schema.Model) -> Architecture:
    return read_architecture(model)


def job(config: Config, ranks: int) -> Job:
    return job_of(config, architecture(config.model), Machine(ranks, 80 * GIB, on_cpu=False))


def parts(config: Config, ranks: int, strategy: str, **changes: Any) -> dict[str, int]:
    shape = microbatch(config, assumed(config)[-1], config.data.microbatch_tokens)
    assert shape is not None
    return estimate_memory(replace(job(config, ranks), **changes), shape, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_parts_are_the_whole(strategy: str) -> None:
    entry = plan_of(large(), gpus=8, gib=80).strategies[strategy]
    assert tuple(entry.parts) == PARTS
    assert sum(entry.parts.values()) == entry.bytes_per_rank
    assert min(entry.parts.values()) >= 0


def test_what_each_strategy_divides() -> None:
    config = large()
    about = architecture(config.model)
    frozen, trained = 2 * about.llm.parameters, 4 * about.trained_parameters
    for ranks in (2, 8):
        ddp, zero2, zero3, fsdp2 = (
            parts(config, ranks, name) for name in ("ddp", "zero2", "zero3", "fsdp2")
        )
        assert (ddp["frozen_llm"], ddp["trainable"], ddp["optimizer"]) == (
            frozen, trained, 2 * trained,
        )  # fmt: skip
        assert zero2["frozen_llm"] == frozen
        assert zero2["optimizer"] == pytest.approx(2 * trained / ranks, rel=1e-6)
        for sharded in (zero3, fsdp2):
            assert sharded["frozen_llm"] == pytest.approx(frozen / ranks, rel=1e-6)
            assert sharded["optimizer"] == pytest.approx(2 * trained / ranks, rel=1e-6)
            assert 0 < sharded["gathered"] < frozen
        assert ddp["activations"] == fsdp2["activations"] > 0


def test_offloading_leaves_what_is_gathered() -> None:
    offloaded = parts(large(), 8, "zero3_offload")
    assert offloaded["frozen_llm"] == offloaded["optimizer"] == offloaded["trainable"] == 0
    assert offloaded["gathered"] == parts(large(), 8, "zero3")["gathered"] > 0


def test_the_linear_function_of_zero3_keeps_what_autograd_does_not() -> None:
    config = large(LLAMA, "data.microbatches_per_step=8")
    own, torchs = (
        parts(config, 8, "zero3"),
        parts(config, 8, "zero3", zero={"zero3": TORCHS_LINEAR}),
    )
    about = architecture(config.model).llm
    shape = microbatch(config, assumed(config)[-1], config.data.microbatch_tokens)
    assert shape is not None
    run = shape.rows * (shape.columns - shape.prefix)
    inputs = about.layers * run * (2 * about.width + about.feed_forward) * 2
    assert own["activations"] - torchs["activations"] == inputs > 4 * GIB
    assert torchs["gathered"] > 2 * about.parameters > own["gathered"]


def test_ways_to_save_memory_do() -> None:
    def total(*overrides: str) -> int:
        return sum(parts(large(*overrides), 1, "ddp").values())

    plain = total()
    assert total("train.activation_checkpointing=true") < 0.6 * plain
    assert total("data.microbatch_tokens=1920") < plain
    assert total("precision=fp32") > 1.5 * plain
    assert total("model.lora.rank=64", "model.lora.targets=all-linear") > plain
    assert total("model.unfreeze_encoder_layers=4") > plain
    assert total("model.frozen_dtype=fp32") > plain + 2 * 2.1e9
    assert total("train.ctc_steps=10") == plain + 2 * 100352 * 2048


def test_keeping_weights_gathered_costs_their_memory_and_saves_traffic() -> None:
    config = large("data.microbatches_per_step=32")
    kept = replace(job(config, 8), reshard=False)
    assert parts(config, 8, "fsdp2", reshard=False)["gathered"] > 2 * 2.1e9
    assert estimate_traffic(kept, "fsdp2") < estimate_traffic(job(config, 8), "fsdp2") / 4
    own = large("strategy.kind=fsdp2", "strategy.reshard_after_forward=false")
    assert not job(own, 8).reshard


def test_traffic_by_hand() -> None:
    config = large("data.microbatches_per_step=16")  # 4 microbatches on each of 4 ranks
    about = architecture(config.model)
    trained = 4 * about.trained_parameters
    encoder, llm = 2 * about.frozen_encoder_parameters, 2 * about.llm.parameters
    ring = 3 / 4
    expected = {
        "ddp": ring * 2 * trained,
        "zero1": ring * 3 * trained,
        "zero2": ring * (2 * 4 + 1) * trained,
        "zero3": ring * 4 * (encoder + 2 * llm + 3 * trained),
    }
    for strategy, size in expected.items():
        assert estimate_traffic(job(config, 4), strategy) == pytest.approx(size, rel=1e-6)
    assert estimate_traffic(job(config, 4), "fsdp2") < expected["zero3"]
    assert all(estimate_traffic(job(config, 1), name) == 0 for name in STRATEGIES)


def test_layers_that_run_again_are_gathered_again_by_zero3_only() -> None:
    plain, again = (
        job(large(f"train.activation_checkpointing={flag}"), 8) for flag in ("false", "true")
    )
    assert estimate_traffic(again, "zero3") > estimate_traffic(plain, "zero3")
    assert estimate_traffic(again, "fsdp2") == estimate_traffic(plain, "fsdp2")


def test_ddp_is_recommended_where_it_fits() -> None:
    plan = plan_of(large(), gpus=8, gib=24)
    assert plan.recommended == "ddp"
    assert plan.max_batch_tokens >= 3840


def test_a_strategy_that_shards_is_recommended_where_ddp_does_not_fit() -> None:
    config = large(LLAMA, "train.activation_checkpointing=true", "data.microbatch_tokens=2048")
    plan = plan_of(config, gpus=8, gib=16)
    assert not plan.strategies["ddp"].fits
    assert plan.recommended == "fsdp2"
    assert plan.strategies["fsdp2"].fits


def test_the_largest_budget_fits_and_no_larger_one_does() -> None:
    config = large()
    machine = Machine(8, 24 * GIB, on_cpu=False)
    plan = make_plan(config, architecture(config.model), machine, assumed(config))
    for tokens, fits in ((plan.max_batch_tokens, True), (plan.max_batch_tokens + 64, False)):
        other = large(f"data.microbatch_tokens={tokens}")
        plan = make_plan(other, architecture(other.model), machine, assumed(other))
        assert plan.strategies["ddp"].fits == fits


def test_too_large_a_budget_is_answered_with_one_that_fits() -> None:
    plan = plan_of(large("data.microbatch_tokens=200000"), gpus=1, gib=24)
    assert not any(entry.fits for entry in plan.strategies.values())
    assert plan.recommended == "ddp"
    assert 0 < plan.max_batch_tokens < 200_000


def test_nothing_fits() -> None:
    plan = plan_of(large(LLAMA), gpus=1, gib=2)
    assert plan.recommended is None
    assert plan.max_batch_tokens == 0
    config = large()
    assert largest_budget(config, job(config, 1), assumed(config), usable=0, strategy="ddp") == 0


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_settings_are_those_of_ds_configs(name: str) -> None:
    path = str(ROOT / "ds_configs" / f"{name}.json")
    assert ZeRO.model_validate(read_zero_config(path)[ZERO]) == SHIPPED[name]
    config = large("strategy.kind=deepspeed", f"strategy.config={path}")
    assert config_name(config) == name


def test_the_users_own_zero_settings_count(tmp_path: Any) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000}}')
    config = large("strategy.kind=deepspeed", f"strategy.config={file}", "model.lora.rank=4")
    assert job(config, 8).zero["zero2"].reduce_bucket_size == 1_000_000
    assert parts(config, 8, "zero2")["buckets"] == 4_000_000


def test_offloading_to_nowhere_is_none(tmp_path: Any) -> None:
    settings: dict[str, Any] = {"stage": 3, "offload_param": {"device": "none"}}
    settings["offload_optimizer"] = {"device": "none"}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({ZERO: settings}))
    config = large("strategy.kind=deepspeed", f"strategy.config={file}")
    assert config_name(config) == "zero3"
    assert parts(config, 8, "zero3")["frozen_llm"] > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * GIB), ("80 GiB", 80 * GIB), ("80g", 80 * GIB), ("1.5TB", 1536 * GIB),
        ("40960MB", 40 * GIB), ("1024", 1024),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["80XB", "", "GB", "-5GB", "80 GB of it", "0GB", f"{10**400}GB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match=r"--gpu-memory .*as in 80GB"):
        parse_size(text)


def test_ranks_are_gpus_times_nodes() -> None:
    machine = machine_here(large(), gpus=8, nodes=4, gpu_memory="24GB")
    assert machine == Machine(32, 24 * GIB, on_cpu=False)
    for gpus, nodes in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="give 1 or more"):
            machine_here(large(), gpus=gpus, nodes=nodes, gpu_memory="24GB")


def test_ranks_without_a_gpu_share_the_memory_of_the_machine() -> None:
    config = large("device=cpu")
    one, two = (machine_here(config, gpus=n, nodes=1, gpu_memory=None) for n in (1, 2))
    assert one.on_cpu
    assert two.memory == pytest.approx(one.memory / 2, rel=0.2)


def test_what_is_left_out_of_rows() -> None:
    def rows(*overrides: str, **changes: Any) -> Rows:
        about = replace(architecture(large(*overrides).model), **changes)
        return replace(job(large(*overrides), 1), architecture=about).rows(shape)

    shape = Shape(8, 100, tokens=60, frames=360, labels=80, prefix=16)
    whole, cached = Rows(800, 100, 800), Rows(8 * 84, 100, 800)
    assert rows() == cached
    for switched in ("prefix_cache=off", "preset=plain"):
        assert rows(f"performance.{switched}") == whole
    assert rows("model.lora.rank=4") == whole
    assert rows(longest_row=100) == cached
    for window in (99, 0):
        assert rows(longest_row=window) == whole
    packed = "performance.packing=on"
    assert rows(packed) == Rows(8 * 84, 16 + 8 * 84, 16 + 8 * 84)
    assert rows(packed, "model.lora.rank=4") == Rows(800, 800, 800)
    assert rows(packed, "model.llm.attention=flash_attention_2") == cached


def test_a_prefix_in_memory_saves_its_positions() -> None:
    cached, whole = (
        parts(large(f"performance.prefix_cache={mode}"), 1, "ddp") for mode in ("auto", "off")
    )
    about, prefix = architecture(large().model).llm, assumed(large())[-1].prefix_tokens
    width = about.kv_heads * about.head_width
    assert cached["prefix"] == 2 * 2 * about.layers * prefix * width > whole["prefix"] == 0
    assert cached["activations"] + cached["prefix"] < whole["activations"]


def test_outputs_of_the_encoder_that_are_read_in_place_of_audio() -> None:
    shape = Shape(4, 200, tokens=60, frames=1500, labels=80)
    config = large("performance.encoder_cache=int8")
    read, heard = job(config, 1), job(large(), 1)
    assert moments(read, shape)[0].activations == 4 * 1500 * 1280 * 2
    assert moments(read, shape)[1:] == moments(heard, shape)[1:]
    assert estimate_memory(read, shape, "ddp")["batch"] == 4 * 1500 * 1280


def test_the_plain_path_is_advised_in_utterances() -> None:
    config = large("performance.preset=plain", "performance.plain_utterances=4")
    plan = plan_of(config, gpus=1, gib=24)
    assert plan.plain_utterances == 4
    longest = max(row_of(config, utterance).columns for utterance in assumed(config))
    vocabulary = architecture(config.model).llm.vocabulary
    assert plan.strategies["ddp"].parts["logits"] == 3 * 4 * 4 * longest * vocabulary
    most = plan.max_plain_utterances
    assert most is not None
    for count, fits in ((most, True), (most + 1, False)):
        tried = large("performance.preset=plain", f"performance.plain_utterances={count}")
        assert plan_of(tried, gpus=1, gib=24).strategies["ddp"].fits == fits
    assert plan.max_batch_tokens == most * longest


def test_logits_are_there_in_chunks_or_all_at_once() -> None:
    def logits(*overrides: str) -> int:
        shape = Shape(8, 500, tokens=300, frames=1500, labels=800)
        estimate = moments(job(large(*overrides), 1), shape)
        return max(moment.logits for moment in estimate)

    vocabulary = architecture(large().model).llm.vocabulary
    chunk = ("performance.logits_megabytes=64",)
    assert logits(*chunk, "precision=fp32") == 64 * 2**20
    assert logits(*chunk, "precision=bf16") == 96 * 2**20
    assert logits("precision=fp32") == min(512 * 2**20, 4 * 800 * vocabulary)
    assert logits("performance.preset=plain") == 3 * 4 * 4000 * vocabulary


@pytest.mark.parametrize(("on_cpu", "stored"), [(True, 4), (False, 2)])
def test_frozen_weights_of_fp16_are_stored_as_the_model_stores_them(
    on_cpu: bool, stored: int
) -> None:
    config = large("precision=fp16")
    found = job_of(config, architecture(config.model), Machine(1, 80 * GIB, on_cpu=on_cpu))
    assert found.setting.frozen == stored
    assert found.setting.attention == "sdpa"
