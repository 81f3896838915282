"""From the configuration to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import nn

from transformers import PreTrainedModel

from speechllm.config import model as schema
from speechllm.config.performance import Performance
from speechllm.errors import ModelError
from speechllm.log import logger
from speechllm.model.adapt import add_lora, unfreeze_last_layers
from speechllm.model.connector import build_connector, out_length
from speechllm.model.ctc import CTCHead
from speechllm.model.encoder import CHUNK_FRAMES, FilterbankFrames, WhisperFrames
from speechllm.model.frontend import num_frames
from speechllm.model.hub import resolve
from speechllm.model.layers import checkpoint_activations, compile_in_place, transformer_layers
from speechllm.model.pretrained import load_llm, load_whisper_encoder
from speechllm.model.speech_llm import SpeechLLM
from speechllm.model.weights import WeightFiles

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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


def build_model(
    model: schema.Model,
    *,
    precision: Literal["fp32", "bf16", "fp16"],
    device: torch.device,
    seed: int,
    performance: Performance | None = None,
    prefix: Sequence[int] = (),
    ctc: bool = False,
    frozen_on_meta: bool = False,
    activation_checkpointing: bool = False,
    compile_layers: bool = False,
) -> SpeechLLM:
    """The whole model on `device`, in train mode. What trains: the connector, the filterbank where
    that is the encoder, and what `model.lora` and `model.unfreeze_encoder_layers` ask for.

    Frozen weights are stored in bf16 where precision is not fp32 (unless `frozen_dtype` says fp32)
    and read straight into that type; buffers such as the rotary frequencies stay fp32. What trains
    is fp32, a function of `seed` alone, the caller's random state is left as it was.

    `performance` asks for shortcuts; by default for all that hold. `prefix` is with what tokens the
    run's examples begin. `ctc` adds what the objective of that name needs: a copy of the LLM's
    token embeddings. `frozen_on_meta` leaves the frozen weights without storage, for a strategy
    that reads its own share of them from `speechllm.model.weights.WeightFiles`.
    `activation_checkpointing` and `compile_layers` change neither names nor results.

    Raises:
        ModelError: a model cannot be found or read, does not hold the weights it should, or cannot
            do what the configuration asks of it.
        ConfigError: `compile_layers` without a C++ compiler, a shortcut that cannot be had.
    """
    if precision != "fp32" and not bf16_is_fast(device):
        logger.warning(
            "this CPU has no bf16 instructions: %s takes 10 to 40 times as long as fp32 here. "
            "Set precision=fp32 (or auto).",
            precision,
        )
    frozen = frozen_type(model, precision, device)
    llm = load_llm(model.llm, frozen, device, weights_on_meta=frozen_on_meta)
    # Read from the file: the model's own may be on meta, or another rank's.
    files = WeightFiles(resolve(model.llm.id, model.llm.revision))
    embeddings, width = _embeddings(llm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(
            model.encoder,
            frozen,
            device,
            unfrozen_layers=model.unfreeze_encoder_layers,
            weights_on_meta=frozen_on_meta,
        )
        connector = build_connector(
            model.connector, encoder.width, width, out_rms=_rms(files, embeddings)
        ).to(device)
        if model.lora.rank:
            add_lora(llm, model.lora, device)
    if compile_layers:
        compile_in_place([connector, *transformer_layers(encoder), *transformer_layers(llm)])
    return SpeechLLM(
        encoder,
        connector,
        llm,
        compute_dtype=COMPUTE_DTYPES[precision],
        ctc_head=CTCHead(files.read(embeddings).to(device, frozen)) if ctc else None,
        checkpointed=_checkpointed_layers(encoder, llm) if activation_checkpointing else (),
        compiled=compile_layers,
        performance=performance,
        prefix=prefix,
        tokens_of_chunk=out_length(model.connector, CHUNK_FRAMES),
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


def frozen_type(
    model: schema.Model, precision: Literal["fp32", "bf16", "fp16"], device: torch.device
) -> torch.dtype:
    """In which type frozen weights are stored."""
    # On a CPU, layer norms of bf16 weights refuse the fp16 that autocast hands them.
    fp16_on_cpu = precision == "fp16" and device.type == "cpu"
    if precision == "fp32" or fp16_on_cpu or model.frozen_dtype == "fp32":
        return torch.float32
    return torch.bfloat16


def build_encoder(
    cfg: schema.Encoder,
    frozen: torch.dtype,
    device: torch.device,
    *,
    unfrozen_layers: int = 0,
    weights_on_meta: bool = False,
) -> WhisperFrames | FilterbankFrames:
    """The encoder alone, its frozen weights of that type. Raises ModelError, as `build_model`."""
    match cfg.kind:
        case "whisper":
            whisper = load_whisper_encoder(cfg, frozen, device, weights_on_meta=weights_on_meta)
            if unfrozen_layers:
                files = WeightFiles(resolve(cfg.id, cfg.revision))
                unfreeze_last_layers(whisper, unfrozen_layers, files, device)
            frames = WhisperFrames(whisper, cfg.context)
            frames.log_mel.to(device)
            return frames
        case "fbank":
            if unfrozen_layers:
                raise ModelError(
                    f"model.unfreeze_encoder_layers is {unfrozen_layers}, but "
                    "model.encoder.kind=fbank has no layers and trains as a whole; set "
                    "model.unfreeze_encoder_layers=0."
                )
            return FilterbankFrames(cfg.mels, cfg.hidden_size).to(device)


def _checkpointed_layers(
    encoder: WhisperFrames | FilterbankFrames, llm: PreTrainedModel
) -> list[nn.Module]:
    """Those that keep activations: all of the LLM, and of a Whisper the ones that train."""
    layers = checkpoint_activations(llm)
    if isinstance(encoder, WhisperFrames):
        of_encoder = checkpoint_activations(encoder.encoder)
        layers += [x for x in of_encoder if any(p.requires_grad for p in x.parameters())]
    return layers


def _embeddings(llm: PreTrainedModel) -> tuple[str, int]:
    """Name and width of the LLM's table of input embeddings."""
    table = llm.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    name = next(name for name, module in llm.named_modules() if module is table)
    return f"{name}.weight", table.embedding_dim


def _rms(files: WeightFiles, embeddings: str) -> float:
    """Root mean square of the elements, over 4,096 to 8,191 rows if there are as many."""
    rows = files.read(embeddings, step=max(1, files.shape(embeddings)[0] // 4096)).float()
    return float(rows.square().mean().sqrt())
