"""ds_configs/*.json are read; whatever else a DeepSpeed file may hold is refused with a remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from speechllm.config.fields import all_keys
from speechllm.errors import ConfigError
from speechllm.strategy.zero_config import OWNERS, ZeRO, read_zero_config

ROOT = Path(__file__).parents[2]


def written(directory: Path, content: Any) -> str:
    file = directory / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **settings}}


@pytest.mark.parametrize(
    ("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)]
)
def test_the_shipped_files_are_read(name: str, stage: int) -> None:
    content = read_zero_config(str(ROOT / "ds_configs" / f"{name}.json"))
    assert content.keys() == {"zero_optimization"}
    assert content["zero_optimization"]["stage"] == stage
    offloaded = {"offload_param", "offload_optimizer"} <= content["zero_optimization"].keys()
    assert offloaded == (name == "zero3_offload")


def test_what_deepspeed_takes_for_a_whole_number_is_read(tmp_path: Path) -> None:
    content = zero(reduce_bucket_size=5e8, offload_optimizer={"device": "cpu"})
    assert read_zero_config(written(tmp_path, content)) == content


@pytest.mark.parametrize("key", OWNERS)
def test_a_key_that_is_ours_is_refused_with_its_owner(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_zero_config(written(tmp_path, {**zero(), key: 1}))
    assert str(caught.value).startswith(f"{tmp_path / 'ds.json'}: {key} belongs to {OWNERS[key]};")


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("train_batch_size", "data.microbatches_per_step"),
        ("train_micro_batch_size_per_gpu", "data.microbatch_tokens"),
        ("gradient_clipping", "optim.max_grad_norm"),
        ("scheduler", "optim.schedule"),
        ("bf16", "precision"),
        ("torch_autocast", "precision"),
        ("steps_per_print", "train.log_every"),
        ("activation_checkpointing", "train.activation_checkpointing"),
        ("compile", "train.compile"),
    ],
)
def test_the_owner_named_is_a_key_of_the_configuration(key: str, owner: str) -> None:
    assert OWNERS[key].startswith(owner)
    assert owner in all_keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "zero_optimization"]),
        ({**zero(), "gradient_cliping": 1.0}, ["gradient_cliping", "mean gradient_clipping?"]),
        ({**zero(), "flops_profiler": {}}, ["flops_profiler", "nothing else"]),
        ({}, ["zero_optimization is missing", '"stage": 2', "ds_configs/"]),
        ({"zero_optimization": True}, ["zero_optimization: expected a section", "True"]),
        ({"zero_optimization": {}}, ["stage: 0", "strategy.kind=ddp"]),
        (zero(stage=0), ["stage: 0", "no gradient norm", "strategy.kind=ddp"]),
        (zero(stage=4), ["zero_optimization.stage", "1, 2 or 3", "got 4"]),
        (zero(stage="3"), ["zero_optimization.stage", "1, 2 or 3", "got '3'"]),
        (zero(reduce_bucket_sise=1), ["reduce_bucket_sise", "did you mean reduce_bucket_size?"]),
        (zero(round_robin_gradients=True), ["round_robin_gradients: not served"]),
        (zero(zero_quantized_weights=True), ["zero_quantized_weights", "not served; known: stage"]),
        (zero(reduce_bucket_size="auto"), ["reduce_bucket_size", "Hugging Face Trainer", "leave"]),
        (zero(reduce_bucket_size=0), ["reduce_bucket_size", "greater than 0", "got 0"]),
        (zero(overlap_comm="sometimes"), ["overlap_comm", "boolean", "got 'sometimes'"]),
        (
            zero(offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
            [
                "offload_optimizer.device",
                "'none' or 'cpu'",
                "got 'nvme'",
                "nvme_path",
                "known: dev",
            ],
        ),
        (zero(offload_optimizer={"device": "cpu", "pin_memry": 1}), ["mean pin_memory?"]),
        (zero(offload_optimizer={}), ["offload_optimizer.device", "required"]),
        (zero(offload_param={"device": "cpu"}), ["offload_param wants stage 3", "stage 2"]),
        ("[1]", ["expected an object", "zero_optimization"]),
        ('{"zero_optimization": {"stage": 2,}}', [":1:35: not valid JSON"]),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(
    content: Any, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_zero_config(written(tmp_path, content))
    assert str(caught.value).startswith(str(tmp_path / "ds.json"))
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero9\.json: no such file; there are .*zero1\.json"):
        read_zero_config(str(ROOT / "ds_configs" / "zero9.json"))
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_zero_config(str(tmp_path))


def test_every_setting_that_is_served_is_one_of_deepspeed_with_its_default() -> None:
    code = (
        "import json; from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as Theirs\n"
        "fields = {f.alias or n: f.default for n, f in Theirs.model_fields.items()}\n"
        "print(json.dumps(fields, default=str))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    theirs = json.loads(printed.splitlines()[-1])
    for name, field in ZeRO.model_fields.items():
        assert name in theirs
        assert name == "stage" or field.default == theirs[name]
