"""Manifests as tables: JSONL, CSV and TSV, with one utterance a line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from speechllm.data.sources import values
from speechllm.data.sources.lines import decoded, numbered_lines
from speechllm.data.sources.spec import Spec, name_of
from speechllm.data.sources.utterance import FileAudio, Source, SourceUtterance
from speechllm.errors import DataError

KEYS = ("id", "audio", "text", "start", "end", "duration", "channel", "ids", "root")
_REMEDY = 'a line reads {"id": "...", "audio": "path", "text": "..."}'
_NEMO = "; other names are told as in jsonl:FILE,audio=audio_filepath,ids=audio"
_ROLES = ("id", "audio", "text", "start", "end", "channel")


@dataclass(frozen=True)
class _Columns:
    """Names of the columns. duration: a column with the length from start, None where there is
    none. ids_from_audio: whether ids are made of paths, because there is no column of ids."""

    id: str
    audio: str
    text: str
    start: str
    end: str
    channel: str
    duration: str | None
    ids_from_audio: bool

    @property
    def own(self) -> frozenset[str]:
        names = {self.audio, self.text, self.start, self.end, self.channel}
        names |= {self.duration} if self.duration else set()
        return frozenset(names if self.ids_from_audio else names | {self.id})


def open_table(spec: Spec) -> Source:
    """`jsonl:`, `csv:` or `tsv:FILE`; `.gz` and urls work.

    Options: id, audio, text, start, end, duration, channel name the columns; ids=audio makes ids of
    the audio paths; root is what relative audio paths start at (default: the file's directory).
    Other columns become fields. Raises DataError naming file and line, also while it is read.
    """
    spec.accept((*KEYS, "delimiter") if spec.kind == "csv" else KEYS)
    root = spec.get("root") or values.directory_of(spec.path)
    rows: Callable[[Spec], Iterator[tuple[int, dict[str, Any]]]]
    rows = _json_rows if spec.kind == "jsonl" else _delimited_rows
    return Source(spec.path, name_of(spec.path), root, _utterances(spec, rows))


def _columns(spec: Spec) -> _Columns:
    names = {role: spec.get(role, role) or role for role in _ROLES}
    from_audio = spec.choice("ids", "column", "audio") == "audio"
    return _Columns(**names, duration=spec.get("duration"), ids_from_audio=from_audio)


def _utterances(
    spec: Spec, rows: Callable[[Spec], Iterator[tuple[int, dict[str, Any]]]]
) -> Iterator[tuple[int, SourceUtterance]]:
    columns = _columns(spec)
    own = columns.own
    number = None
    for number, row in rows(spec):
        yield number, _utterance(row, columns, own, f"{spec.path}:{number}")
    if number is None:
        raise DataError(f"{spec.path}: no lines; {_REMEDY}")


def _utterance(
    row: dict[str, Any], columns: _Columns, own: frozenset[str], where: str
) -> SourceUtterance:
    audio = _required(row, columns.audio, where)
    start = values.seconds(row.get(columns.start), columns.start, where)
    end = values.seconds(row.get(columns.end), columns.end, where)
    if columns.duration is not None:
        length = values.seconds(row.get(columns.duration), columns.duration, where)
        if start is not None and length is not None:
            end = start + length
    text = row.get(columns.text)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: `{columns.text}` must be a string, not {json.dumps(text)[:40]}")
    if columns.ids_from_audio:
        name = _id_of(audio, start, end)
    else:
        name = _required(row, columns.id, where)
    return SourceUtterance(
        id=name,
        audio=FileAudio(audio),
        text=(text or "").strip() or None,
        start=start,
        end=end,
        channel=values.channel(row.get(columns.channel), columns.channel, where),
        fields={name: value for name, value in row.items() if name not in own},
    )


def _required(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: `{column}` must be a string that is not empty; {_REMEDY}{_NEMO}")
    return value


def _id_of(audio: str, start: float | None, end: float | None) -> str:
    """`a/b.flac` -> `a/b`; with milliseconds where it is a segment."""
    stem = os.path.splitext(audio)[0]
    if start is None and end is None:
        return stem
    last = "end" if end is None else f"{round(1000 * end):07d}"
    return f"{stem}-{round(1000 * (start or 0)):07d}-{last}"


def _json_rows(spec: Spec) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in numbered_lines(spec.path):
        where = f"{spec.path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); {_REMEDY}") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object; {_REMEDY}")
        yield number, row


def _delimited_rows(spec: Spec) -> Iterator[tuple[int, dict[str, Any]]]:
    """Empty cells are left out. A CSV may quote cells (also over several lines), a TSV does not."""
    texts = (
        decoded(line, f"{spec.path}:{number}") + "\n"
        for number, line in numbered_lines(spec.path, blank=True)
    )
    if spec.kind == "tsv":
        reader = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        delimiter = spec.get("delimiter", ",") or ","
        if len(delimiter) != 1:
            raise DataError(f"{spec.given}: delimiter={delimiter}: give one character")
        reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise DataError(f"{spec.path}: no lines; its first line must name the columns")
        _require_columns(spec, header)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{spec.path}:{reader.line_num}: {len(cells)} cells, but the header names "
                    f"{len(header)} columns"
                )
            row = {k: v for k, v in zip(header, cells, strict=True) if v != ""}
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{spec.path}:{reader.line_num}: not {spec.kind} ({error})") from error


def _require_columns(spec: Spec, header: list[str]) -> None:
    columns = _columns(spec)
    wanted = {"audio": columns.audio}
    wanted |= {role: spec.options[role] for role in _ROLES if role in spec.options}
    wanted |= {"text": columns.text}
    if columns.duration is not None:
        wanted["duration"] = columns.duration
    if not columns.ids_from_audio:
        wanted["id"] = columns.id
    for role, name in wanted.items():
        if name not in header:
            more = ", or make ids of the paths with ids=audio" if role == "id" else ""
            raise DataError(
                f"{spec.path}: no column `{name}`; its columns are {', '.join(header)}; name the "
                f"right one with {role}=COLUMN{more}"
            )
