"""STM, LDC's TDF, and Fisher's text files: lines of recording, channel, time span and text.

STM: `infmts.htm` of NIST's sctk. TDF: the header line of LDC's XTrans names the columns. Fisher:
the documentation of LDC2004T19.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from speechllm.data.sources import values
from speechllm.data.sources.lines import decoded, numbered_lines
from speechllm.data.sources.recordings import KEYS, Recordings, span_id, transcripts
from speechllm.data.sources.spec import SourceOptions, Spec, name_of
from speechllm.data.sources.utterance import Source, SourceUtterance
from speechllm.errors import DataError

_STM_LABELS = re.compile(r"<([^<>\s]*)>\s*")
_STM_IGNORED = "ignore_time_segment_in_scoring"
# `{ uh / um / @ }`: alternatives, of which the first is taken; @ stands for nothing.
_STM_ALTERNATIVES = re.compile(r"\{\s*([^{}/]*?)\s*/[^{}]*\}")
_TDF_COLUMNS = (
    "file",
    "channel",
    "start",
    "end",
    "speaker",
    "speakerType",
    "speakerDialect",
    "transcript",
)
_FISHER_LINE = re.compile(r"(\d+(?:\.\d+)?) (\d+(?:\.\d+)?) ([AB])\s?:(.*)")
_GENDERS = {"male": "m", "female": "f"}


class _Turn(NamedTuple):
    """channel: from 0. side: as the corpus calls it."""

    recording: str
    channel: int
    side: str
    start: float
    end: float
    text: str
    fields: dict[str, str]


def open_transcribed(spec: Spec, options: SourceOptions) -> Source:
    """`stm:`, `tdf:` or `fisher:FILE_OR_DIR,audio=DIR`; channel and time span select the audio.

    ids=line makes ids of file and line, for spans that occur twice. Text that is not to be scored
    (STM) is an utterance without text, which is dropped and counted. See `Recordings` for `audio`
    and `command`. Raises DataError naming file and line, also while it is read.
    """
    spec.accept(KEYS)
    recordings = Recordings(spec, options)
    turns, extensions = {
        "stm": (_stm_turns, ("stm",)),
        "tdf": (_tdf_turns, ("tdf",)),
        "fisher": (_fisher_turns, ("txt",)),
    }[spec.kind]
    paths = transcripts(spec, extensions)
    found = _utterances(spec, paths, turns, recordings)
    return Source(spec.path, name_of(spec.path), recordings.root, found)


def _utterances(
    spec: Spec,
    paths: list[str],
    turns: Callable[[str], Iterator[tuple[int, _Turn]]],
    recordings: Recordings,
) -> Iterator[tuple[int, SourceUtterance]]:
    by_line = spec.choice("ids", "span", "line") == "line"
    count = 0
    for path in paths:
        for number, turn in turns(path):
            count += 1
            name = span_id(turn.recording, turn.side, turn.start, turn.end)
            if by_line:
                name = f"{os.path.splitext(os.path.basename(path))[0]}-{number:06d}"
            utterance = SourceUtterance(
                id=name,
                audio=recordings.find(turn.recording, f"{path}:{number}"),
                text=turn.text,
                start=turn.start,
                end=turn.end,
                channel=turn.channel,
                fields={key: value for key, value in turn.fields.items() if value},
            )
            yield (number if len(paths) == 1 else count), utterance
    if count == 0:
        raise DataError(f"{spec.path}: no utterances")


def _span(start: str, end: str, where: str) -> tuple[float, float]:
    first, last = values.seconds(start, "start", where), values.seconds(end, "end", where)
    if first is None or last is None:
        raise DataError(f"{where}: start or end is empty")
    return first, last


def _stm_turns(path: str) -> Iterator[tuple[int, _Turn]]:
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        text = decoded(line, where).strip()
        if text.startswith(";;"):
            continue
        words = text.split(None, 5)
        if len(words) < 5:
            raise DataError(
                f"{where}: {len(words)} words; a line of STM reads WAVEFORM CHANNEL SPEAKER BEGIN "
                "END [<LABELS>] TEXT"
            )
        recording, side, speaker, start, end = words[:5]
        said = words[5] if len(words) == 6 else ""
        fields = {"speaker": speaker}
        if match := _STM_LABELS.match(said):
            said = said[match.end() :]
            fields["labels"] = match[1]
            genders = [_GENDERS[one] for one in match[1].split(",") if one in _GENDERS]
            fields["gender"] = genders[0] if genders else ""
        if said.strip().lower() == _STM_IGNORED:
            said = ""
        first = _STM_ALTERNATIVES.sub(lambda found: found[1].replace("@", ""), said)
        channel = _lettered(side, 1, where)
        yield number, _Turn(recording, channel, side, *_span(start, end, where), first, fields)


def _tdf_turns(path: str) -> Iterator[tuple[int, _Turn]]:
    columns = list(_TDF_COLUMNS)
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        text = decoded(line, where)
        cells = text.split("\t")
        if text.startswith("file;"):
            columns = [cell.partition(";")[0] for cell in cells]
            for column in ("file", "channel", "start", "end", "transcript"):
                if column not in columns:
                    raise DataError(f"{where}: the header has no column `{column}`")
            continue
        if text.startswith(";;"):
            continue
        if len(cells) < len(_TDF_COLUMNS):
            raise DataError(
                f"{where}: {len(cells)} cells; a line of TDF has at least {len(_TDF_COLUMNS)}, "
                "between tabs: " + ", ".join(_TDF_COLUMNS)
            )
        row = dict(zip(columns, cells, strict=False))
        fields = {
            "speaker": row.get("speaker", ""),
            "gender": _GENDERS.get(row.get("speakerType", "").lower(), ""),
            "dialect": row.get("speakerDialect", ""),
        }
        channel = _lettered(row["channel"], 0, where)
        span = _span(row["start"], row["end"], where)
        yield (
            number,
            _Turn(
                row["file"],
                channel,
                "AB"[channel : channel + 1] or str(channel),
                *span,
                row.get("transcript", ""),
                fields,
            ),
        )


def _fisher_turns(path: str) -> Iterator[tuple[int, _Turn]]:
    """One file a conversation, named like its recording."""
    recording = os.path.splitext(os.path.basename(path.removesuffix(".gz")))[0]
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        text = decoded(line, where).strip()
        if text.startswith("#"):
            continue
        match = _FISHER_LINE.fullmatch(text)
        if match is None:
            raise DataError(f"{where}: a line of Fisher reads START END A: TEXT")
        side = match[3]
        fields = {"speaker": f"{recording}-{side}"}
        channel = _lettered(side, 1, where)
        span = _span(match[1], match[2], where)
        yield number, _Turn(recording, channel, side, *span, match[4].strip(), fields)


def _lettered(side: str, first: int, where: str) -> int:
    """A or B, or a number that counts from `first`."""
    letters = {"a": 0, "b": 1}
    if side.lower() in letters:
        return letters[side.lower()]
    if side.isdecimal() and int(side) >= first:
        return int(side) - first
    raise DataError(f"{where}: channel {side!r}: give A, B or a number from {first}")
