"""Pretrained models and tokenizers from Hugging Face directories, frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.encoder import CHUNK_FRAMES
from speechllm.model.hub import resolve, weight_files


def load_tokenizer(llm: schema.LLM) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer; where it has no padding token, the end of sequence serves.

    Raises:
        ModelError: the model or its tokenizer cannot be found or read.
    """
    directory = resolve(llm.id, llm.revision)
    tokenizer = _load("tokenizer", directory, lambda: AutoTokenizer.from_pretrained(directory))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class WhisperEncoderHalf(WhisperEncoder):
    """Reads files that hold the decoder too, without a warning for each of its weights."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"proj_out\."]  # noqa: RUF012


def load_whisper_encoder(
    cfg: schema.WhisperEncoder, dtype: torch.dtype, device: torch.device
) -> WhisperEncoder:
    directory = resolve(cfg.id, cfg.revision)
    config = _load_config(directory)
    if config.model_type != "whisper":
        raise ModelError(
            f"{cfg.id} is a {config.model_type} model, not a Whisper; change model.encoder.id, "
            "or set model.encoder.kind=fbank."
        )
    if config.max_source_positions != CHUNK_FRAMES:
        raise ModelError(
            f"{cfg.id} has {config.max_source_positions} positions instead of {CHUNK_FRAMES} "
            "(30 s), unlike every released Whisper; use another model."
        )
    # Only the encoder's half is read. Its weights have one prefix or another in the file,
    # depending on the class that wrote it, and none in `WhisperEncoder`.
    return _load_weights(
        WhisperEncoderHalf,
        directory,
        device,
        dtype=dtype,
        attn_implementation="sdpa",
        key_mapping={r"^(model\.)?encoder\.": ""},
    )


def load_llm(cfg: schema.LLM, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    attention = cfg.attention
    if attention == "auto":
        # In bf16 on CPU, sdpa's backward takes a third of the training step at these lengths; in
        # fp32 sdpa is the faster one (6.8 against 5.9 utterances a second, AVX2, two cores).
        slow_sdpa = device.type == "cpu" and dtype == torch.bfloat16
        attention = "eager" if slow_sdpa else "sdpa"
    directory = resolve(cfg.id, cfg.revision)
    config = _load_config(directory)
    if config.is_encoder_decoder:
        raise ModelError(
            f"{cfg.id} is a {config.model_type} model with an encoder of its own; model.llm.id "
            "takes a causal (decoder-only) language model."
        )
    llm = _load_weights(
        AutoModelForCausalLM, directory, device, dtype=dtype, attn_implementation=attention
    )
    # The directory's sampling defaults (temperature, penalties, ...) would fill in whatever a call
    # of generate leaves open.
    llm.generation_config = GenerationConfig()
    return llm


def _load_weights(cls: Any, directory: Path, device: torch.device, **options: Any) -> Any:
    """A frozen pretrained model, every one of whose weights came from the file."""
    weight_files(directory)  # says better than transformers what is missing
    model, info = _load(
        "model",
        directory,
        lambda: cls.from_pretrained(
            directory, use_safetensors=True, output_loading_info=True, **options
        ),
    )
    lacking = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{directory}: {len(lacking)} weights of {type(model).__name__} are not in its "
            f"safetensors files or have another shape, so they would stay random: "
            f"{', '.join(lacking[:3])}, ... The files hold another architecture or other names."
        )
    return model.to(device).requires_grad_(False).eval()


def _load_config(directory: Path) -> Any:
    return _load("configuration", directory, lambda: AutoConfig.from_pretrained(directory))


def _load(what: str, directory: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory}: the {what} cannot be loaded: {error}") from error
