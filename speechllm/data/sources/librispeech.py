"""LibriSpeech trees: .../SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac beside *.trans.txt.

Layout: the README of https://www.openslr.org/12.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from speechllm.data.sources import values
from speechllm.data.sources.lines import decoded, numbered_lines
from speechllm.data.sources.spec import Spec, name_of
from speechllm.data.sources.utterance import FileAudio, Source, SourceUtterance
from speechllm.errors import DataError

_TRANSCRIPTS = ".trans.txt"
# SPEAKERS.TXT stands beside the subsets, e.g. LibriSpeech/train-clean-100.
_LEVELS_UP = 3


def open_librispeech(spec: Spec) -> Source:
    """`librispeech:DIR`, the whole corpus or one part of it. Fields: speaker, chapter, gender.

    An audio file without a transcript is an utterance without text, which is dropped and counted.
    Raises DataError naming file and line, also while it is read.
    """
    spec.accept(())
    values.require_directory(spec.path, "give the directory that the corpus was unpacked to")
    return Source(spec.path, name_of(spec.path), os.path.abspath(spec.path), _utterances(spec.path))


def _utterances(directory: str) -> Iterator[tuple[int, SourceUtterance]]:
    genders = _genders(directory)
    number = 0
    for folder, files in values.walk(directory):
        transcripts = [file for file in files if file.endswith(_TRANSCRIPTS)]
        if not transcripts:
            continue
        texts: dict[str, str] = {}
        for file in transcripts:
            _add_texts(os.path.join(folder, file), texts)
        recorded = {os.path.splitext(file)[0] for file in files if file.endswith(".flac")}
        for name in sorted(texts.keys() | recorded):
            number += 1
            path = os.path.relpath(os.path.join(folder, f"{name}.flac"), directory)
            speaker, _, rest = name.partition("-")
            fields = {"speaker": speaker, "chapter": rest.partition("-")[0]}
            if speaker in genders:
                fields["gender"] = genders[speaker]
            yield number, SourceUtterance(name, FileAudio(path), texts.get(name), fields=fields)
    if number == 0:
        raise DataError(
            f"{directory}: no *{_TRANSCRIPTS} below it; LibriSpeech has "
            "SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt"
        )


def _add_texts(path: str, texts: dict[str, str]) -> None:
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        words = decoded(line, where).split(None, 1)
        if words[0] in texts:
            raise DataError(f"{where}: {words[0]} has a transcript already")
        texts[words[0]] = words[1].strip() if len(words) == 2 else ""


def _genders(directory: str) -> dict[str, str]:
    """`f` or `m` by speaker, as SPEAKERS.TXT tells; nothing where there is no such file."""
    here = os.path.abspath(directory)
    for _ in range(_LEVELS_UP):
        path = os.path.join(here, "SPEAKERS.TXT")
        if os.path.exists(path):
            break
        here = os.path.dirname(here)
    else:
        return {}
    genders = {}
    for number, line in numbered_lines(path):
        text = decoded(line, f"{path}:{number}")
        if not text.startswith(";"):
            cells = [cell.strip() for cell in text.split("|")]
            if len(cells) >= 2:
                genders[cells[0]] = cells[1].lower()
    return genders
