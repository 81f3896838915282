"""Hugging Face datasets: a `save_to_disk` folder, or what `load_dataset` finds.

The audio is never decoded by `datasets`: its Arrow files are read by memory map, row by row, by the
processes that need them. Folder: `state.json` names the Arrow files, `dataset_dict.json` the splits
(`Dataset.save_to_disk` and `DatasetDict.save_to_disk` of datasets 2 to 5). The columns' types stand
in the Arrow schema's metadata under `huggingface`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from speechllm.data.audio import AUDIO_EXTENSIONS, extension_of
from speechllm.data.reference import open_table, sniff
from speechllm.data.sources.hf_load import cached_files, spooled_files
from speechllm.data.sources.spec import Spec, name_of
from speechllm.data.sources.utterance import AudioRef, FileAudio, RowAudio, Source, SourceUtterance
from speechllm.errors import AudioError, DataError

_KEYS = ("audio", "text", "id", "split", "config", "revision", "streaming", "spool")
_TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text")
_BATCH = 1000
_MAGIC = 64


def open_hf(spec: Spec) -> Source:
    """`hf:FOLDER` of `save_to_disk`, or `hf:NAME` as `load_dataset` takes it (needs `datasets`).

    Options: split (needed where there are several), audio and text name the columns, id one with
    ids (default: `id` where there is such a column, else split and row); config and revision of
    NAME; streaming=true with spool=DIR downloads only the rows asked for (limit=N) and keeps them
    in DIR, from where every later run reads. Other columns of numbers, texts and lists become
    fields. Raises DataError, also while it is read.
    """
    spec.accept(_KEYS)
    split = spec.get("split")
    if os.path.exists(os.path.join(spec.path, "dataset_dict.json")):
        files = _split_files(spec, split)
    elif os.path.exists(os.path.join(spec.path, "state.json")):
        files = _saved_files(spec.path)
    elif spec.choice("streaming", "false", "true") == "true":
        files = spooled_files(spec)
    else:
        files = cached_files(spec)
    name = name_of(spec.path) + (f"-{split}" if split else "")
    root = os.path.dirname(os.path.abspath(files[0]))
    return Source(spec.path, name, root, _utterances(spec, files, root))


def _split_files(spec: Spec, split: str | None) -> list[str]:
    splits = _json(os.path.join(spec.path, "dataset_dict.json")).get("splits")
    if not isinstance(splits, list) or not all(isinstance(one, str) for one in splits):
        raise DataError(f"{spec.path}: dataset_dict.json names no splits; save the dataset again")
    if split is None or split not in splits:
        what = "no split is chosen" if split is None else f"has no split {split}"
        raise DataError(
            f"{spec.path}: {what}; it has {', '.join(splits)}: choose one with split=NAME"
        )
    return _saved_files(os.path.join(spec.path, split))


def _saved_files(folder: str) -> list[str]:
    told = _json(os.path.join(folder, "state.json")).get("_data_files")
    told = told if isinstance(told, list) else []
    names = [one.get("filename") for one in told if isinstance(one, dict)]
    if not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{folder}: state.json names no Arrow files; save the dataset again")
    return [os.path.join(folder, str(name)) for name in names]


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a JSON object")
    return values


def _utterances(
    spec: Spec, files: Sequence[str], root: str
) -> Iterator[tuple[int, SourceUtterance]]:
    stem = spec.get("split") or name_of(spec.path)
    number = 0
    for file in files:
        try:
            table = open_table(file)
        except AudioError as error:
            raise DataError(f"{spec.path}: {error}") from error
        columns = _columns(spec, table.schema)
        path = os.path.relpath(file, root)
        row = 0
        for batch in table.to_batches(max_chunksize=_BATCH):
            others = batch.select(columns.plain).to_pylist()
            audios = _audios(batch.column(columns.audio), path, row, columns.audio)
            for audio, cells in zip(audios, others, strict=True):
                name = f"{stem}-{number:09d}" if columns.id is None else str(cells[columns.id])
                fields = {
                    key: columns.named(key, value)
                    for key, value in cells.items()
                    if value is not None and key not in (columns.id, columns.text)
                }
                number += 1
                yield number, SourceUtterance(name, audio, cells[columns.text], fields=fields)
            row += len(others)
    if number == 0:
        raise DataError(f"{spec.path}: no rows")


def _audios(column: Any, path: str, first_row: int, name: str) -> Iterator[AudioRef]:
    """References to the cells of a column: bytes in the row, or the path of a file."""
    if _is_text(column.type):
        yield from (FileAudio(one or "") for one in column.to_pylist())
        return
    is_struct = pa.types.is_struct(column.type)
    data = pc.struct_field(column, "bytes") if is_struct else column
    has_path = is_struct and column.type.get_field_index("path") >= 0
    paths = pc.struct_field(column, "path").to_pylist() if has_path else [None] * len(column)
    for i, (there, audio_path) in enumerate(zip(data.is_valid().to_pylist(), paths, strict=True)):
        if not there and audio_path:
            yield FileAudio(audio_path)
            continue
        extension = extension_of(audio_path or "")
        if there and extension not in AUDIO_EXTENSIONS:
            extension = sniff(data[i].as_buffer()[:_MAGIC].to_pybytes())
        yield RowAudio(path, first_row + i, name, extension)


class _Columns(NamedTuple):
    """plain: every column that becomes id, text or field. classes: names of a column of numbers."""

    audio: str
    text: str
    id: str | None
    plain: list[str]
    classes: dict[str, list[str]]

    def named(self, column: str, value: Any) -> Any:
        names = self.classes.get(column)
        if names is not None and isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return value


def _columns(spec: Spec, schema: Any) -> _Columns:
    features = _features(schema)
    audio = _audio_column(spec, schema, features)
    plain = [field.name for field in schema if field.name != audio and _is_plain(field.type)]
    text = spec.get("text") or next((name for name in _TEXTS if name in plain), None)
    if text is None or text not in plain or not _is_text(schema.field(text).type):
        what = "no column is called text" if text is None else f"no column of texts {text!r}"
        raise DataError(
            f"{spec.path}: {what}; its columns are {_listed(schema)}: name it with text=COLUMN"
        )
    name = spec.get("id") or ("id" if "id" in plain and text != "id" else None)
    if name is not None and name not in plain:
        raise DataError(f"{spec.path}: no column {name!r}; its columns are {_listed(schema)}")
    classes = {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    return _Columns(audio, text, name, plain, classes)


def _audio_column(spec: Spec, schema: Any, features: dict[str, Any]) -> str:
    found = spec.get("audio")
    if found is None:
        typed = [
            name
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "Audio"
        ]
        found = typed[0] if len(typed) == 1 else "audio"
    if found not in schema.names:
        raise DataError(
            f"{spec.path}: no column {found!r}; its columns are {_listed(schema)}: name it with "
            "audio=COLUMN"
        )
    kind = schema.field(found).type
    good = _is_text(kind) or _is_bytes(kind)
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        good = place >= 0 and _is_bytes(kind.field(place).type)
    if not good:
        raise DataError(
            f"{spec.path}: column {found!r} is of type {kind}, which holds no audio file; save the "
            "dataset with a column of the type datasets.Audio (Dataset.cast_column)"
        )
    return found


def _features(schema: Any) -> dict[str, Any]:
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _listed(schema: Any) -> str:
    return ", ".join(schema.names)


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_plain(kind: Any) -> bool:
    """Whether JSON can hold it."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_plain(kind.value_type)
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return _is_text(kind) or any(is_one(kind) for is_one in numbers)
