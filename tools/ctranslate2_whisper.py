"""Whisper weights in CTranslate2's `model.bin` as a `WhisperForConditionalGeneration`.

The format is that of the CTranslate2 project's serialisation (binary version 6), little-endian:

    u32 version, string specification, u32 revision, u32 number of variables;
    per variable: string name, u8 rank, u32 dimensions, u8 type, u32 bytes, data;
    u32 number of aliases; per alias: string alias, string variable.

A string is a u16 length and that many bytes, the last of which is NUL.
Shape legend: V vocabulary, D width, P positions.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformers import WhisperConfig

from speechllm.errors import UserError

VERSION = 6
SPECIFICATION = "WhisperSpec"
TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
GELU = 3  # ActivationType of CTranslate2


@dataclass(frozen=True)
class CTranslate2Model:
    specification: str
    revision: int
    variables: dict[str, np.ndarray]


def read_model(path: Path) -> CTranslate2Model:
    """Read a `model.bin` whole; an alias appears as one more name for the same array.

    Raises:
        UserError: the file is of another version, truncated, or not of this format.
    """
    data = memoryview(path.read_bytes())
    offset = 0

    def take(count: int) -> memoryview:
        nonlocal offset
        if offset + count > len(data):
            raise UserError(f"{path} ends within a record, at byte {len(data)}: fetch it anew")
        piece = data[offset : offset + count]
        offset += count
        return piece

    def number(kind: str) -> int:
        return struct.unpack("<" + kind, take(struct.calcsize("<" + kind)))[0]

    def string() -> str:
        return bytes(take(number("H"))).rstrip(b"\0").decode()

    version = number("I")
    if version != VERSION:
        raise UserError(f"{path} is not a CTranslate2 model of version {VERSION} (found {version})")
    specification, revision = string(), number("I")
    variables: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        name = string()
        shape = tuple(number("I") for _ in range(number("B")))
        kind, size = number("B"), number("I")
        if kind not in TYPES:
            raise UserError(f"{path}: variable {name} has the unknown type {kind}")
        array = np.frombuffer(take(size), TYPES[kind])
        if array.size != int(np.prod(shape)):
            raise UserError(f"{path}: variable {name} has {array.size} values for shape {shape}")
        variables[name] = array.reshape(shape)
    for _ in range(number("I")):
        alias, name = string(), string()
        if name not in variables:
            raise UserError(f"{path}: {alias} stands for {name}, which the file does not have")
        variables[alias] = variables[name]
    return CTranslate2Model(specification, revision, variables)


def whisper_config(model: CTranslate2Model, **token_ids: Any) -> WhisperConfig:
    """The shape of the model as its variables show it; they do not tell the ids of special tokens.

    Raises:
        UserError: the file is no Whisper, or one with another activation or post-norm.
    """
    variables = model.variables
    if model.specification != SPECIFICATION:
        raise UserError(f"The CTranslate2 model is a {model.specification}, not a {SPECIFICATION}")
    if variables["decoder/activation"] != GELU or not variables["decoder/pre_norm"]:
        raise UserError("The CTranslate2 model is no Whisper: it lacks GELU or pre-norm")
    width, mels, _ = variables["encoder/conv1/weight"].shape
    return WhisperConfig(
        vocab_size=len(variables["decoder/embeddings/weight"]),
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=_layers(variables, "encoder"),
        decoder_layers=_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=len(variables["encoder/layer_0/ffn/linear_0/bias"]),
        decoder_ffn_dim=len(variables["decoder/layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        activation_function="gelu",
        **token_ids,
    )


def whisper_state(model: CTranslate2Model) -> dict[str, Tensor]:
    """The weights, fp32, under the names of `WhisperForConditionalGeneration`.

    `proj_out.weight` [V, D] is the embedding, as in every Whisper. Queries, keys and values are one
    matrix in CTranslate2 (keys and values in cross-attention); the bias of the keys, which Whisper
    does not have, is there as zeros.

    Raises:
        UserError: a variable is missing, or one that holds weights is left over.
    """
    left = dict(model.variables)
    state: dict[str, Tensor] = {}

    def move(source: str, *targets: str, rename: tuple[str, str] = ("weight", "bias")) -> None:
        """Split `source` along its rows over `targets`: weight and, where there is one, bias."""
        for kind, name in zip(("weight", "bias"), rename, strict=True):
            array = left.pop(f"{source}/{name}", None)
            if array is None:
                raise UserError(f"The CTranslate2 model lacks {source}/{name}: fetch it anew")
            parts = np.split(array.astype(np.float32), len(targets))
            for target, part in zip(targets, parts, strict=True):
                if kind == "bias" and target.endswith(".k_proj"):
                    if part.any():
                        raise UserError(f"{source}/bias: the keys have a bias, this is no Whisper")
                else:
                    state[f"{target}.{kind}"] = torch.from_numpy(part.copy())

    def norm(source: str, target: str) -> None:
        move(source, target, rename=("gamma", "beta"))

    for side in ("encoder", "decoder"):
        root = f"model.{side}"
        for i in range(_layers(model.variables, side)):
            ours, theirs = f"{root}.layers.{i}", f"{side}/layer_{i}"
            attention, heads = f"{theirs}/self_attention", f"{ours}.self_attn"
            norm(f"{attention}/layer_norm", f"{ours}.self_attn_layer_norm")
            move(f"{attention}/linear_0", *(f"{heads}.{x}_proj" for x in "qkv"))
            move(f"{attention}/linear_1", f"{heads}.out_proj")
            if side == "decoder":
                attention, heads = f"{theirs}/attention", f"{ours}.encoder_attn"
                norm(f"{attention}/layer_norm", f"{ours}.encoder_attn_layer_norm")
                move(f"{attention}/linear_0", f"{heads}.q_proj")
                move(f"{attention}/linear_1", f"{heads}.k_proj", f"{heads}.v_proj")
                move(f"{attention}/linear_2", f"{heads}.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            move(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            move(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        norm(f"{side}/layer_norm", f"{root}.layer_norm")
        positions_PD = left.pop(f"{side}/position_encodings/encodings").astype(np.float32)
        state[f"{root}.embed_positions.weight"] = torch.from_numpy(positions_PD)
    move("encoder/conv1", "model.encoder.conv1")
    move("encoder/conv2", "model.encoder.conv2")
    embedding_VD = torch.from_numpy(left.pop("decoder/embeddings/weight").astype(np.float32))
    state["model.decoder.embed_tokens.weight"] = embedding_VD
    state["proj_out.weight"] = embedding_VD
    left.pop("decoder/projection/weight", None)  # the alias of the embedding
    weights = sorted(name for name, array in left.items() if array.ndim and array.dtype.kind == "f")
    if weights:
        raise UserError(f"The CTranslate2 model holds weights that Whisper has not: {weights}")
    return state


def _layers(variables: dict[str, np.ndarray], side: str) -> int:
    names = {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")}
    return len(names - {"layer_norm"})
