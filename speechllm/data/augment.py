"""Which augmentation an utterance gets: a pure function of (seed, epoch, key).

Nothing here touches audio, so the plan of an epoch knows every perturbed length, and it does not
matter which rank or worker reads an utterance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speechllm.config import data as schema
from speechllm.data.audio import resampled_length
from speechllm.data.keys import hash_keys, uniforms
from speechllm.types import SAMPLE_RATE, SpecMasks

MEL_HOP = 160  # samples of a mel frame
_CHUNK = 1 << 18  # utterances at a time, so that what is drawn on the way stays small
_DRAWS = (
    "speed?", "speed", "reverberation?", "reverberation", "noise?", "noise", "noise start",
    "noise snr", "telephone?", "gain?", "gain", "spec?",
)  # fmt: skip


@dataclass(frozen=True)
class AddedNoise:
    """which, start: in [0, 1), of the noises and of the chosen one. snr: dB."""

    which: float
    start: float
    snr: float


@dataclass(frozen=True)
class Choice:
    """What one utterance gets in one epoch, in the order in which it is done.

    rate: Hz at which its samples are taken to be, SAMPLE_RATE to leave its speed as it is.
    reverberation: which impulse response, in [0, 1). decibels: of the gain. masks: whether it gets
    those of `draw_masks`.
    """

    rate: int = SAMPLE_RATE
    reverberation: float | None = None
    noise: AddedNoise | None = None
    telephone: bool = False
    decibels: float | None = None
    masks: bool = False

    @property
    def changes_samples(self) -> bool:
        return self != Choice(masks=self.masks)


def is_on(settings: schema.Augmentation) -> bool:
    """Whether any augmentation can happen at all."""
    return any(getattr(settings, name).probability > 0 for name in type(settings).model_fields)


def choose(settings: schema.Augmentation, seed: int, epoch: int, key: str) -> Choice:
    """What the utterance of that key gets in that epoch."""
    hashes = hash_keys([key])
    drawn = dict(zip(_DRAWS, uniforms(seed, epoch, hashes, _DRAWS)[0].tolist(), strict=True))

    def happens(name: str) -> bool:
        return drawn[f"{name}?"] < getattr(settings, name).probability

    noise = None
    if happens("noise"):
        snr = _between(settings.noise.snr, drawn["noise snr"])
        noise = AddedNoise(drawn["noise"], drawn["noise start"], snr)
    return Choice(
        rate=int(speed_rates(settings.speed, seed, epoch, hashes)[0]),
        reverberation=drawn["reverberation"] if happens("reverberation") else None,
        noise=noise,
        telephone=happens("telephone"),
        decibels=_between(settings.gain.decibels, drawn["gain"]) if happens("gain") else None,
        masks=happens("spec"),
    )


def speed_rates(
    speed: schema.SpeedPerturbation, seed: int, epoch: int, hashes: np.ndarray
) -> np.ndarray:
    """Hz at which the samples of each utterance are taken to be: int64 [U].

    hashes: uint64 [U], of the keys.
    """
    rates = np.array([round(factor * SAMPLE_RATE) for factor in speed.factors], dtype=np.int64)
    found = np.full(len(hashes), SAMPLE_RATE, dtype=np.int64)
    for at in range(0, len(hashes), _CHUNK):
        drawn = uniforms(seed, epoch, hashes[at : at + _CHUNK], ("speed?", "speed"))
        chosen = rates[(drawn[:, 1] * len(rates)).astype(np.int64)]
        np.copyto(found[at : at + _CHUNK], chosen, where=drawn[:, 0] < speed.probability)
    return found


def perturbed_samples(samples: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Samples of each utterance (int64 [U]) taken to be at `rates` Hz, one at least: int64 [U]."""
    return np.maximum(resampled_length(samples, rates), 1)


def slowest_rate(speed: schema.SpeedPerturbation) -> int:
    """Of those that can be drawn: the one that makes an utterance longest."""
    slowest = min(speed.factors) if speed.probability > 0 else 1.0
    return min(SAMPLE_RATE, round(slowest * SAMPLE_RATE))


def draw_masks(
    spec: schema.SpecAugment, seed: int, epoch: int, key: str, num_samples: int
) -> SpecMasks:
    """The masks of SpecAugment (Park et al. 2019) for an utterance of so many samples.

    Widths and places are uniform. Bands are given as parts of the mel axis, so that they suit any
    number of bins.
    """
    names = [
        f"{axis} {i} {what}"
        for axis, count in (("time", spec.time_masks), ("band", spec.frequency_masks))
        for i in range(count)
        for what in ("width", "place")
    ]
    drawn_G2 = uniforms(seed, epoch, hash_keys([key]), names)[0].reshape(-1, 2)
    times_G2, bands_G2 = drawn_G2[: spec.time_masks], drawn_G2[spec.time_masks :]
    frames = num_samples // MEL_HOP
    longest = min(
        round(spec.time_seconds * SAMPLE_RATE / MEL_HOP), int(spec.time_fraction * frames)
    )
    widths = (times_G2[:, 0] * (longest + 1)).astype(np.int64)
    firsts = (times_G2[:, 1] * (frames - widths + 1)).astype(np.int64)
    band_widths = bands_G2[:, 0] * spec.frequency_fraction
    lows = bands_G2[:, 1] * (1 - band_widths)
    return SpecMasks(
        np.stack([firsts, firsts + widths], axis=1),
        np.stack([lows, lows + band_widths], axis=1).astype(np.float32),
    )


def _between(bounds: tuple[float, float], part: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * part
