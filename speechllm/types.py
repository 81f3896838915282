"""The few values that travel between the floors of the package.

Shape legend: B examples of a microbatch, S positions of the LLM, A audio segments of a microbatch,
N samples at 16 kHz, G masks in time, H masks in frequency, T encoder frames of width D.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:  # so that tools which only move audio start without torch
    import torch
    from torch import Tensor

from speechllm.errors import (
    CheckpointError as CheckpointError,
)
from speechllm.errors import (
    ConfigError as ConfigError,
)
from speechllm.errors import (
    DataError as DataError,
)
from speechllm.errors import (
    ModelError as ModelError,
)
from speechllm.errors import (
    UserError as UserError,
)

SAMPLE_RATE = 16_000
IGNORE = -100
Objective = Literal["lm", "ctc"]  # see SpeechLLM.forward
# Each asks a run to finish its step, save and leave.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class EncodedAudio(NamedTuple):
    """What the encoder made of an utterance, as it is kept on disk.

    num_samples: at 16 kHz, of the audio. values_TD: int16, the bits of bf16 numbers; or int8, which
    its column's scale multiplies. scales_D: fp32, of int8 only.
    """

    num_samples: int
    values_TD: np.ndarray
    scales_D: np.ndarray | None = None


@dataclass(frozen=True)
class Utterance:
    """One decoded utterance.

    samples: int16 [N], mono, 16 kHz; none where `encoded` stands for them. fields: whatever else
    the metadata held (lang, speaker, ...).
    """

    key: str
    samples: np.ndarray
    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    encoded: EncodedAudio | None = None

    @property
    def num_samples(self) -> int:
        return len(self.samples) if self.encoded is None else self.encoded.num_samples

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_samples / SAMPLE_RATE


@dataclass(frozen=True)
class TextSegment:
    tokens: tuple[int, ...]
    trained: bool = False


class SpecMasks(NamedTuple):
    """Masks on the log-mel features of audio segments (SpecAugment); empty ones mask nothing.

    Of one segment as numpy arrays, of a batch as tensors with a first axis A.
    times_G2: int64, mel frames (100 per second): the first, and the one after the last.
    bands_H2: float32, edges as parts of the mel axis: a bin whose middle lies within is masked.
    """

    times_G2: Any
    bands_H2: Any


@dataclass(frozen=True)
class AudioSegment:
    """samples: int16 [N], mono, 16 kHz; none where `encoded` stands for them."""

    samples: np.ndarray
    masks: SpecMasks | None = None
    encoded: EncodedAudio | None = None

    @property
    def num_samples(self) -> int:
        return len(self.samples) if self.encoded is None else self.encoded.num_samples


Segment = TextSegment | AudioSegment


@dataclass(frozen=True)
class Example:
    """What one row of a batch is made of: any sequence of text and audio."""

    key: str
    segments: tuple[Segment, ...]


class Frames(NamedTuple):
    """Encoder outputs of a batch's audio segments, zero padded; as many of a row as its samples
    give. values_ATD: bf16, or int8, which scales_AD (fp32) multiply."""

    values_ATD: Tensor
    scales_AD: Tensor | None

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """[A, T, D] in that type."""
        if self.scales_AD is None:
            return self.values_ATD.to(dtype)
        return (self.values_ATD * self.scales_AD[:, None]).to(dtype)


@dataclass
class Batch:
    """A collated microbatch.

    Audio tokens fill the True positions of `audio_mask_BS` in row-major order, taking the audio
    segments (rows of `audio_AN`) in order; each row's number of tokens is what the connector's
    `out_length` says for its `audio_lengths_A`.

    Places are indices into the flattened [B * S] and say again what masks and labels say; they and
    what stands in tuples are made with the batch, so that no step has to ask the device for them.
    """

    keys: list[str]
    audio_AN: Tensor  # int16, zero padded
    audio_lengths_A: Tensor  # int64, samples
    tokens_BS: Tensor  # int64, any valid id where there is audio or padding
    audio_mask_BS: Tensor  # bool
    attention_mask_BS: Tensor  # int64, 1 where there is something
    labels_BS: Tensor  # int64, IGNORE except on trained tokens; labels[t] is the token AT t
    audio_places_K: Tensor  # int64, of the True positions of `audio_mask_BS`
    audio_sources_K: Tensor  # int64, which token goes there, in [A, most tokens of any] flattened
    label_places_L: Tensor  # int64, of the position before each trained token, which predicts it
    targets_L: Tensor  # int64, these tokens
    lengths: tuple[int, ...]  # of each row: positions that are no padding
    audio_samples: tuple[int, ...]  # as `audio_lengths_A`
    most_audio_tokens: int  # of any segment
    opening: tuple[int, ...]  # of all rows, see `speechllm.data.prefix.opening`
    pad_left: bool = False
    masks: SpecMasks | None = None  # of the audio segments; none where none has any
    frames: Frames | None = None  # of all audio segments, in place of samples: audio_AN has none

    def to(self, device: torch.device) -> Batch:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With every tensor changed, also those within a field."""
        return replace(self, **{f.name: _map(getattr(self, f.name), change) for f in fields(self)})

    @property
    def num_target_tokens(self) -> int:
        """Labels that the loss sees: other than IGNORE, and not the first of a row."""
        return len(self.targets_L)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, SpecMasks | Frames):
        return type(value)(*(_map(tensor, change) for tensor in value))
    is_tensor = hasattr(value, "untyped_storage")  # asked so, it is not imported for this
    return change(value) if is_tensor else value


@dataclass(frozen=True)
class BadUtterance:
    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class Reference:
    """What decoding needs to know of a row.

    number: its place in the corpus. id: as its metadata gives it, else its key. duration: seconds.
    """

    number: int
    id: str
    text: str
    duration: float


@dataclass
class Microbatch:
    """One microbatch of a step, as a rank receives it.

    index: its place among the M microbatches of the step. weight: 1, or 0 for a microbatch that is
    run only so that the collectives of all ranks match (a repeat, or silence in place of a
    microbatch in which nothing could be read).
    """

    index: int
    weight: float
    batch: Batch
    utterances: int
    audio_seconds: float
    references: tuple[Reference, ...] = ()  # one a row of the batch, where there is no silence
    bad: tuple[BadUtterance, ...] = ()


@dataclass
class StepData:
    """All microbatches of one step for one rank. `step` counts within the epoch, from 0."""

    epoch: int
    step: int
    microbatches: list[Microbatch]


class LossSums(NamedTuple):
    """Sums over the target tokens of a microbatch: cross entropy in nats (fp32), right guesses."""

    loss: Tensor
    correct: Tensor
    tokens: Tensor
