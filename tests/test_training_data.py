"""Mixtures and augmentation through everything between the configuration and the batches."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pytest
from audio_tars import write_banks
from memory_corpus import facts
from runs import TINY, assert_same_run, metrics
from speech_files import write_shards

import speechllm.prepare
import speechllm.train
import speechllm.training_data
from speechllm.cli import main
from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.augment import perturbed_samples, speed_rates
from speechllm.data.keys import hash_keys
from speechllm.errors import CheckpointError, ConfigError
from speechllm.planner.workload import of_split
from speechllm.prepare import Split, TextSide, prepare_text
from speechllm.train import DONE, STOPPED, train
from speechllm.training_data import data_identity, epoch_plans, open_training, train_loader
from speechllm.types import StepData
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets `read` of 30 utterances and `calls` of 9, noises and rooms."""
    directory = tmp_path_factory.mktemp("corpora")
    write_shards(directory / "read", 30, num_shards=3, name="read", seed=1)
    write_shards(directory / "calls", 9, num_shards=2, name="calls", seed=2)
    write_banks(directory / "banks")
    return directory


def mixed(corpora: Path, *overrides: str) -> Config:
    return load_config(
        TINY,
        [
            f"data.mixture.read.shards={corpora / 'read'}",
            f"data.mixture.calls.shards={corpora / 'calls'}",
            "data.mixture.calls.weight=2.5",
            'data.mixture.calls.prompt.texts=["A longer prompt for calls: {audio}"]',
            "data.num_workers=0",
            "data.microbatch_tokens=400",
            *overrides,
        ],
    )


def augmented(corpora: Path) -> list[str]:
    banks = corpora / "banks"
    return [
        *(f"data.augmentation.{name}.probability=0.5" for name in
          ("speed", "reverberation", "noise", "telephone", "gain", "spec")),
        f"data.augmentation.noise.shards={banks / 'noise.tar'}",
        f"data.augmentation.reverberation.shards={banks / 'rooms.tar'}",
    ]  # fmt: skip


def opened(config: Config) -> tuple[Split, TextSide]:
    text = prepare_text(config)
    return open_training(config, text), text


def steps_of(
    config: Config, count: int, *, epoch: int = 0, step: int = 0, rank: int = 0, world: int = 1
) -> list[StepData]:
    split, text = opened(config)
    loader = train_loader(config, split, text, epoch_plans(config, split), rank=rank, world=world)
    with closing(loader.steps(epoch, step)) as steps:
        return list(itertools.islice(steps, count))


def numbers(data: StepData) -> list[list[int]]:
    return [[r.number for r in m.references] for m in data.microbatches]


def all_facts(steps: list[StepData]) -> list[object]:
    masks = [[m.batch.masks and [f.tolist() for f in m.batch.masks] for m in d.microbatches]
             for d in steps]  # fmt: skip
    return [[facts(data) for data in steps], masks]


def test_an_epoch_has_the_proportions_of_the_configuration(corpora: Path) -> None:
    config = mixed(corpora, "data.mixture.read.weight=0.4")
    split, _ = opened(config)
    assert split.mixture is not None
    assert {p.name: (len(p.kept), p.per_epoch) for p in split.mixture.parts} == {
        "calls": (9, 22),
        "read": (30, 12),
    }
    plan_of = epoch_plans(config, split)
    heard = np.zeros(39, int)
    calls = np.arange(39) < 9  # shards are sorted by path
    for epoch in range(5):
        flat = plan_of(epoch).flat()
        times = np.bincount(flat.utterances, minlength=39)
        assert (times[calls].sum(), times[~calls].sum()) == (22, 12)
        heard += times
        for part in (heard[calls], heard[~calls]):
            assert part.max() - part.min() <= 1
    assert heard[calls].sum() == 110
    assert heard[~calls].tolist() == [2] * 30


def test_equal_weights_are_the_plain_list_of_shards(corpora: Path) -> None:
    both = f"data.train=[{corpora / 'read'},{corpora / 'calls'}]"
    plain = load_config(TINY, [both, "data.microbatch_tokens=400", "data.num_workers=0"])
    config = mixed(corpora, "data.mixture.calls.weight=1", "data.mixture.calls.prompt.texts=[]")
    assert all_facts(steps_of(config, 6)) == all_facts(steps_of(plain, 6))


@pytest.mark.parametrize("way", ["exact", "estimate"])
def test_the_prompt_of_a_data_set_is_counted_and_used(corpora: Path, way: str) -> None:
    config = mixed(corpora, f"data.text_tokens={way}")
    split, text = opened(config)
    costs = {}
    for data in steps_of(config, 4):
        for m in data.microbatches:
            lengths = m.batch.attention_mask_BS.sum(1).tolist()
            for reference, tokens, length in zip(
                m.references, m.batch.tokens_BS, lengths, strict=True
            ):
                prompt = text.tokenizer.decode(tokens[:60])
                assert ("longer prompt" in prompt) == (reference.number < 9)
                costs[reference.number] = length
    planned = {n: int(split.costs[n]) for n in costs}
    calls = [n for n in costs if n < 9]
    assert calls
    extra = text.prompters["calls"].max_prompt_tokens - text.prompter.max_prompt_tokens
    assert extra > 10
    if way == "exact":
        assert costs == planned
        return
    for n in costs:
        # Three characters a token were guessed; the tiny tokenizer takes one.
        characters = int(split.corpus.text_lengths[n])
        assert costs[n] == planned[n] - -(-characters // 3) + characters


@pytest.mark.parametrize("mixture", [False, True])
def test_the_plan_knows_every_rows_positions(corpora: Path, mixture: bool) -> None:
    """Also with several prompts, of which each epoch gives an utterance another, and with speed."""
    texts = 'texts=["A: {audio}","Write down what you hear in this recording: {audio}"]'
    config = mixed(
        corpora, f"model.prompt.{texts}", "data.augmentation.speed.probability=0.5",
        "data.microbatch_tokens=300", f"data.mixture.read.prompt.{texts.replace('A: ', '')}",
    )  # fmt: skip
    if not mixture:
        config = load_config(
            TINY,
            [f"data.train={corpora / 'read'}", f"model.prompt.{texts}", "data.num_workers=0",
             "data.microbatch_tokens=300"],
        )  # fmt: skip
    split, _ = opened(config)
    plan_of = epoch_plans(config, split)
    seen: dict[int, set[int]] = {}
    for epoch in range(3):
        flat = plan_of(epoch).flat()
        planned = iter(flat.positions.tolist())
        for data in steps_of(config, plan_of(epoch).num_steps, epoch=epoch):
            for m in data.microbatches:
                rows, columns = m.batch.tokens_BS.shape
                assert rows * columns == next(planned) <= 300
                for reference, length in zip(m.references, m.batch.lengths, strict=True):
                    seen.setdefault(reference.number, set()).add(length)
    assert any(len(lengths) > 1 for lengths in seen.values())


def test_texts_are_counted_where_that_is_cheap(
    corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = []

    def counts(*overrides: str) -> bool:
        config = mixed(corpora, *overrides)
        split, _ = opened(config)
        identities.append(data_identity(config, split))
        return split.texts is not None

    assert counts()
    assert not counts("data.text_tokens=estimate")
    monkeypatch.setattr(speechllm.prepare, "COUNTED_UTTERANCES", 38)
    assert not counts()
    assert counts("data.text_tokens=exact")
    counted, guessed, guessed_again, counted_again = identities
    assert counted == counted_again != guessed == guessed_again, "orders differ, and it is said"
    monkeypatch.setattr(speechllm.prepare, "local_path", lambda tar: None)
    with pytest.raises(ConfigError, match=r"is remote.*data\.text_tokens=estimate"):
        counts("data.text_tokens=exact")


def test_an_utterances_own_prompt_goes_before_the_data_sets(tmp_path: Path) -> None:
    write_shards(tmp_path / "own", 4, prompt="Own words: {audio}")
    config = load_config(
        TINY,
        [f"data.mixture.own.shards={tmp_path / 'own'}", "data.num_workers=0",
         'data.mixture.own.prompt.texts=["Data set: {audio}"]'],
    )  # fmt: skip
    _, text = opened(config)
    (data,) = steps_of(config, 1)
    for tokens in data.microbatches[0].batch.tokens_BS:
        assert "Own words" in text.tokenizer.decode(tokens)


@pytest.mark.parametrize("augment", [False, True])
def test_resumed_at_any_step_and_on_any_ranks_the_same_batches(
    corpora: Path, augment: bool
) -> None:
    config = mixed(corpora, *(augmented(corpora) if augment else []))
    split, _ = opened(config)
    count = epoch_plans(config, split)(0).num_steps + 2
    whole = steps_of(config, count)
    assert whole[-1].epoch == 1
    assert any(m.batch.masks is not None for d in whole for m in d.microbatches) == augment
    for step in range(1, count - 2, 2):
        assert all_facts(steps_of(config, count - step, step=step)) == all_facts(whole[step:])
    ranks = [steps_of(config, count, rank=r, world=2) for r in range(2)]
    for together, *apart in zip(whole, *ranks, strict=True):
        expected = {m.index: m for m in together.microbatches}
        found = {m.index: m for d in apart for m in d.microbatches if m.weight}
        assert found.keys() == expected.keys()
        for index, m in found.items():
            assert torch.equal(m.batch.audio_AN, expected[index].batch.audio_AN)
            assert m.batch.keys == expected[index].batch.keys
            assert (m.batch.masks is None) == (expected[index].batch.masks is None)
            for one, other in zip(
                m.batch.masks or (), expected[index].batch.masks or (), strict=True
            ):
                assert torch.equal(one, other)
    in_processes = config.model_copy(
        update={"data": config.data.model_copy(update={"num_workers": 2})}
    )
    assert all_facts(steps_of(in_processes, count)) == all_facts(whole)


def test_epochs_are_augmented_differently_and_off_is_untouched(corpora: Path) -> None:
    plain = mixed(corpora)
    changed = mixed(corpora, *augmented(corpora)[5:6])  # SpecAugment alone
    for with_masks, without in zip(steps_of(changed, 4), steps_of(plain, 4), strict=True):
        assert facts(with_masks) == facts(without)
        assert all(m.batch.masks is None for m in without.microbatches)
    split, _ = opened(changed)
    by_epoch = []
    for epoch in (0, 1):
        count = epoch_plans(changed, split)(epoch).num_steps
        masks = {}
        for data in steps_of(changed, count, epoch=epoch):
            for m in data.microbatches:
                if m.batch.masks is not None:
                    for key, row in zip(m.batch.keys, m.batch.masks.bands_H2, strict=True):
                        masks[key] = row.tolist()
        by_epoch.append(masks)
    shared = by_epoch[0].keys() & by_epoch[1].keys()
    assert any(by_epoch[0][key] != by_epoch[1][key] for key in shared)


def test_the_plan_knows_the_speed_of_every_utterance(corpora: Path) -> None:
    config = mixed(corpora, "data.augmentation.speed.probability=0.7", "seed=3")
    split, text = opened(config)
    plan_of = epoch_plans(config, split)
    for epoch in (0, 1):
        count = plan_of(epoch).num_steps
        rates = speed_rates(
            config.data.augmentation.speed, 3, epoch, hash_keys(split.corpus.column("key"))
        )
        samples = np.rint(split.corpus.durations * 16_000).astype(np.int64)
        foretold = perturbed_samples(samples, rates)
        assert len(set(rates.tolist())) == 3
        flat = plan_of(epoch).flat()
        positions = iter(flat.positions.tolist())
        for data in steps_of(config, count, epoch=epoch):
            for m, planned in zip(data.microbatches, numbers(data), strict=True):
                assert m.batch.audio_lengths_A.tolist() == foretold[planned].tolist()
                prompts = [
                    text.prompters["calls" if n < 9 else "read"].max_prompt_tokens for n in planned
                ]
                texts = split.corpus.text_lengths[planned]  # a token for each character
                rows = text.audio_tokens(foretold[planned]) + prompts + texts
                assert len(rows) * max(rows) == next(positions)
                assert len(rows) * max(rows) <= 400
                assert m.audio_seconds == pytest.approx(foretold[planned].sum() / 16_000)


def test_epochs_of_large_corpora_are_shared_by_the_processes_of_a_node(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mixed(corpora, "data.augmentation.speed.probability=0.5")
    split, _ = opened(config)
    alone = [epoch_plans(config, split)(epoch).flat() for epoch in (0, 1)]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(speechllm.training_data, "SHARED_UTTERANCES", 1)
    for _ in range(2):  # computed, then read
        for epoch, expected in enumerate(alone):
            found = epoch_plans(config, split)(epoch).flat()
            for name, values in vars(expected).items():
                assert np.array_equal(getattr(found, name), values), name
        monkeypatch.setattr(speechllm.training_data, "hash_keys", None)
    other = mixed(corpora, "data.augmentation.speed.probability=0.6")
    with pytest.raises(TypeError):  # would have to be computed
        epoch_plans(other, opened(other)[0])(0)


@pytest.mark.parametrize(
    "setting",
    [
        "model.connector.downsampling_factor=2",
        'model.prompt.texts=["Transcribe: {audio}", "{audio}"]',
    ],
)
def test_shared_epochs_are_those_of_the_model(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Another model or prompt on the same node takes other positions for the same utterances."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = (mixed(corpora, *augmented(corpora), *more) for more in ([], [setting]))
    wanted = epoch_plans(second, opened(second)[0])(1).flat()
    monkeypatch.setattr(speechllm.training_data, "SHARED_UTTERANCES", 1)
    epoch_plans(first, opened(first)[0])(1)
    found = epoch_plans(second, opened(second)[0])(1).flat()
    np.testing.assert_array_equal(found.utterances, wanted.utterances)
    np.testing.assert_array_equal(found.positions, wanted.positions)


def test_what_is_too_long_at_the_slowest_speed_is_dropped(corpora: Path) -> None:
    base, _ = opened(mixed(corpora))
    longest = int(base.costs.max())
    limit = f"data.microbatch_tokens={longest}"
    assert len(opened(mixed(corpora, limit))[0].selection.kept) == 39
    slower = [limit, "data.augmentation.speed.probability=0.1"]
    assert len(opened(mixed(corpora, *slower))[0].selection.kept) < 39
    faster = [*slower, "data.augmentation.speed.factors=[1.1, 1.2]"]
    assert len(opened(mixed(corpora, *faster))[0].selection.kept) == 39


def test_a_resumed_run_of_everything_equals_an_uninterrupted_one(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, *more: str) -> Config:
        ctc = ("train.ctc_steps=3", "train.steps=8", f"run_dir={tmp_path / name}")
        return mixed(corpora, *augmented(corpora), *ctc, *more)

    assert train(config("whole"), ALONE) == DONE
    assert len({line["epoch"] for line in metrics(tmp_path / "whole")}) > 1
    real = speechllm.train.run_step

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(speechllm.train, "run_step", interrupted)
    assert train(config("cut"), ALONE) == STOPPED
    monkeypatch.undo()
    for other, named in (
        ("data.mixture.calls.weight=2", "data.mixture"),
        ('data.mixture.calls.prompt.texts=["Another: {audio}"]', "data.mixture"),
        ("data.augmentation.speed.factors=[0.8, 1.1]", "data.augmentation.speed"),
    ):
        with pytest.raises(CheckpointError, match=named):
            train(config("cut", other), ALONE)
    assert train(config("cut"), ALONE) == DONE
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_check_says_what_an_epoch_takes(
    corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["check", TINY, f"run_dir={tmp_path}", f"data.mixture.read.shards={corpora / 'read'}",
               f"data.mixture.calls.shards={corpora / 'calls'}",
               "data.mixture.calls.weight=2.5"]  # fmt: skip
    assert main(command) == 0
    found = capsys.readouterr().out
    assert "data.mixture: 5 shards, 39 utterances" in found
    assert "calls: 2 shards, 9 utterances" in found
    assert "an epoch takes 22 (2.44 times)" in found
    assert main([*command[:-1], f"data.mixture.more.shards={corpora / 'nowhere'}"]) == 2
    assert "data.mixture.more.shards" in capsys.readouterr().out


def test_planning_memory_looks_at_the_mixture(
    corpora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [f"data.mixture.read.shards={corpora / 'read'}"]
    assert main(["plan", TINY, *shards]) == 0
    assert "utterances as in data.train" in capsys.readouterr().out
    config = mixed(corpora, "data.augmentation.speed.probability=0.1")
    split, text = opened(config)
    planned = of_split(split, text)
    assert len({u.prompt_tokens for u in planned}) == 2
    for u in planned:
        assert 0 < u.text_tokens <= split.corpus.text_lengths.max()
    samples = np.rint(split.corpus.durations * 16_000).astype(np.int64)
    slowest = perturbed_samples(samples, np.full(39, 14_400))
    assert {u.samples for u in planned} <= set(slowest.tolist())


def test_without_data_the_key_is_named(tmp_path: Path) -> None:
    config = load_config(TINY, [f"run_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"data\.train"):
        open_training(config, prepare_text(config))
