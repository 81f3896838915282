"""Common Voice: LANGUAGE/validated.tsv (or train.tsv, ...) and LANGUAGE/clips/*.mp3.

Columns: https://github.com/common-voice/cv-dataset, "fields"; older releases call `accents`
`accent`, and leave the .mp3 off the path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from speechllm.data.sources.lines import decoded, numbered_lines
from speechllm.data.sources.spec import Spec, name_of
from speechllm.data.sources.utterance import FileAudio, Source, SourceUtterance
from speechllm.errors import DataError

_REQUIRED = ("path", "sentence")
_FIELDS = {
    "client_id": "speaker",
    "locale": "lang",
    "gender": "gender",
    "age": "age",
    "accents": "accent",
    "accent": "accent",
    "variant": "variant",
    "sentence_domain": "domain",
}


def open_common_voice(spec: Spec) -> Source:
    """`commonvoice:LANGUAGE_DIR` takes validated.tsv; tsv=NAME or the path of a .tsv another one.

    Fields: speaker, lang, gender, age, accent, variant, domain, where they are told. Raises
    DataError naming file and line, also while it is read.
    """
    spec.accept(("tsv",))
    path = os.path.abspath(spec.path)
    if path.endswith(".tsv"):
        directory = os.path.dirname(path)
    else:
        directory, name = path, spec.get("tsv", "validated.tsv") or "validated.tsv"
        path = os.path.join(directory, name if name.endswith(".tsv") else f"{name}.tsv")
        if not os.path.exists(path):
            there = sorted(f for f in _listed(directory) if f.endswith(".tsv"))
            raise DataError(
                f"{path}: no such file; {directory} has "
                f"{', '.join(there) or 'no .tsv: give the directory of one language'}"
            )
    name = f"{name_of(directory)}-{name_of(path)}"
    return Source(path, name, os.path.join(directory, "clips"), _utterances(path))


def _listed(directory: str) -> list[str]:
    return os.listdir(directory) if os.path.isdir(directory) else []


def _utterances(path: str) -> Iterator[tuple[int, SourceUtterance]]:
    header: list[str] | None = None
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        cells = decoded(line, where).split("\t")
        if header is None:
            header = cells
            for column in _REQUIRED:
                if column not in header:
                    raise DataError(
                        f"{where}: no column `{column}`; its columns are {', '.join(header)}"
                    )
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{where}: {len(cells)} cells, but the header names {len(header)} columns"
            )
        row = dict(zip(header, cells, strict=True))
        clip = row["path"]
        if not clip:
            raise DataError(f"{where}: `path` is empty")
        stem, extension = os.path.splitext(clip)
        fields = {ours: row[theirs] for theirs, ours in _FIELDS.items() if row.get(theirs)}
        audio = FileAudio(clip if extension else f"{clip}.mp3")
        yield number, SourceUtterance(stem, audio, row["sentence"].strip() or None, fields=fields)
    if header is None:
        raise DataError(f"{path}: no lines; its first line must name the columns")
