"""What is fit for a shard: rules for texts and for decoded audio, each off unless asked for.

Whatever breaks a rule raises DataError of the form `REASON: detail`, where REASON is one of a few
fixed words, so that a report can count by reason.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from speechllm.errors import DataError, UserError
from speechllm.types import SAMPLE_RATE

NORMALISERS = (
    "nfc",
    "nfkc",
    "lowercase",
    "uppercase",
    "strip-punctuation",
    "strip-brackets",
    "whisper-english",
    "whisper-basic",
)
# 20 ms
FRAME = SAMPLE_RATE // 50
SILENCE_DBFS = -40.0
FLOOR_DBFS = -96.0
_FULL_SCALE = 32767
_QUIET = round(32768 * 10 ** (SILENCE_DBFS / 20))
_MANY_FRAMES = 100
_HEARD_FRAMES = 4
_BRACKETED = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}")


@dataclass(frozen=True)
class CleanSettings:
    """min_seconds, max_seconds: bounds of an utterance's length. normalise: names of NORMALISERS,
    applied in this order. keep_text, drop_text: regular expressions, searched for in the text as
    the source gives it; a text must match one of `keep_text`, if there are any, and none of
    `drop_text`. Characters per second are those of the normalised text. max_silence: share (0 to 1)
    of 20 ms frames whose peak is under -40 dBFS. max_clipping: share of samples at full scale.
    drop_duplicate_audio: of utterances with the same samples only the first of the source stays.
    """

    min_seconds: float = 0.0
    max_seconds: float | None = None
    normalise: tuple[str, ...] = ()
    keep_text: tuple[str, ...] = ()
    drop_text: tuple[str, ...] = ()
    min_chars_per_second: float | None = None
    max_chars_per_second: float | None = None
    max_silence: float | None = None
    max_clipping: float | None = None
    drop_duplicate_audio: bool = False

    @property
    def needs_lengths(self) -> bool:
        """Whether some utterances may be dropped for their length alone."""
        bounds = (self.max_seconds, self.min_chars_per_second, self.max_chars_per_second)
        return self.min_seconds > 0 or any(bound is not None for bound in bounds)

    def __post_init__(self) -> None:
        """Raises UserError for an unknown normaliser and for a wrong regular expression."""
        for name in self.normalise:
            if name not in NORMALISERS:
                raise UserError(f"no normaliser {name!r}; there are {', '.join(NORMALISERS)}")
        for pattern in (*self.keep_text, *self.drop_text):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression ({error})") from error


class AudioStatistics(NamedTuple):
    """level: dBFS of the root mean square, at least -96. silence: share of 20 ms frames whose peak
    is under -40 dBFS. clipping: share of samples at full scale."""

    level: float
    silence: float
    clipping: float


def clean_text(text: str | None, settings: CleanSettings) -> str:
    """The text that goes into the shard. Raises DataError `no text` or `unwanted text`."""
    if text is None:
        raise DataError("no text: missing or empty")
    if settings.keep_text and not any(re.search(one, text) for one in settings.keep_text):
        raise DataError(f"unwanted text: {_shown(text)} matches no pattern of the texts to keep")
    for pattern in settings.drop_text:
        if found := re.search(pattern, text):
            raise DataError(f"unwanted text: {_shown(text)} holds {found[0]!r}, as {pattern!r}")
    clean = normalised(text, settings.normalise)
    if not clean:
        raise DataError(f"no text: nothing of {_shown(text)} is left when normalised")
    return clean


def normalised(text: str, names: Sequence[str]) -> str:
    """The text after these normalisers in turn; with any at all, spaces come out single."""
    for name in names:
        text = _normaliser(name)(text)
    return " ".join(text.split()) if names else text


def strip_punctuation(text: str) -> str:
    """Punctuation and symbols become spaces, but for apostrophes and hyphens within words.

    >>> strip_punctuation("Well-known: it's 5 %!").split()
    ['Well-known', "it's", '5']
    """
    characters = []
    for i, one in enumerate(text):
        joins = one in "'’-" and 0 < i < len(text) - 1  # noqa: RUF001
        within = joins and text[i - 1].isalnum() and text[i + 1].isalnum()
        characters.append(one if within or unicodedata.category(one)[0] not in "PS" else " ")
    return "".join(characters)


def strip_brackets(text: str) -> str:
    """Without <unk>, [noise], (laughs) and {what} stands within other brackets."""
    while (less := _BRACKETED.sub(" ", text)) != text:
        text = less
    return text


def check_length(seconds: float, settings: CleanSettings) -> None:
    """Raises DataError `too short` or `too long`."""
    if seconds < settings.min_seconds:
        raise DataError(f"too short: {seconds:.3f} s, under {settings.min_seconds:g} s")
    if settings.max_seconds is not None and seconds > settings.max_seconds:
        raise DataError(f"too long: {seconds:.3f} s, over {settings.max_seconds:g} s")


def check_pace(text: str, seconds: float, settings: CleanSettings) -> None:
    """Raises DataError `too few characters per second` or `too many characters per second`."""
    pace = len(text) / max(seconds, 1 / SAMPLE_RATE)
    least, most = settings.min_chars_per_second, settings.max_chars_per_second
    if least is not None and pace < least:
        raise DataError(f"too few characters per second: {pace:.1f}, under {least:g}")
    if most is not None and pace > most:
        raise DataError(f"too many characters per second: {pace:.1f}, over {most:g}")


def check_sound(statistics: AudioStatistics, settings: CleanSettings) -> None:
    """Raises DataError `silent` or `clipped`."""
    if settings.max_silence is not None and statistics.silence > settings.max_silence:
        raise DataError(
            f"silent: {statistics.silence:.1%} of it stays under {SILENCE_DBFS:g} dBFS, more than "
            f"{settings.max_silence:.1%}"
        )
    if settings.max_clipping is not None and statistics.clipping > settings.max_clipping:
        raise DataError(
            f"clipped: {statistics.clipping:.3%} of the samples are at full scale, more than "
            f"{settings.max_clipping:.3%}"
        )


def audio_statistics(samples: np.ndarray) -> AudioStatistics:
    """int16 [N], N > 0; of every fourth 20 ms frame where there are 100 or more.

    All frames would take a tenth of the time that decoding takes, a fourth of them takes 3 %.
    """
    frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
    heard = frames[::_HEARD_FRAMES] if len(frames) >= _MANY_FRAMES else frames
    chosen = np.ascontiguousarray(heard).ravel() if len(frames) else samples
    floats = chosen.astype(np.float32)
    power = float(np.dot(floats, floats)) / len(chosen) / 32768**2
    level = max(FLOOR_DBFS, 10 * math.log10(power)) if power > 0 else FLOOR_DBFS
    starts = np.arange(0, len(chosen), FRAME)
    highest = np.maximum.reduceat(chosen, starts)
    lowest = np.minimum.reduceat(chosen, starts)
    silent = np.count_nonzero((highest < _QUIET) & (lowest > -_QUIET))
    clipped = 0
    if highest.max() == _FULL_SCALE or lowest.min() <= -_FULL_SCALE:
        clipped = int(np.count_nonzero((chosen == _FULL_SCALE) | (chosen <= -_FULL_SCALE)))
    return AudioStatistics(level, int(silent) / len(starts), clipped / len(chosen))


def audio_hash(samples: np.ndarray) -> tuple[int, int]:
    """128 bits of the sha256 of int16 [N], in two halves: the same for the same samples, whatever
    file they came from."""
    digest = hashlib.sha256(np.ascontiguousarray(samples).data).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def first_of_equals(hashes: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """uint64 [U, 2], bool [U] -> int64 [U]: the first valid row with the same hash, itself
    included; -1 where the row is not valid."""
    first = np.full(len(hashes), -1, np.int64)
    rows = np.flatnonzero(valid)
    order = rows[np.lexsort((hashes[rows, 1], hashes[rows, 0]))]  # stable: the source's order
    if len(order) == 0:
        return first
    is_new = np.ones(len(order), bool)
    is_new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


@cache
def _normaliser(name: str) -> Callable[[str], str]:
    match name:
        case "nfc":
            return lambda text: unicodedata.normalize("NFC", text)
        case "nfkc":
            return lambda text: unicodedata.normalize("NFKC", text)
        case "lowercase":
            return str.lower
        case "uppercase":
            return str.upper
        case "strip-punctuation":
            return strip_punctuation
        case "strip-brackets":
            return strip_brackets
        case "whisper-english":
            # Imported here: it costs a quarter of a second, and few want it.
            from whisper_normalizer.english import EnglishTextNormalizer

            return EnglishTextNormalizer()
        case "whisper-basic":
            from whisper_normalizer.basic import BasicTextNormalizer

            return BasicTextNormalizer()
    raise AssertionError(name)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
