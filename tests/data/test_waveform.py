from __future__ import annotations

import numpy as np

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechllm.data.audio import resampled_length
from speechllm.data.waveform import (
    add_noise,
    amplify,
    as_float,
    as_int16,
    change_speed,
    reverberate,
    telephone_band,
)

RATE = 16_000


def white(length: int, *, seed: int = 0, level: float = 0.1) -> np.ndarray:
    random = np.random.default_rng([5, seed])
    return (level * random.standard_normal(length)).astype(np.float32)


def sine(hertz: float, length: int, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(length) / RATE)).astype(np.float32)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(one.astype(float) ** 2) / np.mean(other.astype(float) ** 2)))


def loudest_frequency(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * RATE / len(samples))


@given(st.integers(1, 5_000), st.integers(8_000, 32_000))
@settings(max_examples=80, deadline=None)
def test_speed_gives_the_length_that_is_foretold(length: int, rate: int) -> None:
    changed = change_speed(white(length), rate)
    assert len(changed) == max(1, resampled_length(length, rate))
    assert changed.dtype == np.float32
    assert np.isfinite(changed).all()


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_changes_pitch_and_duration_and_nothing_else(factor: float) -> None:
    slow = change_speed(sine(1_000, 32_000), round(factor * RATE))
    assert loudest_frequency(slow) == pytest.approx(1_000 * factor, abs=1)
    assert decibels(slow, sine(1_000, 32_000)) == pytest.approx(0, abs=0.05)
    expected = sine(1_000 * factor, len(slow))
    assert np.abs(slow - expected)[500:-500].max() < 2e-3


@given(
    st.floats(-5, 40), st.floats(0, 1, exclude_max=True), st.integers(1, 9_000), st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_the_ratio_of_signal_to_noise_is_reached(
    snr: float, start: float, noise_length: int, seed: int
) -> None:
    signal = as_float(as_int16(white(8_000, seed=seed)))
    noise = white(noise_length, seed=seed + 100, level=0.003)
    noisy = as_float(as_int16(add_noise(signal, noise, start, snr)))
    first = int(start * noise_length)
    part = np.take(noise, np.arange(first, first + 8_000), mode="wrap")
    # Where the sum would have clipped, the whole of it was made softer.
    weights, *_ = np.linalg.lstsq(np.stack([signal, part], 1), noisy, rcond=None)
    assert decibels(weights[0] * signal, weights[1] * part) == pytest.approx(snr, abs=0.1)
    assert np.abs(noisy).max() <= 1


def test_noise_that_starts_again_and_silence() -> None:
    signal = white(1_000)
    noise = np.array([1, 2, 3], np.float32)
    added = add_noise(signal, noise, 0.5, 10) - signal
    assert added / added[0] == pytest.approx(np.resize([2, 3, 1], 1_000) / 2, rel=1e-2)
    silence = np.zeros(1_000, np.float32)
    assert (add_noise(signal, silence, 0, 10) == signal).all()
    assert not add_noise(silence, noise, 0, 10).any()


def test_a_sum_that_would_clip_is_made_softer_as_a_whole() -> None:
    signal, noise = sine(500, 8_000, 0.9), white(8_000)
    noisy = add_noise(signal, noise, 0, 0)
    assert np.abs(noisy).max() == pytest.approx(1)
    weights, *_ = np.linalg.lstsq(np.stack([signal, noise], 1), noisy, rcond=None)
    assert decibels(weights[0] * signal, weights[1] * noise) == pytest.approx(0, abs=0.1)


def room(direct: int, length: int = 4_000) -> np.ndarray:
    random = np.random.default_rng(9)
    tail = random.standard_normal(length) * np.exp(-np.arange(length) / 500) * 0.1
    tail[:direct] = 0
    tail[direct] = 1
    return tail.astype(np.float32)


@pytest.mark.parametrize("direct", [0, 37, 3_999])
def test_reverberation_keeps_alignment_length_and_energy(direct: int) -> None:
    dry = np.concatenate([np.zeros(3_000, np.float32), white(8_001)])
    wet = reverberate(dry, room(direct))
    assert len(wet) == len(dry)
    assert decibels(wet, dry) == pytest.approx(0, abs=0.01)
    assert np.abs(wet[:3_000]).max() < 1e-6, "nothing is heard before it is said"
    lags = [float(np.dot(wet[3_050 + k : 10_950 + k], dry[3_050:10_950])) for k in range(-40, 41)]
    assert int(np.argmax(lags)) - 40 == 0


def test_reverberation_is_a_convolution() -> None:
    dry, response = white(3_000), room(20)
    wet = reverberate(dry, response)
    expected = np.convolve(dry.astype(float), response)[20:3_020]
    assert wet / np.linalg.norm(wet) == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)


def test_responses_of_no_use_change_nothing() -> None:
    dry = white(500)
    assert (reverberate(dry, np.zeros(10, np.float32)) == dry).all()
    one = reverberate(dry, np.array([0.25], np.float32))
    assert one == pytest.approx(dry, abs=1e-6)
    assert not reverberate(np.zeros(500, np.float32), room(3)).any()


def test_a_telephone_passes_its_band_and_no_other() -> None:
    def passed(hertz: float) -> float:
        tone = sine(hertz, 16_000)
        return decibels(telephone_band(tone)[800:-800] + 1e-9, tone[800:-800])

    for hertz in (400, 1_000, 2_000, 3_200):
        assert passed(hertz) == pytest.approx(0, abs=0.5)
    for hertz in (60, 150, 3_700, 4_500, 7_000):
        assert passed(hertz) < -35


@pytest.mark.parametrize("length", [1, 2, 3, 159, 16_001])
def test_a_telephone_keeps_length_and_place(length: int) -> None:
    heard = telephone_band(white(length))
    assert len(heard) == length
    assert np.isfinite(heard).all()
    tone = sine(1_000, 4_001)
    assert np.abs(telephone_band(tone) - tone)[300:-300].max() < 0.01


def test_gain() -> None:
    soft = white(2_000, level=0.05)
    assert decibels(amplify(soft, 6), soft) == pytest.approx(6)
    assert decibels(amplify(soft, -20), soft) == pytest.approx(-20)
    loud = amplify(sine(440, 2_000), 20)
    assert np.abs(loud).max() == pytest.approx(1)
    assert loudest_frequency(loud) == pytest.approx(440, abs=8)


def test_samples_survive_the_way_there_and_back() -> None:
    samples = np.array([-32768, -1, 0, 1, 32767], np.int16)
    assert as_int16(as_float(samples)).tolist() == samples.tolist()
    assert as_int16(np.array([-1.0, 1.0, 2.0], np.float32)).tolist() == [-32768, 32767, 32767]
