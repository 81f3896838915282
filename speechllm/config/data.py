"""The `data` section: shards, mixtures of data sets, budgets, loading, augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from speechllm.config.model import refuse_two_audios
from speechllm.config.section import Path, Paths, Section, as_list

Probability = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=0.5, le=2)]
Range = tuple[float, float]
LARGEST = 2**31 - 1  # of what arrays of 64-bit integers are made of


def _nothing_is_empty(value: Any) -> Any:
    return {} if value is None else value


def _ascending(name: str, range_: Range) -> None:
    if range_[0] > range_[1]:
        raise ValueError(f"{name} is [lowest, highest], but {range_[0]:g} is above {range_[1]:g}")


def _need_shards(probability: float, shards: Paths, what: str) -> None:
    if probability and not shards:
        raise ValueError(f"probability is {probability:g}, but `shards` names no tars of {what}")


class DatasetPrompt(Section):
    system: str | None = Field(None, description="Replaces `model.prompt.system`; none: that one.")
    texts: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field(
        (),
        description="Replace `model.prompt.texts`; none: those. An utterance's own `prompt` field "
        "goes before either.",
    )

    @model_validator(mode="after")
    def _one_audio(self) -> DatasetPrompt:
        refuse_two_audios(self.texts)
        return self


class Dataset(Section):
    shards: Paths = Field(
        min_length=1, description="Directories or globs of tar shards with their indexes."
    )
    weight: float = Field(
        1.0,
        gt=0,
        description="Times that each utterance is heard in an epoch; 0.5: one half of them in one "
        "epoch, the other half in the next.",
    )
    max_utterances: int = Field(
        0, ge=0, description="At most so many in an epoch; others come in later ones. 0: no limit."
    )
    max_hours: float = Field(
        0.0,
        ge=0,
        description="The same in hours, at the data set's mean length of an utterance.",
    )
    prompt: DatasetPrompt = Field(DatasetPrompt(), description="What differs for this data set.")


class SpeedPerturbation(Section):
    probability: Probability = Field(0.0, description="Of an utterance to be resampled; 0: off.")
    factors: Annotated[tuple[Factor, ...], BeforeValidator(as_list)] = Field(
        (0.9, 1.1), description="Of speed and pitch; one is drawn. 0.9 is longer."
    )

    @model_validator(mode="after")
    def _has_factors(self) -> SpeedPerturbation:
        if not self.factors:
            raise ValueError("`factors` is empty; for no perturbation set probability: 0")
        return self


class Reverberation(Section):
    probability: Probability = Field(0.0, description="Of reverberation; 0: off.")
    shards: Paths = Field(
        (),
        description="Tars of impulse responses: any tar with audio, texts and indexes not needed.",
    )

    @model_validator(mode="after")
    def _has_responses(self) -> Reverberation:
        _need_shards(self.probability, self.shards, "impulse responses")
        return self


class Noise(Section):
    probability: Probability = Field(0.0, description="Of added noise; 0: off.")
    shards: Paths = Field(
        (), description="Tars of noises: any tar with audio, texts and indexes not needed."
    )
    snr: Range = Field(
        (5.0, 20.0), description="Signal-to-noise ratio in dB, drawn uniformly from this range."
    )

    @model_validator(mode="after")
    def _has_noises(self) -> Noise:
        _ascending("snr", self.snr)
        _need_shards(self.probability, self.shards, "noises")
        return self


class Telephone(Section):
    probability: Probability = Field(0.0, description="Of a band of 300 to 3400 Hz; 0: off.")


class Gain(Section):
    probability: Probability = Field(0.0, description="Of another loudness; 0: off.")
    decibels: Range = Field(
        (-10.0, 6.0), description="Drawn uniformly from this range; less where it would clip."
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> Gain:
        _ascending("decibels", self.decibels)
        return self


class SpecAugment(Section):
    probability: Probability = Field(0.0, description="Of masks on the log-mel features; 0: off.")
    time_masks: int = Field(2, ge=0, description="Spans of time that are masked.")
    time_seconds: float = Field(1.0, gt=0, description="Longest span; lengths are uniform.")
    time_fraction: float = Field(
        0.2, gt=0, le=1, description="Longest span as a part of the utterance, where that is less."
    )
    frequency_masks: int = Field(2, ge=0, description="Bands of mel bins that are masked.")
    frequency_fraction: float = Field(
        0.3, gt=0, le=1, description="Widest band as a part of all bins; widths are uniform."
    )


class Augmentation(Section):
    speed: SpeedPerturbation = Field(SpeedPerturbation(), description="First: other speeds.")
    reverberation: Reverberation = Field(Reverberation(), description="Then: rooms.")
    noise: Noise = Field(Noise(), description="Then: background noise.")
    telephone: Telephone = Field(Telephone(), description="Then: the band of a telephone.")
    gain: Gain = Field(Gain(), description="Last on the waveform: loudness.")
    spec: SpecAugment = Field(SpecAugment(), description="SpecAugment, on the device.")


class Data(Section):
    train: Paths = Field((), description="Directories or globs of tar shards with their indexes.")
    mixture: Annotated[dict[str, Dataset], BeforeValidator(_nothing_is_empty)] = Field(
        {}, description="Data sets by name, in place of `train`, each with its own weight."
    )
    temperature: float | None = Field(
        None,
        ge=1,
        description="In place of weights: shares of an epoch go with size^(1/temperature), sizes "
        "in utterances; the epoch is as long as all data sets together. 1: as they are.",
    )
    validation: Paths = Field((), description="As `train`, for evaluation during training.")
    microbatch_tokens: int = Field(
        4096,
        ge=1,
        le=LARGEST,
        description="Budget of one microbatch, padding included, in LLM positions.",
    )
    microbatches_per_step: int = Field(
        8, ge=1, le=LARGEST, description="M: microbatches of a step over all ranks together."
    )
    window: int = Field(
        20_000, ge=1, le=LARGEST, description="Utterances that are bucketed by length together."
    )
    min_seconds: float = Field(0.1, ge=0, description="Shorter utterances are dropped.")
    max_seconds: float = Field(60.0, gt=0, description="Longer utterances are dropped.")
    text_tokens: Literal["auto", "exact", "estimate"] = Field(
        "auto",
        description="How texts enter the budget of a microbatch in training. `exact`: all are read "
        "and tokenised when the data are opened, once on each node; `estimate`: by their length in "
        "the index; `auto`: exact for up to a million utterances in local or mounted files.",
    )
    characters_per_token: float = Field(
        3.0, gt=0, description="Of the estimate; above what is true, budgets are overrun."
    )
    num_workers: int = Field(2, ge=0, description="Loader processes of each rank; 0: none.")
    prefetch: int = Field(4, ge=1, description="Microbatches each worker keeps ready.")
    cache_dir: Path | None = Field(
        None,
        description="Keep what is read of remote shards (http, s3, hf) in this directory; fast "
        "local disk. All processes of a node share it, also those of other runs.",
    )
    cache_size: float = Field(
        100.0, ge=0.1, description="GiB that `cache_dir` takes at most; the oldest blocks go."
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="A larger part of unreadable utterances stops the run."
    )
    augmentation: Augmentation = Field(
        Augmentation(), description="Of the training data, by (seed, epoch, key); each is off."
    )

    @property
    def training_shards(self) -> Paths:
        """The patterns of all shards that are trained on, whichever key gives them."""
        return self.train or tuple(p for part in self.mixture.values() for p in part.shards)

    @model_validator(mode="after")
    def _some_length_fits(self) -> Data:
        if self.min_seconds > self.max_seconds:
            raise ValueError(
                f"min_seconds {self.min_seconds} is above max_seconds {self.max_seconds}; "
                "no utterance would be left"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Data:
        if self.train and self.mixture:
            raise ValueError(
                "`train` and `mixture` are both set; give the shards of `train` a name in `mixture`"
            )
        if self.temperature is None:
            return self
        if not self.mixture:
            raise ValueError("`temperature` needs a `mixture` of data sets")
        weighted = [name for name, part in self.mixture.items() if part.weight != 1]
        if weighted:
            raise ValueError(
                f"`temperature` takes the place of weights, but {weighted[0]} has weight "
                f"{self.mixture[weighted[0]].weight:g}; leave one of them out"
            )
        return self
