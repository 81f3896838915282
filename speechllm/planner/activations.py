"""Bytes that forward and backward of one microbatch need besides weights, by architecture.

What autograd keeps follows from the derivative of each operation (torch's derivatives.yaml). With
frozen weights a matrix product keeps its weight, which is there anyway, and not its input; what is
kept is what norms, activation functions, products and attention need for the gradient of their
inputs. Where a weight trains, its product keeps its input too, in the compute type.

Letters in formulas: d width, q and k widths of all query and of all key heads, f feed-forward
width, h heads, N keys that a position is scored against, c bytes of the compute type, s of the
stored (frozen) type, e of what a LayerNorm gives: 4 under CUDA's autocast, c on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from speechllm.config import model as schema
from speechllm.planner.architecture import Architecture, Transformer

FLOAT = 4  # bytes
FRAME_SAMPLES, CHUNK_FRAMES = 320, 1500
# Log-mel of one frame, the highest moment (torch.stft and the absolute value of its complex
# result): the waveform, 2 x 201 complex bins, and the temporary copies of both.
STFT_BYTES = 9350


@dataclass(frozen=True)
class Setting:
    """How the numbers are stored and computed. Bytes of an element."""

    compute: int
    frozen: int
    attention: Literal["eager", "sdpa", "grouped", "flash"]
    on_cpu: bool
    checkpointing: bool
    recasts: bool  # frozen weights are stored in another type than they are used in

    @property
    def norm(self) -> int:
        """What a LayerNorm gives: it is on CUDA's list of operations that autocast runs in fp32."""
        return self.compute if self.on_cpu else FLOAT


@dataclass(frozen=True)
class Shape:
    """A microbatch: `rows` utterances of `columns` LLM positions, each of `frames` encoder frames
    and `tokens` audio tokens; `labels` trained positions in all. With `prefix` tokens all rows of
    the run begin."""

    rows: int
    columns: int
    tokens: int
    frames: int
    labels: int
    prefix: int = 0

    @property
    def positions(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Rows:
    """A microbatch as the LLM's layers run it: `positions`, each scored against `seen` keys, out of
    `keys` in all. What is left out of the rows is among the keys and not among the positions."""

    positions: int
    seen: int
    keys: int


def decoder_layer(llm: Transformer, setting: Setting, rows: Rows) -> int:
    """Bytes that one frozen decoder layer keeps for the gradient of its input.

    Of a position: two RMSNorms keep their input in fp32 and its inverse norm, 2 (4d + 4), q and k
    norms (OLMo-2, Qwen3) 4 (q + k); attention keeps q. A fused kernel also keeps its output,
    4 bytes a head, and the mask of that layer, c N; eager attention keeps the soft-max in fp32 and,
    where compute is narrower, once more: h N (4 + c); grouped attention keeps it once, h N c. The
    gated feed-forward block keeps the activation function's input and both factors of the product:
    3 f c. Of a key: k and v, each as wide as the query heads since keys and values are repeated
    under a mask; grouped and flash attention take them as they are.
    """
    c, queries = setting.compute, llm.heads * llm.head_width
    norms = 2 * (FLOAT * llm.width + FLOAT)
    if llm.head_norms:
        norms += FLOAT * (queries + llm.kv_heads * llm.head_width)
    match setting.attention:
        case "eager":
            scores = llm.heads * rows.seen * (FLOAT if c == FLOAT else FLOAT + c)
        case "grouped":
            scores = llm.heads * rows.seen * c
        case "sdpa":
            scores = queries * c + FLOAT * llm.heads + rows.seen * c
        case "flash":
            scores = queries * c + FLOAT * llm.heads
    position = norms + queries * c + scores + _feed_forward_parts(llm) * llm.feed_forward * c
    return rows.positions * position + rows.keys * 2 * _key_width(llm, setting) * c


def decoder_layer_backward(llm: Transformer, setting: Setting, rows: Rows) -> int:
    """Bytes that the backward of one layer takes above what the layer keeps.

    Feed-forward block: the gradient of its product and of both factors, 3 f c, beside those of the
    stream, 2 d s. Attention, when what the feed-forward block kept is released: gradients of q, k,
    v and the output; eager, of the soft-max and of what goes into it in fp32, 8 h N, and of v; by
    then the soft-max's narrow copy is released; grouped, of the same two in the compute type, 2 h N
    c, and of the output.
    """
    c, queries = setting.compute, llm.heads * llm.head_width
    block = rows.positions * _feed_forward_parts(llm) * llm.feed_forward * c
    kept_by_block = block + rows.positions * FLOAT * llm.width
    match setting.attention:
        case "eager":
            narrow = 0 if c == FLOAT else c
            attention = rows.positions * (2 * FLOAT - narrow) * llm.heads * rows.seen
            attention += rows.keys * queries * c
        case "grouped":
            attention = rows.positions * (2 * llm.heads * rows.seen + queries) * c
        case "sdpa" | "flash":
            attention = 2 * (rows.positions * queries + rows.keys * _key_width(llm, setting)) * c
    stream = rows.positions * 2 * llm.width * setting.frozen
    return stream + max(block, attention - kept_by_block)


def _key_width(llm: Transformer, setting: Setting) -> int:
    repeated = setting.attention in ("eager", "sdpa")
    return (llm.heads if repeated else llm.kv_heads) * llm.head_width


def _feed_forward_parts(llm: Transformer) -> int:
    return 3 if llm.gated else 1


def lora(architecture: Architecture, setting: Setting) -> int:
    """Bytes a position that all LoRA matrices keep: what they read, once where several read the
    same, and the product of the first of each pair."""
    products = architecture.lora_rank * architecture.lora_matrices
    return (architecture.lora_inputs + products) * setting.compute


def prefix(llm: Transformer, setting: Setting, shape: Shape) -> int:
    """Keys and values of the prefix in all layers, which stay from step to step."""
    return 2 * llm.layers * shape.prefix * llm.kv_heads * llm.head_width * setting.compute


def decoder(architecture: Architecture, setting: Setting, rows: Rows) -> int:
    """What the LLM keeps, its layers and the norm after them; with activation checkpointing the
    inputs of the layers (Chen et al. 2016, arXiv:1604.06174)."""
    llm, c = architecture.llm, setting.compute
    rotary = 2 * llm.head_width * c
    position = rotary + FLOAT * llm.width + FLOAT
    layers = copies = 0
    if setting.checkpointing:
        position += llm.layers * llm.width * setting.frozen
    else:
        position += lora(architecture, setting)
        layers = llm.layers * decoder_layer(llm, setting, rows)
        copies = llm.layers * llm.layer_parameters
    if setting.recasts:
        copies = (copies + (llm.head_parameters or llm.embedding_parameters)) * c
    else:
        copies = 0
    if c != FLOAT:
        copies += architecture.lora_parameters * c
    return rows.positions * position + layers + copies


def decoder_backward(architecture: Architecture, setting: Setting, rows: Rows) -> int:
    """What the backward of the last layer adds to what the LLM keeps, of which the last norm's part
    is released; with activation checkpointing also the layer's own activations, among them, in
    fp32, the input that is kept already."""
    llm = architecture.llm
    layer = decoder_layer_backward(llm, setting, rows)
    position = -FLOAT * (llm.width + 1)
    copies = 0
    if setting.checkpointing:
        layer += decoder_layer(llm, setting, rows)
        position += lora(architecture, setting) // llm.layers
        position -= FLOAT * llm.width if setting.frozen == FLOAT else 0
        copies = llm.layer_parameters * setting.compute if setting.recasts else 0
    return rows.positions * position + layer + copies


def product_inputs(architecture: Architecture, setting: Setting, rows: Rows) -> int:
    """The inputs of one frozen layer's matrix products that nothing else keeps: of attention, of
    the feed-forward block, and of its last matrix."""
    llm = architecture.llm
    return rows.positions * (2 * llm.width + llm.feed_forward) * setting.compute


def logits(llm: Transformer, setting: Setting, positions: int, limit: int | None) -> int:
    """Highest moment of the cross entropy of so many positions. In chunks of at most `limit` bytes
    of fp32 logits: they and their copy in a narrower compute type. Without a limit, of all at once:
    log-probabilities and two gradients, fp32 [positions, V]."""
    whole = FLOAT * positions * llm.vocabulary
    if limit is None:
        return 3 * whole
    copy = 0 if setting.compute == FLOAT else setting.compute
    return min(whole, max(limit, FLOAT * llm.vocabulary)) * (FLOAT + copy) // FLOAT


def encoder_forward(architecture: Architecture, setting: Setting, shape: Shape) -> int:
    """Highest moment of the encoder without gradient: features, convolutions or a layer.

    A Whisper layer in its feed-forward block holds the stream, the norm's output, and both sides of
    the activation function: (d + d + 2 f) a frame. The first convolution has two columns a frame.
    """
    frames = shape.rows * shape.frames
    features = STFT_BYTES * frames
    whisper = architecture.whisper
    if whisper is None:
        return features
    s, d = setting.frozen, whisper.width
    features_kept = 2 * whisper.mels * FLOAT
    convolution = features_kept + 3 * 2 * d * s
    norm = d * (s if setting.on_cpu else FLOAT + s)
    layer = features_kept + d * s + norm + 2 * whisper.feed_forward * s
    return max(features, frames * max(convolution, layer))


def encoder_layer(whisper: Transformer, setting: Setting) -> int:
    """Bytes a frame that one Whisper layer that trains keeps, every product with its input.

    Norms: input and output, 2 d (e + c), and where the output is cast, one cast for each of q, k,
    v; attention: q, k, v, output; feed-forward block: input and output of GELU.
    """
    d, c, e = whisper.width, setting.compute, setting.norm
    casts = 3 * d * c if e != c else d * c
    norms = 2 * d * e + casts + d * c
    return norms + 4 * d * c + 2 * whisper.feed_forward * c


def connector(architecture: Architecture, setting: Setting, shape: Shape) -> int:
    """Bytes that the connector keeps, all of whose products keep their inputs.

    With a compute type narrower than fp32, autocast's copies of the weights are kept as well.
    """
    cfg, c, e = architecture.connector, setting.compute, setting.norm
    tokens, width = shape.rows * shape.tokens, architecture.frame_width
    stacked = cfg.downsampling_factor * width
    once = architecture.connector_parameters * c if c != FLOAT else 0
    if architecture.filterbank_mels:  # the features, two to a frame, which its product keeps
        once += shape.rows * shape.frames * 2 * architecture.filterbank_mels * c
    match cfg.kind:
        case "linear":
            token = stacked * c
        case "mlp":
            token = stacked * (e + c) + 2 * cfg.hidden_size * c
            token += _dropout(cfg.dropout, setting) * cfg.hidden_size
        case "conv1d":
            token = stacked * c + 2 * cfg.hidden_size * c
            token += _dropout(cfg.dropout, setting) * cfg.hidden_size
        case "transformer":
            token = stacked * c + cfg.hidden_size * c
            token += _dropout(cfg.dropout, setting) * cfg.hidden_size
            token += cfg.num_layers * _connector_layer(cfg, setting, shape.tokens)
    return once + tokens * token


def _connector_layer(cfg: schema.TransformerConnector, setting: Setting, tokens: int) -> int:
    """Two LayerNorms with their outputs, q, k, v and attention's output, GELU's input, and what
    dropout gives. torch's fused attention on a CPU has no dropout: there the probabilities are
    kept, before and after it, with the noise."""
    c, noise = setting.compute, _dropout(cfg.dropout, setting)
    norms = 2 * cfg.hidden_size * (setting.norm + c)
    attention = 4 * cfg.hidden_size * c
    if setting.on_cpu and noise:
        attention += cfg.num_heads * tokens * (2 * c + noise)
    block = 2 * cfg.intermediate_size * c
    return norms + attention + block + noise * (2 * cfg.hidden_size + cfg.intermediate_size)


def _dropout(probability: float, setting: Setting) -> int:
    """Bytes an element that dropout keeps: a mask on CUDA, its scaled noise on a CPU."""
    if not probability:
        return 0
    return setting.compute if setting.on_cpu else 1


def connector_backward(
    architecture: Architecture, setting: Setting, shape: Shape, rows: Rows
) -> int:
    """The gradients of the tokens and of the widest block, beside what is kept. Where the stacked
    frames come out of something that trains, their gradient too."""
    cfg, c = architecture.connector, setting.compute
    tokens = shape.rows * shape.tokens
    block = 2 * getattr(cfg, "intermediate_size", getattr(cfg, "hidden_size", 0))
    if cfg.kind == "mlp" or architecture.whisper is None or architecture.unfrozen_layers:
        block = max(block, cfg.downsampling_factor * architecture.frame_width)
    stream = rows.positions * architecture.llm.width * setting.frozen
    return stream + tokens * block * c
