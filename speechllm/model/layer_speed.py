"""How fast a device runs a layer of an LLM, and its matrix products, without the LLM's weights.

Shape legend: B rows, S columns, P = B x S positions, W width, F width of the feed-forward block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformers import AutoConfig, AutoModel, PreTrainedModel

from speechllm.config import model as schema
from speechllm.model.attention import register
from speechllm.model.hub import resolve, weight_files
from speechllm.model.pretrained import ready_buffers

SECONDS = 1.5  # that one comparison may take, warm-up included, where that is enough for ROUNDS[0]
ROUNDS = (3, 9)
FLOPS_ON_CPU = 1e10  # of one forward and backward: a tenth of a second on two cores
SMALL_BYTES = 40_000_000  # ten million parameters in fp32


class Way(NamedTuple):
    """How the LLM attends: transformers' name of the kernel; whether rows are packed into one."""

    kernel: str
    packed: bool

    def __str__(self) -> str:
        return f"{self.kernel}, packed" if self.packed else self.kernel


class Rows(NamedTuple):
    """A microbatch of the LLM: `rows` examples of `columns` positions."""

    rows: int
    columns: int


class LayerShape(NamedTuple):
    """What the cost of a layer follows from."""

    kind: str
    width: int
    heads: int
    kv_heads: int
    feed_forward: int

    @property
    def matrix_parameters(self) -> int:
        """About: four matrices of attention, three of the feed-forward block."""
        keys = self.width * self.kv_heads // self.heads
        return 2 * self.width * (self.width + keys) + 3 * self.width * self.feed_forward


def is_small(llm: schema.LLM) -> bool:
    """Whether a choice by measurement would cost more than it could bring.

    Raises ModelError where the model is not there.
    """
    files = weight_files(resolve(llm.id, llm.revision))
    return sum(file.stat().st_size for file in files) < SMALL_BYTES


def layer_shape(llm: schema.LLM) -> LayerShape:
    """Raises ModelError where the model is not there."""
    about = _text_config(resolve(llm.id, llm.revision))
    heads = about.num_attention_heads
    return LayerShape(
        about.model_type,
        about.hidden_size,
        heads,
        getattr(about, "num_key_value_heads", None) or heads,
        getattr(about, "intermediate_size", None) or 4 * about.hidden_size,
    )


def rows_to_time(shape: LayerShape, microbatch: Rows, device: torch.device) -> Rows:
    """The microbatch, or on a CPU as many of its rows as are timed in a fraction of a second.

    Columns are rounded up to a multiple of 16, so that like data share what was measured.
    """
    columns = -(-microbatch.columns // 16) * 16
    rows = microbatch.rows
    if device.type == "cpu":
        positions = FLOPS_ON_CPU / (4 * shape.matrix_parameters)
        rows = max(1, min(rows, int(positions) // columns))
    return Rows(rows, columns)


def attention_seconds(
    llm: schema.LLM,
    ways: tuple[Way, ...],
    microbatch: Rows,
    *,
    stored: torch.dtype,
    computed: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of forward and backward to the inputs of one layer, by `str` of the way.

    The layer has the LLM's shapes and weights of no meaning. Every second row ends with padding, as
    in tight buckets, so that masks are those of training.
    """
    layer = _one_layer(llm, stored, device)
    actions = {str(way): _pass(layer, way, microbatch, stored, computed, device) for way in ways}
    return median_seconds(actions, device)


def product_seconds(shape: LayerShape, positions: int, device: torch.device) -> dict[str, float]:
    """Seconds of the feed-forward block's first product and its input gradient: fp32, bf16."""
    actions: dict[str, Callable[[], object]] = {}
    positions = min(positions, max(64, int(FLOPS_ON_CPU / (4 * shape.width * shape.feed_forward))))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x_PW = torch.ones(positions, shape.width, dtype=dtype, device=device)
        weight_FW = torch.ones(shape.feed_forward, shape.width, dtype=dtype, device=device)

        def both(x_PW: Tensor = x_PW, weight_FW: Tensor = weight_FW) -> Tensor:
            return torch.nn.functional.linear(x_PW, weight_FW) @ weight_FW

        actions[name] = both
    return median_seconds(actions, device)


def median_seconds(
    actions: Mapping[str, Callable[[], object]], device: torch.device, *, most: float = SECONDS
) -> dict[str, float]:
    """Medians of as many rounds as `most` seconds hold. They are interleaved, so that what disturbs
    one action disturbs all; the first run of each warms up and is not counted.
    """
    warm_up = sum(_seconds(action, device) for action in actions.values())
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(most / max(warm_up, 1e-9)) - 1))
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            found[name].append(_seconds(action, device))
    return {name: median(values) for name, values in found.items()}


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _text_config(directory: Path) -> Any:
    return AutoConfig.from_pretrained(directory).get_text_config()


def _one_layer(llm: schema.LLM, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The LLM with its first layer only and next to no vocabulary, frozen."""
    register()
    about = _text_config(resolve(llm.id, llm.revision)).to_dict()
    about |= {"num_hidden_layers": 1, "vocab_size": 8}
    about |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if about.get("layer_types"):
        about["layer_types"] = about["layer_types"][:1]
    config = AutoConfig.for_model(**about)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModel.from_config(
            config, dtype=dtype, attn_implementation="eager"
        )
    ready_buffers(model, device)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.full_like(parameter, 0.01, device=device)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    return model.eval()


def _pass(
    model: PreTrainedModel,
    way: Way,
    microbatch: Rows,
    stored: torch.dtype,
    computed: torch.dtype,
    device: torch.device,
) -> Callable[[], object]:
    rows, columns = microbatch
    width = model.config.hidden_size
    mask_BS = torch.ones(rows, columns, dtype=torch.int64, device=device)
    mask_BS[1::2, -1] = 0
    positions_BS = torch.arange(columns, device=device).expand(rows, columns)
    shape = (rows, columns, width)
    given: dict[str, Any] = {"attention_mask": mask_BS, "position_ids": positions_BS}
    if way.packed:  # a kernel for rows of any length sees where they start by their positions
        given = {"position_ids": positions_BS.reshape(1, -1)}
        shape = (1, rows * columns, width)
    inputs = torch.full(shape, 0.5, dtype=stored, device=device, requires_grad=True)
    narrow = computed != torch.float32
    autocast = torch.autocast(device.type, dtype=computed) if narrow else nullcontext()

    def forward_and_backward() -> None:
        model.set_attn_implementation(way.kernel)
        with autocast:
            states = model(inputs_embeds=inputs, use_cache=False, **given).last_hidden_state
        states.backward(torch.ones_like(states))
        inputs.grad = None

    return forward_and_backward
