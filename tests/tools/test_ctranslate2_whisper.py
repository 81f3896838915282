"""The CTranslate2 reader on files written here, and the name map on a random Whisper."""

import struct
from pathlib import Path

import numpy as np
import torch

from transformers import WhisperForConditionalGeneration

import pytest
from ctranslate2_whisper import CTranslate2Model, read_model, whisper_config, whisper_state

from speechllm.errors import UserError
from speechllm.model.tiny import build_tiny_whisper

CODES = {"<f4": 0, "|i1": 1, "<i2": 2, "<i4": 3, "<f2": 4}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def serialise(variables: dict[str, np.ndarray], aliases: dict[str, str], version: int = 6) -> bytes:
    """A model.bin as the CTranslate2 project's specification describes it."""
    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        data += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += struct.pack("<BI", CODES[array.dtype.str], array.nbytes) + array.tobytes()
    data += struct.pack("<I", len(aliases))
    return data + b"".join(text(alias) + text(name) for alias, name in aliases.items())


def to_ctranslate2(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The variables that CTranslate2's converter writes for a Whisper, in float32."""
    out: dict[str, np.ndarray] = {
        "decoder/activation": np.array(3, np.int8),
        "decoder/pre_norm": np.array(1, np.int8),
        "decoder/alignment_layer": np.array(-1, np.int16),
        "decoder/alignment_heads": np.array([[0, 1]], np.int16),
    }

    def put(
        name: str, *layers: torch.nn.Module, kinds: tuple[str, str] = ("weight", "bias")
    ) -> None:
        biases = [
            torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
            for layer in layers
        ]
        out[f"{name}/{kinds[0]}"] = torch.cat([layer.weight for layer in layers]).numpy()
        out[f"{name}/{kinds[1]}"] = torch.cat(biases).numpy()

    for side, part in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        out[f"{side}/num_heads"] = np.array(part.layers[0].self_attn.num_heads, np.int16)
        out[f"{side}/position_encodings/encodings"] = part.embed_positions.weight.numpy()
        put(f"{side}/layer_norm", part.layer_norm, kinds=("gamma", "beta"))
        for i, layer in enumerate(part.layers):
            root, own = f"{side}/layer_{i}", layer.self_attn
            norm = layer.self_attn_layer_norm
            put(f"{root}/self_attention/layer_norm", norm, kinds=("gamma", "beta"))
            put(f"{root}/self_attention/linear_0", own.q_proj, own.k_proj, own.v_proj)
            put(f"{root}/self_attention/linear_1", own.out_proj)
            put(f"{root}/ffn/layer_norm", layer.final_layer_norm, kinds=("gamma", "beta"))
            put(f"{root}/ffn/linear_0", layer.fc1)
            put(f"{root}/ffn/linear_1", layer.fc2)
            if side == "decoder":
                cross, norm = layer.encoder_attn, layer.encoder_attn_layer_norm
                put(f"{root}/attention/layer_norm", norm, kinds=("gamma", "beta"))
                put(f"{root}/attention/linear_0", cross.q_proj)
                put(f"{root}/attention/linear_1", cross.k_proj, cross.v_proj)
                put(f"{root}/attention/linear_2", cross.out_proj)
    put("encoder/conv1", model.model.encoder.conv1)
    put("encoder/conv2", model.model.encoder.conv2)
    out["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight.numpy()
    return out


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> WhisperForConditionalGeneration:
    directory = build_tiny_whisper(tmp_path_factory.mktemp("tiny") / "whisper")
    model = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    # Released Whispers have biases and norms of every value; fresh ones hold zeros and ones.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def variables(whisper: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    return to_ctranslate2(whisper)


TOKEN_IDS = {
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "begin_suppress_tokens": None,
}
ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def test_reader_returns_what_was_written(tmp_path: Path) -> None:
    written = {
        "a/half": np.arange(6, dtype="<f2").reshape(2, 3),
        "b": np.array(7, np.int8),
        "c/long": np.array([[[-1, 70000]]], "<i4"),
        "d": np.array([-3, 4], "<i2"),
        "e": np.array([1.5], "<f4"),
    }
    path = tmp_path / "model.bin"
    path.write_bytes(serialise(written, {"other/name": "e"}))
    model = read_model(path)
    assert (model.specification, model.revision) == ("WhisperSpec", 3)
    assert set(model.variables) == {*written, "other/name"}
    for name, array in written.items():
        assert model.variables[name].dtype == array.dtype
        np.testing.assert_array_equal(model.variables[name], array)
    np.testing.assert_array_equal(model.variables["other/name"], written["e"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (serialise({}, {}, version=5), "version 6"),
        (serialise({"a": np.zeros(4, "<f4")}, {})[:-9], "ends within a record"),
        (b"", "ends within a record"),
        (serialise({}, {"a": "b"}), "stands for b"),
        (
            serialise({"a": np.zeros(4, "<f4")}, {}).replace(b"\x00\x10\0\0\0", b"\x09\x10\0\0\0"),
            "type 9",
        ),
        (
            serialise({"a": np.zeros(4, "<f4")}, {}).replace(b"\x01\x04\0\0\0", b"\x01\x05\0\0\0"),
            "shape",
        ),
    ],
)
def test_reader_refuses_what_it_does_not_know(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_model(path)


def test_converted_whisper_is_the_original(
    tmp_path: Path, whisper: WhisperForConditionalGeneration, variables: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(serialise(variables, ALIASES))
    model = read_model(path)
    state = whisper_state(model)
    expected = whisper.state_dict()
    assert set(state) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=0, msg=name)
    again = WhisperForConditionalGeneration(whisper_config(model, **TOKEN_IDS)).eval()
    again.load_state_dict(state, strict=True)
    assert again.config.encoder_attention_heads == whisper.config.encoder_attention_heads
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[2, 5, 9, 11]])
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_features=features, decoder_input_ids=tokens).logits,
            whisper(input_features=features, decoder_input_ids=tokens).logits,
            rtol=0,
            atol=0,
        )


def test_what_is_no_whisper_is_refused(variables: dict[str, np.ndarray]) -> None:
    def model(
        changes: dict[str, np.ndarray], specification: str = "WhisperSpec"
    ) -> CTranslate2Model:
        return CTranslate2Model(specification, 3, {**variables, **changes})

    with pytest.raises(UserError, match="TransformerSpec"):
        whisper_config(model({}, "TransformerSpec"))
    with pytest.raises(UserError, match="GELU"):
        whisper_config(model({"decoder/activation": np.array(0, np.int8)}))
    with pytest.raises(UserError, match=r"Whisper has not: .'encoder/extra'"):
        whisper_state(model({"encoder/extra": np.zeros(3, "<f4")}))
    bias = variables["encoder/layer_0/self_attention/linear_0/bias"] + 1
    with pytest.raises(UserError, match="keys have a bias"):
        whisper_state(model({"encoder/layer_0/self_attention/linear_0/bias": bias}))
    without = {k: v for k, v in variables.items() if k != "encoder/conv2/bias"}
    with pytest.raises(UserError, match="lacks encoder/conv2/bias"):
        whisper_state(CTranslate2Model("WhisperSpec", 3, without))
