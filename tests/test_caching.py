"""What is written of the encoder's outputs is what the model's own forward makes of the audio."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import pytest
from runs import TINY
from speech_files import make_sample, write_shards

from speechllm.caching import ShardEncoder, Written, quantise
from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.collate import collate
from speechllm.data.features import Dtype, FeatureStore, open_features
from speechllm.data.index import Corpus, open_corpus
from speechllm.data.shards import Sample, write_shard
from speechllm.data.store import Store
from speechllm.features import Kind, kind_of
from speechllm.model.frontend import num_frames
from speechllm.prepare import TextSide, prepare_model, prepare_text
from speechllm.types import Batch, LossSums

CPU = torch.device("cpu")


def config_of(*overrides: str) -> Config:
    settled = ["model.llm.attention=eager", "train.activation_checkpointing=false"]
    return load_config(TINY, [*settled, "performance.packing=off", *overrides])


def write(config: Config, directory: Path, dtype: Dtype) -> tuple[Corpus, Kind, Written]:
    kind = kind_of(config, dtype)
    encoder = ShardEncoder(config, kind, CPU, batch_seconds=4.0, threads=2)
    corpus = open_corpus([str(directory)])
    return corpus, kind, sum((encoder.write(t, lambda n: None) for t in corpus.shards), Written())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five short utterances, and one of more than a chunk of 30 s."""
    folder = write_shards(tmp_path_factory.mktemp("s"), 5, num_shards=2, seconds=(0.1, 1.5))
    write_shard(str(folder / "long.tar"), [make_sample("long", "so long", 30.3)])
    return folder


def batches(corpus: Corpus, stores: Sequence[Store], text: TextSide) -> list[Batch]:
    return [
        collate(
            [text.prompter.example(store.read(i), 0, with_target=True) for i in range(len(corpus))],
            text.audio_tokens,
            pad_id=text.pad_id,
        )
        for store in stores
    ]


@pytest.mark.parametrize(
    ("context", "precision", "dtype", "most"),
    [
        ("trim", "fp32", "bf16", 2e-3),
        ("trim", "fp32", "int8", 6e-3),
        ("pad30", "fp32", "int8", 6e-3),
        ("trim", "bf16", "bf16", 1e-2),  # shapes differ, and so rounding
    ],
)
@torch.no_grad()
def test_frames_on_disk_are_the_encoders_own(
    directory: Path, context: str, precision: str, dtype: Dtype, most: float
) -> None:
    config = config_of(f"model.encoder.context={context}", f"precision={precision}")
    corpus, kind, written = write(config, directory, dtype)
    assert (written.utterances, written.bad) == (6, 0)
    model = prepare_model(config, CPU)
    usual, cached = Store(corpus), FeatureStore(corpus, kind.key, dtype)
    squares = wrong_squares = 0.0
    for i in range(6):
        samples = torch.from_numpy(usual.read(i).samples)
        with model.autocast():
            exact_TD = model.encoder(samples[None], torch.tensor([len(samples)]))[0][0].float()
        encoded = cached.read(i).encoded
        assert encoded is not None
        assert len(encoded.values_TD) == num_frames(len(samples)) == len(exact_TD)
        values_TD = torch.tensor(encoded.values_TD)
        if encoded.scales_D is None:
            found_TD = values_TD.view(torch.bfloat16).float()
        else:
            scales_D = torch.tensor(encoded.scales_D)
            found_TD = values_TD * scales_D
            assert ((found_TD - exact_TD).abs() <= scales_D / 2 + 1e-5).all()
        squares += float(exact_TD.square().sum())
        wrong_squares += float((found_TD - exact_TD).square().sum())
    wrong = (wrong_squares / squares) ** 0.5
    assert wrong < most
    if precision == "fp32":
        assert written.relative_rms_error == pytest.approx(wrong, rel=1e-2)
    else:
        assert written.relative_rms_error == 0


@pytest.mark.parametrize("objective", ["lm", "ctc"])
def test_loss_and_gradients_are_those_of_audio(
    directory: Path, objective: Literal["lm", "ctc"]
) -> None:
    config = config_of("precision=fp32", "model.connector.dropout=0")
    text = prepare_text(config)
    model = prepare_model(config, CPU, ctc=True)
    found: dict[str, tuple[LossSums, list[torch.Tensor]]] = {}
    corpus = open_corpus([str(directory)])
    stores: dict[str, Store] = {"audio": Store(corpus)}
    for dtype in ("bf16", "int8"):
        stores[dtype] = FeatureStore(corpus, write(config, directory, dtype)[1].key, dtype)
    for name, batch in zip(stores, batches(corpus, list(stores.values()), text), strict=True):
        model.zero_grad()
        sums = model(batch, objective)
        sums.loss.backward()
        found[name] = sums, [p.grad.clone() for p in model.trainable_parameters().values()]
    exact, exact_grads = found["audio"]
    for dtype, tolerance in (("bf16", 2e-3), ("int8", 5e-3)):
        sums, grads = found[dtype]
        assert torch.equal(sums.tokens, exact.tokens)
        torch.testing.assert_close(sums.loss, exact.loss, rtol=tolerance, atol=0)
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            assert (grad - exact_grad).norm() <= 20 * tolerance * exact_grad.norm() + 1e-6


def test_the_encoder_is_not_run(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("precision=fp32")
    corpus, kind, _ = write(config, directory, "bf16")
    text, model = prepare_text(config), prepare_model(config, CPU)
    monkeypatch.setattr(type(model.encoder), "forward", None)
    store = FeatureStore(corpus, kind.key, "bf16")
    assert model(batches(corpus, [store], text)[0]).tokens > 0
    with pytest.raises(TypeError):
        model(batches(corpus, [Store(corpus)], text)[0])


def test_a_bf16_encoder_gives_the_very_same_loss_in_the_same_shape(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "a.tar"), [make_sample("a", "one two", 0.9)])
    config = config_of("precision=bf16", "model.connector.dropout=0")
    corpus, kind, written = write(config, tmp_path, "bf16")
    assert written.relative_rms_error == written.worst == 0
    text, model = prepare_text(config), prepare_model(config, CPU)
    stores = [Store(corpus), FeatureStore(corpus, kind.key, "bf16")]
    losses = [model(batch).loss.item() for batch in batches(corpus, stores, text)]
    assert losses[0] == losses[1]


def test_what_cannot_be_decoded_is_left_out_and_counted(tmp_path: Path) -> None:
    good = make_sample("good", "one", 0.3)
    bad = Sample("bad", b"fLaC no more", "flac", {"text": "two"}, 0.5, 16_000)
    write_shard(str(tmp_path / "a.tar"), [bad, good])
    corpus, kind, written = write(config_of("precision=fp32"), tmp_path, "int8")
    assert (written.utterances, written.bad) == (1, 1)
    file = open_features(kind.path(corpus.shards[0]))
    assert file.rows.column("error").to_pylist()[1] is None
    assert "undecodable" in file.rows.column("error")[0].as_py()
    assert file.about["written"]["audio_seconds"] == pytest.approx(0.3, abs=1e-3)


def test_int8_has_no_zeros_to_divide_by() -> None:
    frames = quantise(torch.tensor([[[0.0, 1.0, -0.5], [0.0, -2.0, 0.25]]]), "int8")
    assert frames.values_ATD.tolist() == [[[0, 64, -127], [0, -127, 64]]]
    exact = torch.tensor([[[0.0, 1.0, -0.5], [0.0, -2.0, 0.25]]])
    torch.testing.assert_close(frames.decoded(torch.float32), exact, atol=2 / 254, rtol=0)
    assert np.isfinite(json.loads(json.dumps(frames.decoded(torch.float32).tolist()))).all()


def test_sums_keep_the_worst() -> None:
    one = Written(utterances=1, squares=4.0, wrong_squares=1.0, worst=0.5, seconds=3.0)
    both = one + Written(utterances=2, worst=0.25, encoder_seconds=2.0)
    assert (both.utterances, both.worst, both.relative_rms_error) == (3, 0.5, 0.5)
    assert both.break_even_epochs == 1.5
