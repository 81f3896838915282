"""Tiny models and batches for tests of the model, without any of the data side's loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from speechllm.config import model as schema
from speechllm.data.collate import collate
from speechllm.model.build import audio_token_counter, build_model
from speechllm.model.speech_llm import SpeechLLM
from speechllm.types import AudioSegment, Batch, Example, Segment, TextSegment

CPU = torch.device("cpu")
END, PAD = 257, 258  # <|im_end|> and <|pad|> of the tiny tokenizer
PREFIX, SUFFIX = (5, 6, 7), (8, 9)

CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "downsampling_factor": 5},
    "mlp": {"kind": "mlp", "downsampling_factor": 4, "hidden_size": 48},
    "conv1d": {"kind": "conv1d", "downsampling_factor": 3, "kernel_size": 7, "hidden_size": 32},
    "conv1d_short": {
        "kind": "conv1d", "downsampling_factor": 8, "kernel_size": 3, "hidden_size": 32,
    },
    "transformer": {
        "kind": "transformer", "downsampling_factor": 6, "hidden_size": 32, "num_heads": 4,
        "intermediate_size": 64, "num_layers": 2, "dropout": 0.0,
    },
}  # fmt: skip


def model_config(
    *, llm: str = "random:llama", connector: str = "mlp", encoder: dict[str, Any] | None = None
) -> schema.Model:
    return schema.Model.model_validate(
        {
            "encoder": encoder or {"id": "random:whisper"},
            "llm": {"id": llm},
            "connector": CONNECTORS[connector],
        }
    )


def tiny_speech_llm(
    cfg: schema.Model, *, precision: Literal["fp32", "bf16"] = "fp32", seed: int = 1
) -> SpeechLLM:
    return build_model(cfg, precision=precision, device=CPU, seed=seed)


def noise(num_samples: int, *, seed: int = 0, amplitude: float = 3000.0) -> np.ndarray:
    """int16 [N]."""
    rng = np.random.default_rng([3, seed])
    return (rng.standard_normal(num_samples) * amplitude).clip(-32768, 32767).astype(np.int16)


def asr(samples: np.ndarray, target: Sequence[int], *, prefix: Sequence[int] = PREFIX) -> Example:
    """Prefix, audio, suffix, and unless it is empty a trained target with its end token."""
    segments: list[Segment] = [
        TextSegment(tuple(prefix)), AudioSegment(samples), TextSegment(SUFFIX)
    ]  # fmt: skip
    if target:
        segments.append(TextSegment((*target, END), trained=True))
    return Example("key", tuple(segments))


def batch_of(
    cfg: schema.Model, examples: Sequence[Example], *, pad_left: bool = False, pad_id: int = PAD
) -> Batch:
    return collate(examples, audio_token_counter(cfg), pad_id=pad_id, pad_left=pad_left)
