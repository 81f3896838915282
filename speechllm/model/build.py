"""From the configuration to the model, its tokenizer, and its identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn

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

from speechllm.config import schema
from speechllm.errors import ModelError
from speechllm.log import logger
from speechllm.model.connector import build_connector, out_length
from speechllm.model.ctc import CTCHead
from speechllm.model.encoder import CHUNK_FRAMES, FilterbankFrames, WhisperFrames
from speechllm.model.frontend import num_frames
from speechllm.model.hub import hash_text, hash_vocabulary, hash_weights, resolve, weight_files
from speechllm.model.speech_llm import SpeechLLM

__all__ = [
    "AudioTokens",
    "audio_token_counter",
    "bf16_is_fast",
    "build_model",
    "identity",
    "load_tokenizer",
    "missing",
    "resolve",
]

Count = TypeVar("Count", int, np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class AudioTokens:
    """Audio tokens of a number of samples: the function that planner, collator and model share."""

    connector: schema.Connector

    def __call__(self, num_samples: Count) -> Count:
        return out_length(self.connector, num_frames(num_samples))


def audio_token_counter(model: schema.Model) -> AudioTokens:
    """What tells the data side how many LLM positions an utterance takes; holds no weights."""
    return AudioTokens(model.connector)


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


def build_model(
    model: schema.Model,
    *,
    precision: Literal["fp32", "bf16"],
    device: torch.device,
    seed: int,
    ctc: bool = False,
) -> SpeechLLM:
    """The whole model on `device`, in train mode; only connector (and filterbank) train.

    Frozen weights are stored in bf16 where precision is bf16 (unless `frozen_dtype` says fp32) and
    read straight into that type; buffers such as the rotary frequencies stay fp32. What trains is
    fp32, a function of `seed` alone, the caller's random state is left as it was.

    `ctc` adds what the objective of that name needs: a copy of the LLM's token embeddings.

    Raises:
        ModelError: a model cannot be found or read, or does not hold the weights it should.
    """
    if precision == "bf16" and not bf16_is_fast(device):
        logger.warning(
            "this CPU has no bf16 instructions: bf16 takes 10 to 40 times as long as fp32 here. "
            "Set precision=fp32 (or auto)."
        )
    frozen = torch.bfloat16
    if precision == "fp32" or model.frozen_dtype == "fp32":
        frozen = torch.float32
    llm = _load_llm(model.llm, frozen, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _build_encoder(model.encoder, frozen, device)
        connector = build_connector(
            model.connector,
            encoder.width,
            _embeddings(llm).embedding_dim,
            out_rms=_embedding_rms(llm),
        ).to(device)
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    return SpeechLLM(
        encoder,
        connector,
        llm,
        compute_dtype=compute,
        ctc_head=CTCHead(_embeddings(llm).weight) if ctc else None,
    ).train()


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware.

    Measured on an AVX2-only CPU, GFLOP/s a core: fp32 60 forward and 74 for the input's gradient,
    bf16 9 and 2.
    """
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def identity(model: schema.Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, str]]:
    """What the trained weights belong to: `id`, `revision` and content `hash` of each part.

    Keys: encoder, llm, tokenizer, chat_template. The revision is the hub's commit, empty for local
    directories. Hashes do not depend on where the files lie; weights are sampled (`hash_weights`).

    Raises:
        ModelError: a model cannot be found or read.
    """
    llm = resolve(model.llm.id, model.llm.revision)
    named = {"id": model.llm.id, "revision": _commit(llm)}
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    return {
        "encoder": _encoder_identity(model.encoder),
        "llm": {**named, "hash": hash_weights(llm)},
        "tokenizer": {**named, "hash": hash_vocabulary(llm)},
        "chat_template": {**named, "hash": hash_text(template)},
    }


def missing(model: schema.Model) -> list[str]:
    """One line for each model that would have to be downloaded, or cannot be used; no network."""
    wanted = [("model.llm.id", model.llm.id, model.llm.revision)]
    if model.encoder.kind == "whisper":
        wanted.insert(0, ("model.encoder.id", model.encoder.id, model.encoder.revision))
    lines = []
    for key, id, revision in wanted:
        try:
            weight_files(resolve(id, revision, download=False))
        except ModelError as error:
            lines.append(f"{key}: {error}")
    return lines


class WhisperEncoderHalf(WhisperEncoder):
    """Reads files that hold the decoder too, without a warning for each of its weights."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"proj_out\."]  # noqa: RUF012


def _build_encoder(
    cfg: schema.Encoder, frozen: torch.dtype, device: torch.device
) -> WhisperFrames | FilterbankFrames:
    match cfg.kind:
        case "whisper":
            return WhisperFrames(_load_whisper_encoder(cfg, frozen, device), cfg.context).to(device)
        case "fbank":
            return FilterbankFrames(cfg.mels, cfg.hidden_size).to(device)


def _load_whisper_encoder(
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


def _load_llm(cfg: schema.LLM, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
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


def _embeddings(llm: PreTrainedModel) -> nn.Embedding:
    embeddings = llm.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return embeddings


def _embedding_rms(llm: PreTrainedModel) -> float:
    """Root mean square of the elements of the LLM's token embeddings, over 4,096 rows at most."""
    weight_VW = _embeddings(llm).weight.detach()
    rows = weight_VW[:: max(1, len(weight_VW) // 4096)].float()
    return float(rows.square().mean().sqrt())


def _encoder_identity(cfg: schema.Encoder) -> dict[str, str]:
    match cfg.kind:
        case "whisper":
            directory = resolve(cfg.id, cfg.revision)
            return {
                "id": cfg.id,
                "revision": _commit(directory),
                "hash": hash_weights(directory),
            }
        case "fbank":
            return {"id": "fbank", "revision": "", "hash": hash_text(cfg.model_dump_json())}


def _commit(directory: Path) -> str:
    """The commit of a snapshot in the hub's cache (.../snapshots/COMMIT), else empty."""
    return directory.name if directory.parent.name == "snapshots" else ""
