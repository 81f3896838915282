from __future__ import annotations

from typing import Any

import pytest
from speech_models import CONNECTORS, model_config, tiny_speech_llm

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.planner.architecture import read_architecture
from speechllm.planner.published import PUBLISHED, published

# What the models' own cards, papers or weight files say.
PARAMETERS = {
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


def whisper_encoder_parameters(width: int, layers: int, mels: int) -> int:
    """Counted by hand: two convolutions, 1,500 positions, layers, a norm."""
    convolutions = 3 * mels * width + width + 3 * width * width + width
    attention = 4 * width * width + 3 * width  # keys have no bias
    feed_forward = 2 * width * 4 * width + 5 * width
    layer = attention + feed_forward + 2 * 2 * width
    return convolutions + 1500 * width + layers * layer + 2 * width


def of(**model: Any) -> schema.Model:
    defaults = {"encoder": {"kind": "fbank"}, "llm": {"id": "random:llama"}}
    return schema.Model.model_validate({**defaults, **model})


@pytest.mark.parametrize("id", [id for id in PUBLISHED if "whisper" not in id])
def test_the_table_gives_the_published_number_of_parameters(id: str, offline: None) -> None:
    assert read_architecture(of(llm={"id": id})).llm.parameters == PARAMETERS[id]


@pytest.mark.parametrize("id", [id for id in PUBLISHED if "whisper" in id])
def test_the_table_gives_whisper_encoders(id: str, offline: None) -> None:
    about = read_architecture(of(encoder={"id": id})).whisper
    assert about is not None
    known = PUBLISHED[id]
    assert about.parameters == whisper_encoder_parameters(
        known["d_model"], known["encoder_layers"], known["num_mel_bins"]
    )
    assert (about.width, about.layers) == (known["d_model"], known["encoder_layers"])


def test_instruction_tuned_releases_have_the_shape_of_their_base() -> None:
    for id in PUBLISHED:
        assert published(f"{id}-Instruct") == published(id)
    assert published("somebody/else") is None


def test_an_unknown_model_is_refused_with_those_that_are_known(offline: None) -> None:
    with pytest.raises(ModelError, match=r"somebody/else.*OLMo-2.*config\.json"):
        read_architecture(of(llm={"id": "somebody/else"}))


@pytest.mark.parametrize("llm", ["random:llama", "random:olmo2", "random:qwen2"])
@pytest.mark.parametrize("connector", ["mlp", "transformer"])
def test_counts_are_those_of_the_model(llm: str, connector: str) -> None:
    cfg = model_config(llm=llm, connector=connector)
    about, model = read_architecture(cfg), tiny_speech_llm(cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (about.trained_parameters, about.frozen_parameters) == (trained, frozen)
    assert about.llm.head_parameters == (0 if llm == "random:qwen2" else 260 * 64)


@pytest.mark.parametrize(
    "extra",
    [
        {"lora": {"rank": 4}},
        {"lora": {"rank": 4, "targets": ["all-linear"]}},
        {"unfreeze_encoder_layers": 1},
    ],
)
def test_counts_with_more_that_trains(extra: dict[str, Any]) -> None:
    cfg = of(encoder={"id": "random:whisper"}, connector=CONNECTORS["mlp"], **extra)
    about, model = read_architecture(cfg), tiny_speech_llm(cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert (about.trained_parameters, about.frozen_parameters) == (trained, frozen)


def test_the_filterbank_trains() -> None:
    cfg = of(connector=CONNECTORS["linear"])
    model = tiny_speech_llm(cfg)
    about = read_architecture(cfg)
    assert about.whisper is None
    assert about.trained_parameters == sum(p.numel() for p in model.trainable_parameters().values())


@pytest.mark.parametrize(("model", "why"), [
    ({"llm": {"id": "random:whisper"}}, "random:whisper is a whisper model with an encoder"),
    ({"encoder": {"id": "random:llama"}}, "random:llama is a llama model, not a Whisper"),
    ({"lora": {"rank": 4, "targets": ["qkv"]}}, "no linear layer .* is called qkv; there are"),
    ({"encoder": {"id": "random:whisper"}, "unfreeze_encoder_layers": 9}, "has only 2 encoder"),
])  # fmt: skip
def test_what_training_refuses_is_refused(model: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        read_architecture(of(**model))
