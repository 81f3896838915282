"""Effects on waveforms, as pure functions of float32 samples in [-1, 1] at 16 kHz.

All keep alignment, and all but `change_speed` the length.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

import soxr

from speechllm.data.audio import resampled_length
from speechllm.types import SAMPLE_RATE

TELEPHONE_RATE = 8_000
TELEPHONE_BAND = (300.0, 3_400.0)
_TAPS = 257  # at 8 kHz: edges of about 100 Hz
_QUIET = 1e-10  # mean square below which there is nothing to set a ratio by: -100 dB


def change_speed(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples that are taken to be at `rate` Hz, at 16 kHz: speed and pitch change by the same
    factor, as in Ko et al. 2015. Their number is `resampled_length`, one at least."""
    changed = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    return _fit(changed, max(1, resampled_length(len(samples), rate)))


def reverberate(samples: np.ndarray, impulse: np.ndarray) -> np.ndarray:
    """`samples` heard in the room of an impulse response, with the energy that they had.

    The strongest tap of the response counts as the direct sound: what stands there in `samples`
    stays where it is.
    """
    direct = int(np.abs(impulse).argmax())
    wet = _convolve(samples, impulse)[direct : direct + len(samples)]
    energy = _power(wet)
    if energy < _QUIET * _QUIET:
        return samples
    return _unclipped(wet * np.float32(np.sqrt(_power(samples) / energy)))


def add_noise(samples: np.ndarray, noise: np.ndarray, start: float, snr: float) -> np.ndarray:
    """`samples` with noise at `snr` dB, the ratio of mean powers over all samples.

    start: in [0, 1), where in the noise to begin; a noise that is too short starts again. Silence
    on either side has no ratio: then nothing is added.
    """
    first = int(start * len(noise))
    part = np.take(noise, np.arange(first, first + len(samples)), mode="wrap")
    signal, disturbance = _power(samples), _power(part)
    if min(signal, disturbance) < _QUIET:
        return samples
    scale = np.sqrt(signal / disturbance / 10 ** (snr / 10))
    return _unclipped(samples + part * np.float32(scale))


def telephone_band(samples: np.ndarray) -> np.ndarray:
    """What is left after a telephone line: 300 to 3400 Hz, sampled at 8 kHz."""
    narrow = soxr.resample(samples, SAMPLE_RATE, TELEPHONE_RATE, quality="HQ")
    if not len(narrow):
        return samples
    narrow = _convolve(narrow, _band_pass())[_TAPS // 2 : _TAPS // 2 + len(narrow)]
    wide = soxr.resample(narrow, TELEPHONE_RATE, SAMPLE_RATE, quality="HQ")
    return _unclipped(_fit(wide, len(samples)))


def amplify(samples: np.ndarray, decibels: float) -> np.ndarray:
    """Louder (or softer) by `decibels`, or by what does not clip."""
    return _unclipped(samples * np.float32(10 ** (decibels / 20)))


def as_float(samples: np.ndarray) -> np.ndarray:
    """int16 -> float32 in [-1, 1)."""
    return samples.astype(np.float32) / np.float32(32768)


def as_int16(samples: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] -> int16."""
    return np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)


def _unclipped(samples: np.ndarray) -> np.ndarray:
    """As it is, or scaled down as a whole where its loudest sample would clip."""
    loudest = float(np.abs(samples).max())
    return samples / np.float32(loudest) if loudest > 1 else samples


def _power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))


def _fit(samples: np.ndarray, length: int) -> np.ndarray:
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def _convolve(samples: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The whole convolution, by one Fourier transform of a length that has small factors only."""
    length = len(samples) + len(kernel) - 1
    step = 1 << max(0, length.bit_length() - 5)
    size = -(-length // step) * step
    product = np.fft.rfft(samples, size) * np.fft.rfft(kernel, size)
    return np.fft.irfft(product, size)[:length].astype(np.float32)


@lru_cache(maxsize=1)
def _band_pass() -> np.ndarray:
    """A windowed-sinc filter for the telephone's band, at 8 kHz."""
    positions = np.arange(_TAPS) - _TAPS // 2
    low, high = (2 * edge / TELEPHONE_RATE for edge in TELEPHONE_BAND)
    kernel = high * np.sinc(high * positions) - low * np.sinc(low * positions)
    return (kernel * np.blackman(_TAPS)).astype(np.float32)
