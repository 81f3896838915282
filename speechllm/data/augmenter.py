"""Applies to utterances what `augment.choose` chose for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from speechllm.config import data as schema
from speechllm.data.augment import Choice, choose, draw_masks
from speechllm.data.noise import AudioBank
from speechllm.data.waveform import (
    add_noise,
    amplify,
    as_float,
    as_int16,
    change_speed,
    reverberate,
    telephone_band,
)
from speechllm.types import SAMPLE_RATE, SpecMasks, Utterance


class Augmenter:
    """The configured augmentation of training data. Picklable; the same in every process.

    Raises DataError where noises or impulse responses are missing.
    """

    def __init__(self, settings: schema.Augmentation, seed: int) -> None:
        self._settings = settings
        self._seed = seed
        self._noises = self._responses = None
        if settings.noise.probability > 0:
            self._noises = AudioBank(settings.noise.shards, "data.augmentation.noise.shards")
        if settings.reverberation.probability > 0:
            # The channels of a response are microphones apart: their mean is no room's.
            self._responses = AudioBank(
                settings.reverberation.shards, "data.augmentation.reverberation.shards", channel=0
            )

    def __call__(self, utterance: Utterance, epoch: int) -> tuple[Utterance, SpecMasks | None]:
        """The utterance as it is heard in that epoch, and its masks, None without any.

        Raises DataError where a noise or an impulse response cannot be read.
        """
        choice = self.choice(utterance.key, epoch)
        if choice.changes_samples:
            utterance = replace(utterance, samples=self._apply(choice, utterance.samples))
        if not choice.masks:
            return utterance, None
        spec, count = self._settings.spec, len(utterance.samples)
        return utterance, draw_masks(spec, self._seed, epoch, utterance.key, count)

    def choice(self, key: str, epoch: int) -> Choice:
        return choose(self._settings, self._seed, epoch, key)

    def describe(self, choice: Choice) -> dict[str, Any]:
        """What a choice means, by the names of the configuration, JSON-able."""
        about: dict[str, Any] = {}
        if choice.rate != SAMPLE_RATE:
            about["speed"] = choice.rate / SAMPLE_RATE
        if choice.reverberation is not None and self._responses is not None:
            about["reverberation"] = self._responses.name(choice.reverberation)
        if choice.noise is not None and self._noises is not None:
            name = self._noises.name(choice.noise.which)
            about["noise"] = {"name": name, "snr": round(choice.noise.snr, 2)}
        if choice.telephone:
            about["telephone"] = True
        if choice.decibels is not None:
            about["gain"] = round(choice.decibels, 2)
        if choice.masks:
            about["spec"] = True
        return about

    def _apply(self, choice: Choice, samples: np.ndarray) -> np.ndarray:
        """int16 [N] -> int16 [N'], N' as `perturbed_samples` says."""
        wave = as_float(samples)
        if choice.rate != SAMPLE_RATE:
            wave = change_speed(wave, choice.rate)
        if choice.reverberation is not None:
            assert self._responses is not None
            wave = reverberate(wave, as_float(self._responses.read(choice.reverberation)))
        if choice.noise is not None:
            assert self._noises is not None
            noise = as_float(self._noises.read(choice.noise.which))
            wave = add_noise(wave, noise, choice.noise.start, choice.noise.snr)
        if choice.telephone:
            wave = telephone_band(wave)
        if choice.decibels is not None:
            wave = amplify(wave, choice.decibels)
        return as_int16(wave)
