from __future__ import annotations

from pathlib import Path

import numpy as np

import pytest
from audio_tars import write_banks
from speech_files import tone
from worker_copy import worker_copy

from speechllm.config.data import Augmentation
from speechllm.data.audio import resampled_length
from speechllm.data.augmenter import Augmenter
from speechllm.errors import DataError
from speechllm.types import Utterance

UTTERANCES = [Utterance(f"utt-{i}", tone(0.5 + 0.01 * i, seed=i), "text") for i in range(30)]


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_banks(tmp_path_factory.mktemp("banks"))


def augmentation(banks: Path, **probabilities: float) -> Augmentation:
    settings: dict[str, dict[str, object]] = {
        name: {"probability": p} for name, p in probabilities.items()
    }
    for name, tar in (("noise", "noise.tar"), ("reverberation", "rooms.tar")):
        if name in settings:
            settings[name]["shards"] = [str(banks / tar)]
    return Augmentation.model_validate(settings)


EVERYTHING = dict.fromkeys(("speed", "reverberation", "noise", "telephone", "gain", "spec"), 0.5)


def heard(augmenter: Augmenter, epoch: int) -> list[object]:
    found = []
    for utterance in UTTERANCES:
        augmented, masks = augmenter(utterance, epoch)
        found.append([augmented.samples.tolist(), masks and [m.tolist() for m in masks]])
    return found


def test_off_is_the_very_same_audio(banks: Path) -> None:
    augmenter = Augmenter(Augmentation(), 1)
    for utterance in UTTERANCES:
        augmented, masks = augmenter(utterance, 3)
        assert augmented is utterance
        assert masks is None


def test_masks_alone_leave_the_samples_alone(banks: Path) -> None:
    augmenter = Augmenter(augmentation(banks, spec=1), 1)
    augmented, masks = augmenter(UTTERANCES[0], 0)
    assert augmented is UTTERANCES[0]
    assert masks is not None
    assert masks.times_G2.shape == (2, 2)


def test_the_same_in_every_process_and_another_in_each_epoch(banks: Path) -> None:
    augmenter = Augmenter(augmentation(banks, **EVERYTHING), 1)
    copy = worker_copy(augmenter)
    first = heard(augmenter, 0)
    assert heard(copy, 0) == first
    assert heard(augmenter, 0) == first
    others = [heard(augmenter, 1), heard(Augmenter(augmentation(banks, **EVERYTHING), 2), 0)]
    for other in others:
        assert sum(a != b for a, b in zip(first, other, strict=True)) > 25


def test_lengths_are_those_that_are_foretold(banks: Path) -> None:
    augmenter = Augmenter(augmentation(banks, **EVERYTHING), 1)
    rates = set()
    for utterance in UTTERANCES:
        rate = augmenter.choice(utterance.key, 0).rate
        augmented, _ = augmenter(utterance, 0)
        assert len(augmented.samples) == resampled_length(len(utterance.samples), rate)
        assert augmented.samples.dtype == np.int16
        rates.add(rate)
    assert rates == {14_400, 16_000, 17_600}


@pytest.mark.parametrize("name", [n for n in EVERYTHING if n != "spec"])
def test_each_is_heard_alone(banks: Path, name: str) -> None:
    augmenter = Augmenter(augmentation(banks, **{name: 1}), 1)
    for utterance in UTTERANCES[:5]:
        augmented, masks = augmenter(utterance, 0)
        assert masks is None
        assert not np.array_equal(augmented.samples, utterance.samples)
        assert list(augmenter.describe(augmenter.choice(utterance.key, 0))) == [name]


def test_what_was_drawn_is_told_by_name(banks: Path) -> None:
    everything = Augmenter(augmentation(banks, **dict.fromkeys(EVERYTHING, 1.0)), 1)
    told = everything.describe(everything.choice("utt-0", 0))
    assert list(told) == ["speed", "reverberation", "noise", "telephone", "gain", "spec"]
    assert told["speed"] in (0.9, 1.1)
    assert told["reverberation"] in ("0.wav", "1.wav", "2.wav")
    assert told["noise"]["name"] in [f"{i}.wav" for i in range(5)]
    assert 5 <= told["noise"]["snr"] <= 20


def test_missing_banks_are_told_at_the_start(banks: Path) -> None:
    with pytest.raises(DataError, match=r"data\.augmentation\.noise\.shards"):
        Augmenter(augmentation(banks / "nowhere", noise=0.1), 1)
