"""The tiny models load like released ones, and the same arguments give the same weights."""

from pathlib import Path

import torch

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import pytest

from speechllm.errors import UserError
from speechllm.model.tiny import TURN_END, build_tiny_llm, build_tiny_whisper


@pytest.mark.parametrize("mels", [80, 128])
def test_whisper_loads_with_its_feature_extractor(tmp_path: Path, mels: int) -> None:
    directory = build_tiny_whisper(tmp_path / "whisper", mels=mels)
    model = WhisperForConditionalGeneration.from_pretrained(directory)
    features = WhisperFeatureExtractor.from_pretrained(directory)(
        [[0.0] * 16000], sampling_rate=16000, return_tensors="pt"
    ).input_features
    assert features.shape == (1, mels, 3000)
    assert model.model.encoder(features).last_hidden_state.shape == (1, 1500, 64)


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen2"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_llm_and_tokenizer_agree(tmp_path: Path, kind: str, pad_is_eos: bool) -> None:
    directory = build_tiny_llm(tmp_path / kind, kind=kind, pad_is_eos=pad_is_eos)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == kind
    assert model.config.vocab_size == len(tokenizer) == 260
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id) is pad_is_eos
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "Příliš  žluťoučký\n kůň, 12 % 語"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert max(ids) < 256
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.encode(rendered, add_special_tokens=False)
    assert whole.count(tokenizer.convert_tokens_to_ids(TURN_END)) == 1
    assert model(torch.tensor([whole])).logits.shape == (1, len(whole), len(tokenizer))


def test_same_arguments_same_weights_and_random_state_untouched(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_tiny_llm(tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    second = build_tiny_llm(tmp_path / "b")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_existing_directory_is_kept_only_for_the_same_arguments(tmp_path: Path) -> None:
    directory = build_tiny_llm(tmp_path / "llm", layers=1)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_llm(tmp_path / "llm", layers=1) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another directory"):
        build_tiny_llm(tmp_path / "llm", layers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_unknown_family_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="llama, olmo2, qwen2"):
        build_tiny_llm(tmp_path / "llm", kind="gpt")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
