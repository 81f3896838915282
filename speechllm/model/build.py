"""From the configuration to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from transformers import PreTrainedModel

from speechllm.config import model as schema
from speechllm.log import logger
from speechllm.model.connector import build_connector, out_length
from speechllm.model.ctc import CTCHead
from speechllm.model.encoder import FilterbankFrames, WhisperFrames
from speechllm.model.frontend import num_frames
from speechllm.model.hub import resolve
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
    ctc: bool = False,
    frozen_on_meta: bool = False,
) -> SpeechLLM:
    """The whole model on `device`, in train mode; only connector (and filterbank) train.

    Frozen weights are stored in bf16 where precision is not fp32 (unless `frozen_dtype` says fp32)
    and read straight into that type; buffers such as the rotary frequencies stay fp32. What trains
    is fp32, a function of `seed` alone, the caller's random state is left as it was.

    `ctc` adds what the objective of that name needs: a copy of the LLM's token embeddings.
    `frozen_on_meta` leaves the frozen weights without storage, for a strategy that reads its own
    share of them from `speechllm.model.weights.WeightFiles`.

    Raises:
        ModelError: a model cannot be found or read, or does not hold the weights it should.
    """
    if precision != "fp32" and not bf16_is_fast(device):
        logger.warning(
            "this CPU has no bf16 instructions: %s takes 10 to 40 times as long as fp32 here. "
            "Set precision=fp32 (or auto).",
            precision,
        )
    frozen = torch.bfloat16
    if precision == "fp32" or model.frozen_dtype == "fp32":
        frozen = torch.float32
    place = torch.device("meta") if frozen_on_meta else device
    llm = load_llm(model.llm, frozen, place)
    embeddings_VW = _read_embeddings(llm, model.llm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _build_encoder(model.encoder, frozen, place, device)
        connector = build_connector(
            model.connector,
            encoder.width,
            embeddings_VW.shape[1],
            out_rms=_rms(embeddings_VW),
        ).to(device)
    return SpeechLLM(
        encoder,
        connector,
        llm,
        compute_dtype=COMPUTE_DTYPES[precision],
        ctc_head=CTCHead(embeddings_VW.to(device, frozen)) if ctc else None,
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


def _build_encoder(
    cfg: schema.Encoder, frozen: torch.dtype, place: torch.device, device: torch.device
) -> WhisperFrames | FilterbankFrames:
    """A Whisper's frozen weights in `place`, all that is not a frozen weight on `device`."""
    match cfg.kind:
        case "whisper":
            whisper = load_whisper_encoder(cfg, frozen, place)
            frames = WhisperFrames(whisper, cfg.context)
            frames.log_mel.to(device)
            return frames
        case "fbank":
            return FilterbankFrames(cfg.mels, cfg.hidden_size).to(device)


def _read_embeddings(llm: PreTrainedModel, cfg: schema.LLM) -> Tensor:
    """[V, W] on the CPU, from the file: the model's own may be on meta, or another rank's."""
    table = llm.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    name = next(name for name, module in llm.named_modules() if module is table)
    return WeightFiles(resolve(cfg.id, cfg.revision)).read(f"{name}.weight")


def _rms(embeddings_VW: Tensor) -> float:
    """Root mean square of the elements, over 4,096 rows at most."""
    rows = embeddings_VW[:: max(1, len(embeddings_VW) // 4096)].float()
    return float(rows.square().mean().sqrt())
