from __future__ import annotations

import numpy as np

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.config.data import Augmentation, SpecAugment, SpeedPerturbation
from speechllm.data.augment import (
    Choice,
    choose,
    draw_masks,
    is_on,
    perturbed_samples,
    slowest_rate,
    speed_rates,
)
from speechllm.data.keys import hash_keys

KEYS = [f"utt-{i}" for i in range(2_000)]


def some(probability: float = 0.3) -> Augmentation:
    return Augmentation.model_validate(
        {
            "speed": {"probability": probability, "factors": [0.9, 1.0, 1.1]},
            "reverberation": {"probability": probability, "shards": ["rooms"]},
            "noise": {"probability": probability, "shards": ["noises"], "snr": [3, 12]},
            "telephone": {"probability": probability},
            "gain": {"probability": probability, "decibels": [-6, 4]},
            "spec": {"probability": probability},
        }
    )


def test_off_by_default() -> None:
    assert not is_on(Augmentation())
    assert {choose(Augmentation(), 1, 0, key) for key in KEYS[:200]} == {Choice()}
    assert not Choice().changes_samples
    assert not Choice(masks=True).changes_samples
    assert is_on(some())


def test_each_happens_as_often_as_it_should_with_values_of_its_range() -> None:
    chosen = [choose(some(), 1, 0, key) for key in KEYS]
    happened = {
        "speed": np.mean([c.rate != 16_000 for c in chosen]) * 3 / 2,  # one factor of three is 1
        "reverberation": np.mean([c.reverberation is not None for c in chosen]),
        "noise": np.mean([c.noise is not None for c in chosen]),
        "telephone": np.mean([c.telephone for c in chosen]),
        "gain": np.mean([c.decibels is not None for c in chosen]),
        "spec": np.mean([c.masks for c in chosen]),
    }
    assert happened == pytest.approx(dict.fromkeys(happened, 0.3), abs=0.05)
    assert {c.rate for c in chosen} == {14_400, 16_000, 17_600}
    ratios = [c.noise.snr for c in chosen if c.noise]
    gains = [c.decibels for c in chosen if c.decibels is not None]
    assert 3 <= min(ratios) < 3.5 < 11.5 < max(ratios) <= 12
    assert -6 <= min(gains) < -5.5 < 3.5 < max(gains) <= 4
    both = np.mean([c.telephone and c.masks for c in chosen])
    assert both == pytest.approx(0.09, abs=0.03), "one says nothing of another"


def test_seed_epoch_and_key_decide() -> None:
    def of(seed: int, epoch: int) -> list[Choice]:
        return [choose(some(0.5), seed, epoch, key) for key in KEYS[:50]]

    assert of(1, 2) == of(1, 2)
    assert of(1, 2) != of(2, 1)
    assert of(1, 2) != of(1, 3)
    assert len(set(of(1, 2))) > 25


def test_one_augmentation_leaves_the_draws_of_the_others_alone() -> None:
    without = some().model_copy(update={"noise": Augmentation().noise})
    for key in KEYS[:50]:
        changed, before = choose(without, 1, 0, key), choose(some(), 1, 0, key)
        assert changed.noise is None
        assert (changed.rate, changed.decibels) == (before.rate, before.decibels)


def test_the_plan_and_the_reader_see_the_same_speed() -> None:
    speed = some().speed
    for epoch in (0, 5):
        of_plan = speed_rates(speed, 3, epoch, hash_keys(KEYS[:300]))
        of_reader = [choose(some(), 3, epoch, key).rate for key in KEYS[:300]]
        assert of_plan.tolist() == of_reader
        assert len(set(of_reader)) == 3


def test_perturbed_lengths() -> None:
    samples = np.array([1, 9, 16_000, 16_001])
    slower = perturbed_samples(samples, np.full(4, 14_400))
    assert slower.tolist() == [1, 10, 17_778, 17_779]
    assert perturbed_samples(samples, np.full(4, 16_000)).tolist() == samples.tolist()
    assert perturbed_samples(samples, np.full(4, 32_000)).tolist() == [1, 5, 8_000, 8_001]
    assert slowest_rate(SpeedPerturbation()) == 16_000
    assert slowest_rate(SpeedPerturbation(probability=0.1)) == 14_400
    assert slowest_rate(SpeedPerturbation(probability=1, factors=(1.1, 1.2))) == 16_000


@given(
    st.builds(
        SpecAugment,
        time_masks=st.integers(0, 3),
        frequency_masks=st.integers(0, 3),
        time_seconds=st.floats(0.01, 3),
        time_fraction=st.floats(0.01, 1),
        frequency_fraction=st.floats(0.01, 1),
    ),
    st.integers(1, 100_000),
    st.integers(0, 10),
)
@settings(max_examples=100, deadline=None)
def test_masks_lie_within_the_utterance_and_their_limits(
    spec: SpecAugment, samples: int, epoch: int
) -> None:
    masks = draw_masks(spec, 1, epoch, "k", samples)
    frames = samples // 160
    assert masks.times_G2.shape == (spec.time_masks, 2)
    assert masks.bands_H2.shape == (spec.frequency_masks, 2)
    widths = np.diff(masks.times_G2)
    assert (masks.times_G2 >= 0).all()
    assert (masks.times_G2 <= frames).all()
    assert (widths >= 0).all()
    assert (widths <= min(round(spec.time_seconds * 100), spec.time_fraction * frames)).all()
    assert (masks.bands_H2 >= 0).all()
    assert (masks.bands_H2 <= 1).all()
    assert (np.diff(masks.bands_H2) <= spec.frequency_fraction + 1e-6).all()


def test_masks_reach_every_width_and_place() -> None:
    spec = SpecAugment(time_masks=1, frequency_masks=1, time_seconds=0.1, time_fraction=1)
    keys = KEYS[:600]
    drawn = [draw_masks(spec, 1, 0, key, 160 * 50) for key in keys]
    times = np.concatenate([m.times_G2 for m in drawn])
    assert set(np.diff(times)[:, 0].tolist()) == set(range(11))
    assert times.min() == 0
    assert times.max() == 50
    bands = np.concatenate([m.bands_H2 for m in drawn])
    assert np.diff(bands).mean() == pytest.approx(0.15, abs=0.015)
    again = np.concatenate([draw_masks(spec, 1, 0, key, 160 * 50).times_G2 for key in keys])
    assert (times == again).all()
