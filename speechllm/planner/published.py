"""The shapes of published models, for plans on a machine that does not have them.

Each entry holds what its `config.json` on the Hugging Face hub says
(https://huggingface.co/ID/blob/main/config.json), as far as sizes follow from it. Instruction-tuned
releases (`ID-Instruct`) have the shapes of their base models.
"""

from __future__ import annotations

from typing import Any


def _whisper(width: int, layers: int, heads: int, *, mels: int = 80) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "num_mel_bins": mels,
    }


def _llm(
    model_type: str,
    width: int,
    layers: int,
    heads: tuple[int, int],
    feed_forward: int,
    vocabulary: int,
    *,
    tied: bool,
) -> dict[str, Any]:
    """heads: of the queries, of the keys and values."""
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": feed_forward,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "openai/whisper-tiny.en": _whisper(384, 4, 6),
    "openai/whisper-base.en": _whisper(512, 6, 8),
    "openai/whisper-small.en": _whisper(768, 12, 12),
    "openai/whisper-medium.en": _whisper(1024, 24, 16),
    "openai/whisper-large-v3": _whisper(1280, 32, 20, mels=128),
    "allenai/OLMo-2-0425-1B": _llm("olmo2", 2048, 16, (16, 16), 8192, 100352, tied=False),
    "allenai/OLMo-2-1124-7B": _llm("olmo2", 4096, 32, (32, 32), 11008, 100352, tied=False),
    "meta-llama/Llama-3.2-1B": _llm("llama", 2048, 16, (32, 8), 8192, 128256, tied=True),
    "meta-llama/Llama-3.2-3B": _llm("llama", 3072, 28, (24, 8), 8192, 128256, tied=True),
    "meta-llama/Llama-3.1-8B": _llm("llama", 4096, 32, (32, 8), 14336, 128256, tied=False),
    "Qwen/Qwen2.5-0.5B": _llm("qwen2", 896, 24, (14, 2), 4864, 151936, tied=True),
    "Qwen/Qwen2.5-1.5B": _llm("qwen2", 1536, 28, (12, 2), 8960, 151936, tied=True),
    "Qwen/Qwen2.5-7B": _llm("qwen2", 3584, 28, (28, 4), 18944, 152064, tied=False),
    "HuggingFaceTB/SmolLM2-135M": _llm("llama", 576, 30, (9, 3), 1536, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _llm("llama", 960, 32, (15, 5), 2560, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _llm("llama", 2048, 24, (32, 32), 8192, 49152, tied=True),
}


def published(id: str) -> dict[str, Any] | None:
    """The shape of a model by its hub id, also of its instruction-tuned release."""
    return PUBLISHED.get(id.removesuffix("-Instruct"))
