"""Floating-point operations that a training step needs, and how many the machine can do.

A product of [m, k] and [k, n] counts 2 m k n. Frozen weights need the gradient of their input and
none of their own; what trains needs both. Attention counts the pairs that a causal mask leaves.
Only what is needed counts: no padding, the prompt's common prefix not at all where the LLM is
frozen (its keys and values are known), the output matrix at trained positions. So the count
belongs to the utterances and not to the way they are run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from speechllm.config import model as schema
from speechllm.planner.activations import CHUNK_FRAMES
from speechllm.planner.architecture import Architecture, Transformer

LAYERS = 4  # whose weights are used in turn: more than the cache next to a core holds
SQUARES = (2048,)
SQUARES_CUDA = (4096, 8192)


@dataclass(frozen=True)
class Row:
    """Lengths of one example: encoder frames, audio tokens, LLM positions without the common
    prefix, positions of that prefix, trained positions."""

    frames: int
    tokens: int
    positions: int
    prefix: int
    labels: int


def count_flops(about: Architecture, rows: Sequence[Row]) -> dict[str, int]:
    """Of forward and backward, by part: encoder, connector, llm (without its head), head."""
    return {
        "encoder": sum(_encoder(about, row) for row in rows),
        "connector": sum(_connector(about, row) for row in rows),
        "llm": sum(_llm(about, row) for row in rows),
        "head": sum(4 * about.llm.width * about.llm.vocabulary * row.labels for row in rows),
    }


def products(llm: Transformer) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices of one decoder layer."""
    queries, keys = llm.heads * llm.head_width, llm.kv_heads * llm.head_width
    into = [(llm.width, llm.feed_forward)] * (2 if llm.gated else 1)
    attention = [(llm.width, queries), (llm.width, keys), (llm.width, keys), (queries, llm.width)]
    return [*attention, *into, (llm.feed_forward, llm.width)]


def _llm(about: Architecture, row: Row) -> int:
    """The gradient of keys and values of the prefix is not needed."""
    llm, n = about.llm, row.positions
    linear = 2 * 2 * n * sum(inputs * outputs for inputs, outputs in products(llm))
    own, with_prefix = n * (n + 1) // 2, n * row.prefix
    attention = 4 * llm.heads * llm.head_width * (3 * own + 2 * with_prefix)
    return llm.layers * (linear + attention) + 6 * n * about.lora_parameters


def _encoder(about: Architecture, row: Row) -> int:
    whisper = about.whisper
    if whisper is None:  # a filterbank's projection, which trains
        return 4 * row.frames * 2 * about.filterbank_mels * about.frame_width
    d = whisper.width
    flops = row.frames * (2 * 2 * 3 * whisper.mels * d + 2 * 3 * d * d)
    chunks, rest = divmod(row.frames, CHUNK_FRAMES)
    layer = sum(
        t * 2 * (4 * d * d + 2 * d * whisper.feed_forward) + 4 * t * t * d
        for t in [CHUNK_FRAMES] * chunks + [rest]
    )
    return flops + (whisper.layers + 2 * about.unfrozen_layers) * layer


def _connector(about: Architecture, row: Row) -> int:
    """The gradient of its input is needed only where the encoder trains, which is left out."""
    cfg, width = about.connector, about.llm.width
    match cfg.kind:
        case "linear":
            first, others, attention = cfg.downsampling_factor * about.frame_width * width, 0, 0
        case "mlp":
            first = cfg.downsampling_factor * about.frame_width * cfg.hidden_size
            others, attention = cfg.hidden_size * width, 0
        case "conv1d":
            first = cfg.kernel_size * about.frame_width * cfg.hidden_size
            others, attention = cfg.hidden_size * width, 0
        case "transformer":
            first, others, attention = _transformer_connector(cfg, about.frame_width, width)
    return row.tokens * (4 * first + 6 * others) + 12 * row.tokens**2 * attention


def _transformer_connector(
    cfg: schema.TransformerConnector, frame_width: int, width: int
) -> tuple[int, int, int]:
    layer = 4 * cfg.hidden_size**2 + 2 * cfg.hidden_size * cfg.intermediate_size
    others = cfg.num_layers * layer + cfg.hidden_size * width
    return (
        cfg.downsampling_factor * frame_width * cfg.hidden_size,
        others,
        cfg.num_layers * cfg.hidden_size,
    )


def gemm_rates(
    about: Transformer, rows: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """FLOP/s of the products of a decoder layer, forward and gradient of the input, for so many
    rows (tokens of a microbatch), each matrix by itself and at its best of three; and of the
    machine's best square product."""
    return {
        "shapes": {str(n): layer_rate(about, n, dtype, device) for n in rows},
        "best": best_rate(dtype, device),
    }


def layer_rate(llm: Transformer, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s over the products of a layer together."""
    seconds, flops = 0.0, 0
    for inputs, outputs in products(llm):
        weights = torch.randn(LAYERS, outputs, inputs, device=device, dtype=dtype)
        x, dy = (torch.randn(rows, n, device=device, dtype=dtype) for n in (inputs, outputs))
        seconds += _best(lambda w: functional.linear(x, w), weights)  # noqa: B023
        seconds += _best(lambda w: dy @ w, weights)  # noqa: B023
        flops += 2 * 2 * rows * inputs * outputs
    return flops / seconds


def best_rate(dtype: torch.dtype, device: torch.device) -> float:
    rates = []
    for n in SQUARES_CUDA if device.type == "cuda" else SQUARES:
        x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * n**3 / _best(lambda w: x @ w, w[None]))  # noqa: B023
    return max(rates)


def _best(product: Callable[[torch.Tensor], torch.Tensor], weights: torch.Tensor) -> float:
    """Seconds of one product, the best of three sweeps over the weights."""
    found = []
    for _ in range(4):  # the first one warms up
        _wait(weights.device)
        begun = time.perf_counter()
        for w in weights:
            product(w)
        _wait(weights.device)
        found.append((time.perf_counter() - begun) / len(weights))
    return min(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
