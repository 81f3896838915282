"""Pretrained models and tokenizers from Hugging Face directories, frozen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.attention import GROUPED, register
from speechllm.model.encoder import CHUNK_FRAMES
from speechllm.model.families import KNOWN
from speechllm.model.hub import resolve, weight_files
from speechllm.model.weights import WeightFiles

UNSHARDED = "use strategy.kind=ddp, or deepspeed with ds_configs/zero3.json, which load it whole"


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
    cfg: schema.WhisperEncoder,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weights_on_meta: bool = False,
) -> WhisperEncoder:
    """The encoder half, frozen, on `device`; its weights without storage where so asked.

    Raises:
        ModelError: it cannot be found or read, or does not hold the weights it should.
    """
    directory = resolve(cfg.id, cfg.revision)
    config = _load_config(directory)
    refuse_no_whisper(cfg.id, config)
    if config.max_source_positions != CHUNK_FRAMES:
        raise ModelError(
            f"{cfg.id} has {config.max_source_positions} positions instead of {CHUNK_FRAMES} "
            "(30 s), unlike every released Whisper; use another model."
        )
    if weights_on_meta:
        return _without_weights(
            WhisperEncoderHalf._from_config,
            directory,
            device,
            dtype=dtype,
            attn_implementation="sdpa",
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


def usual_attention(device: torch.device, dtype: torch.dtype) -> Literal["eager", "sdpa"]:
    """The kernel to take where nothing was measured, by the type of the LLM's weights.

    In bf16 on CPU, sdpa's backward takes a third of the training step at these lengths; in fp32
    sdpa is the faster one (6.8 against 5.9 utterances a second, AVX2, two cores).
    """
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def load_llm(
    cfg: schema.LLM, dtype: torch.dtype, device: torch.device, *, weights_on_meta: bool = False
) -> PreTrainedModel:
    """The LLM, frozen, on `device`; its weights without storage where so asked.

    Raises:
        ModelError: it cannot be found or read, or does not hold the weights it should.
    """
    attention = cfg.attention if cfg.attention != "auto" else usual_attention(device, dtype)
    directory = resolve(cfg.id, cfg.revision)
    config = _load_config(directory)
    refuse_no_decoder(cfg.id, config)
    if attention == GROUPED and config.model_type not in KNOWN:
        raise ModelError(
            f"model.llm.attention=grouped: not tested with a {config.model_type} model such as "
            f"{cfg.id}; set it to eager or sdpa"
        )
    register()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if weights_on_meta:
        make = AutoModelForCausalLM.from_config
        llm = _without_weights(make, directory, device, **options)
    else:
        llm = _load_weights(AutoModelForCausalLM, directory, device, **options)
    # The directory's sampling defaults (temperature, penalties, ...) would fill in whatever a call
    # of generate leaves open.
    llm.generation_config = GenerationConfig()
    return llm


def refuse_no_whisper(id: str, config: PreTrainedConfig) -> None:
    """Raise ModelError for the configuration of another kind of model."""
    if config.model_type != "whisper":
        raise ModelError(
            f"{id} is a {config.model_type} model, not a Whisper; change model.encoder.id, "
            "or set model.encoder.kind=fbank."
        )


def refuse_no_decoder(id: str, config: PreTrainedConfig) -> None:
    """Raise ModelError for the configuration of a model that is more than a decoder."""
    if config.is_encoder_decoder:
        raise ModelError(
            f"{id} is a {config.model_type} model with an encoder of its own; model.llm.id "
            "takes a causal (decoder-only) language model."
        )


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
        raise _lacking(directory, model, lacking)
    return model.to(device).requires_grad_(False).eval()


def _without_weights(
    make: Callable[..., Any], directory: Path, device: torch.device, **options: Any
) -> Any:
    """A frozen model whose parameters are on meta and all in the files; buffers are on `device`."""
    config = _load_config(directory)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{directory}: a quantised model cannot be sharded; {UNSHARDED}.")
    files = WeightFiles(directory)
    with torch.device("meta"):
        model = _load("configuration", directory, lambda: make(config, **options))
    lacking = []
    names = defaultdict(list)  # several where it is tied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for parameter, aliases in names.items():
        stored = [files.shape(name) for name in aliases if name in files]
        if stored[:1] != [tuple(parameter.shape)]:
            lacking.append(f"{aliases[0]} {tuple(parameter.shape)}")
    if lacking:
        raise _lacking(directory, model, sorted(lacking), f" If they are right, {UNSHARDED}.")
    ready_buffers(model, device)
    for name in model.state_dict().keys() & dict(model.named_buffers()).keys():
        model.get_buffer(name).copy_(files.read(name))
    return model.requires_grad_(False).eval()


def ready_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Put the buffers of a model that was built on meta on `device`, with what belongs in them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # computes the buffers; the parameters have nothing to be drawn into


def _lacking(directory: Path, model: nn.Module, names: list[str], remedy: str = "") -> ModelError:
    return ModelError(
        f"{directory}: {len(names)} weights of {type(model).__name__} are not in its safetensors "
        f"files or have another shape, so they would stay random: {', '.join(names[:3])}, ... The "
        f"files hold another architecture or other names.{remedy}"
    )


def _load_config(directory: Path) -> Any:
    return _load("configuration", directory, lambda: AutoConfig.from_pretrained(directory))


def _load(what: str, directory: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory}: the {what} cannot be loaded: {error}") from error
