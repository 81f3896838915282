from __future__ import annotations

import pytest

from speechllm.config.data import Augmentation, Data, Dataset, DatasetPrompt
from speechllm.config.fields import all_keys
from speechllm.config.load import dump_config, load_config
from speechllm.config.schema import Config
from speechllm.errors import ConfigError

MODELS = ["model.encoder.id=random:whisper", "model.llm.id=random:llama"]


def load(*overrides: str, file: str | None = None) -> Config:
    return load_config(file, [*MODELS, *overrides])


def test_a_mixture_by_names(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data:\n  mixture:\n    read: {shards: [a, ~/b]}\n"
        "    calls:\n      shards: c\n      weight: 2\n      prompt: {texts: 'Call: {audio}'}\n"
    )
    config = load("data.mixture.calls.weight=0.5", "data.mixture.more.shards=d", file=str(path))
    mixture = config.data.mixture
    assert list(mixture) == ["read", "calls", "more"]
    assert mixture["calls"] == Dataset(
        shards=("c",), weight=0.5, prompt=DatasetPrompt(texts=("Call: {audio}",))
    )
    assert mixture["read"].shards[1].endswith("/b")
    assert "~" not in mixture["read"].shards[1]
    assert config.data.training_shards == (*mixture["read"].shards, "c", "d")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_without_one_the_training_shards_are_those_of_train():
    assert load("data.train=[a,b]").data.training_shards == ("a", "b")
    assert load().data.training_shards == ()
    assert load("data.mixture=").data.mixture == {}


def test_augmentation_is_off():
    off = Data().augmentation
    assert all(getattr(off, name).probability == 0 for name in Augmentation.model_fields)


def test_keys_with_names_are_known():
    keys = all_keys()
    assert "data.mixture.NAME.weight" in keys
    assert "data.mixture.NAME.prompt.texts" in keys
    assert "data.augmentation.noise.snr" in keys


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mixture.cv.weight=2"], "data.mixture.cv.shards is missing: Directories or globs"),
        (["data.mixture.cv="], "data.mixture.cv.shards is missing: Directories or globs"),
        (["data.mixture=x"], "data.mixture: expected a section of keys, got 'x'"),
        (["data.mixture.cv=x"], "data.mixture.cv: expected a section of keys, got 'x'"),
        (["data.mixture.cv.shards=[]"], "data.mixture.cv.shards: expected a list of at least 1"),
        (
            ["data.mixture.cv.shards=a", "data.mixture.cv.wieght=2"],
            "data.mixture.cv.wieght: no such key; did you mean data.mixture.cv.weight?",
        ),
        (
            ["data.mixture.cv.shards=a", "data.mixture.cv.prompt.txets=2"],
            "did you mean data.mixture.cv.prompt.texts?",
        ),
        (
            ["data.mixture.cv.shards=a", "data.mixture.cv.weight=0"],
            "data.mixture.cv.weight: expected greater than 0, got '0'",
        ),
        (
            ["data.mixture.cv.shards=a", "data.train=b"],
            "data: `train` and `mixture` are both set",
        ),
        (["data.temperature=2"], "data: `temperature` needs a `mixture`"),
        (
            ["data.temperature=2", "data.mixture={a: {shards: x}, b: {shards: y, weight: 2}}"],
            "`temperature` takes the place of weights, but b has weight 2",
        ),
        (["data.temperature=0.5", "data.mixture.a.shards=x"], "data.temperature: expected greater"),
        (
            ["data.augmentation.noise.probability=0.5"],
            "data.augmentation.noise: probability is 0.5, but `shards` names no tars of noises",
        ),
        (
            ["data.augmentation.reverberation.probability=1"],
            "`shards` names no tars of impulse responses",
        ),
        (
            ["data.augmentation.noise.snr=[9, 3]"],
            "snr is [lowest, highest], but 9 is above 3",
        ),
        (
            ["data.augmentation.gain.decibels=[1, 0]"],
            "decibels is [lowest, highest], but 1 is above 0",
        ),
        (["data.augmentation.speed.factors=[]"], "`factors` is empty"),
        (["data.augmentation.speed.factors=[1, 3]"], "factors[1]: expected less than or equal"),
        (
            ["data.mixture.a.shards=x", "data.mixture.a.prompt.texts=a {audio} b {audio}"],
            "data.mixture.a.prompt: prompt text 'a {audio} b {audio}' holds {audio} more than once",
        ),
        (
            ["data.mixture.a={shards: x, prompt: {system: s}}", "model.prompt.kind=plain"],
            "data.mixture.a.prompt.system belongs to model.prompt.kind: chat",
        ),
        (["data.augmentation.spec.probability=2"], "expected less than or equal to 1, got '2'"),
    ],
)
def test_what_is_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_the_lines_of_a_file_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  mixture:\n    a:\n      shards: x\n      weight: many\n")
    with pytest.raises(ConfigError, match=r":5: data\.mixture\.a\.weight: expected a number"):
        load(file=str(path))
