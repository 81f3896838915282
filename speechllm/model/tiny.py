"""Tiny random models as ordinary Hugging Face directories, built in code without any download.

Unit tests and `configs/tiny.yaml` use them where a pretrained model would only cost time. The
weights are a function of the arguments alone (own seed, the caller's random state is restored).
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from speechllm.errors import UserError

SEED = 20240229
TURN_START, TURN_END, PAD, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|pad|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ARGUMENTS = "tiny.json"  # what the directory was built with
MAX_SOURCE_POSITIONS = 1500  # 30 s at 50 frames a second, as in every released Whisper


def build_tiny_whisper(
    directory: Path, *, hidden: int = 64, layers: int = 2, heads: int = 4, mels: int = 80
) -> Path:
    """Write a random Whisper (weights, configuration, feature extractor) into `directory`.

    A directory that the same arguments have built before is returned as it is. The vocabulary is
    64 entries and there is no text tokenizer: the encoder is what is wanted, the decoder is there
    so that `WhisperForConditionalGeneration` loads it.

    Args:
        directory: where the Hugging Face directory appears, whole or not at all.
        hidden: width of encoder and decoder, a multiple of `heads`.
        mels: mel bins of the feature extractor, 80 (tiny to large-v2) or 128 (large-v3).

    Raises:
        UserError: `directory` holds something else.
    """

    def write(aside: Path) -> None:
        config = WhisperConfig(
            vocab_size=64,
            num_mel_bins=mels,
            d_model=hidden,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=4 * hidden,
            decoder_ffn_dim=4 * hidden,
            max_source_positions=MAX_SOURCE_POSITIONS,
            max_target_positions=64,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=1,
            decoder_start_token_id=2,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
        _save(_seeded(lambda: WhisperForConditionalGeneration(config)), aside)
        WhisperFeatureExtractor(feature_size=mels).save_pretrained(aside)

    arguments = {"kind": "whisper", "hidden": hidden, "layers": layers, "heads": heads}
    return _build(Path(directory), write, {**arguments, "mels": mels})


def build_tiny_llm(
    directory: Path,
    *,
    kind: Literal["llama", "olmo2", "qwen2"] = "llama",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    pad_is_eos: bool = False,
) -> Path:
    """Write a random causal LLM and its byte-level chat tokenizer into `directory`.

    A directory that the same arguments have built before is returned as it is. The vocabulary is
    the 256 bytes and four special tokens, so every text can be encoded and
    `decode(encode(text)) == text`. The end of a turn `<|im_end|>` is also the end of the sequence.
    Llama and OLMo-2 have an output matrix of their own, Qwen2 ties it to the embedding.

    Args:
        directory: where the Hugging Face directory appears, whole or not at all.
        kind: the family of the model.
        pad_is_eos: let padding and end of turn share one token, as in many released chat models.

    Raises:
        UserError: `kind` is not one of the three families, or `directory` holds something else.
    """

    def write(aside: Path) -> None:
        tokenizer = _byte_tokenizer(pad_is_eos)
        common: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": 4096,
            "bos_token_id": tokenizer.convert_tokens_to_ids(TURN_START),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        _save(_seeded(lambda: _llm(kind, common)), aside)
        tokenizer.save_pretrained(aside)

    arguments = {"kind": kind, "hidden": hidden, "layers": layers, "heads": heads}
    return _build(Path(directory), write, {**arguments, "pad_is_eos": pad_is_eos})


def _llm(kind: str, common: dict[str, Any]) -> PreTrainedModel:
    match kind:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False))
        case "olmo2":
            return Olmo2ForCausalLM(Olmo2Config(**common, tie_word_embeddings=False))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))
        case _:
            raise UserError(f"kind is {kind!r}, but must be one of: llama, olmo2, qwen2")


def _byte_tokenizer(pad_is_eos: bool) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: 256 byte tokens, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    # In this order they get the ids 256 to 259. No byte is unknown, but Qwen2's tokenizer class
    # adds the token for it when it is missing, with an id beyond the embedding.
    core.add_special_tokens([TURN_START, TURN_END, PAD, UNKNOWN])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=TURN_END if pad_is_eos else PAD,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def _save(model: PreTrainedModel, directory: Path) -> None:
    """As the model's `save_pretrained`, which among several ranks writes on the first alone."""
    model.config.save_pretrained(directory)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _seeded(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """`make()` under the fixed seed; the caller's CPU random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make()


def _build(directory: Path, write: Callable[[Path], None], arguments: dict[str, Any]) -> Path:
    """Run `write` on a temporary sibling and rename it; whoever comes second keeps the first's."""
    if directory.exists():
        return _same(directory, arguments)
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = directory.parent / f".{directory.name}-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        write(aside)
        (aside / ARGUMENTS).write_text(json.dumps({**arguments, "seed": SEED}), encoding="utf-8")
        os.rename(aside, directory)
    except OSError:
        if not directory.exists():
            raise
        return _same(directory, arguments)  # another process finished the same one meanwhile
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def _same(directory: Path, arguments: dict[str, Any]) -> Path:
    file = directory / ARGUMENTS
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if found != {**arguments, "seed": SEED}:
        raise UserError(
            f"{directory} is not the tiny model asked for ({arguments}; found: {found}). "
            "Choose another directory or remove this one."
        )
    return directory
