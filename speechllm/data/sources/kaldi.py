"""Kaldi data directories: wav.scp, text, and by option segments, utt2spk, spk2gender, utt2lang.

Formats: https://kaldi-asr.org/doc/data_prep.html; ranges of archives and the header of wave files
in them: `WaveHolder` and `ParseMatrixRangeSpecifier` of Kaldi's sources.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from speechllm.data.sources import values
from speechllm.data.sources.kaldi_pipes import plain_file
from speechllm.data.sources.lines import KeyedLines, decoded, numbered_lines
from speechllm.data.sources.spec import SourceOptions, Spec, name_of
from speechllm.data.sources.utterance import (
    AudioRef,
    CommandAudio,
    FileAudio,
    SliceAudio,
    Source,
    SourceUtterance,
)
from speechllm.errors import DataError

_ARK = re.compile(r"(.+):(\d+)")
_CHANNELS = {"A": 0, "B": 1, "a": 0, "b": 1}


def open_kaldi(spec: Spec, options: SourceOptions) -> Source:
    """`kaldi:DIR`. Files may be gzipped where their name says so (segments.gz is not looked for).

    Options: text=FILE takes another file than `text`; field.NAME=FILE puts the rest of that file's
    lines into the field NAME (field.translation=text.en); root is what relative paths of wav.scp
    start at (default: the working directory, as in Kaldi); unknown=ignore lets `text` have
    utterances that wav.scp or segments have not.

    `sph2pipe` and `flac` pipes that do nothing but decode a file are read without them. Other pipes
    need `allow_commands`; reco2dur or utt2dur spares running them for their lengths alone. Raises
    DataError naming file and line, also while it is read.
    """
    spec.accept(("text", "root", "unknown"), ("field",))
    values.require_directory(spec.path, "a Kaldi data directory holds wav.scp and text")
    for name in ("wav.scp", spec.get("text", "text") or "text"):
        if not os.path.exists(os.path.join(spec.path, name)):
            raise DataError(
                f"{spec.path}: has no {name}; a Kaldi data directory holds wav.scp and text "
                "(another text: text=FILE)"
            )
    cut = os.path.exists(os.path.join(spec.path, "segments"))
    label = os.path.join(spec.path, "segments" if cut else "wav.scp")
    root = spec.get("root") or os.getcwd()
    return Source(label, name_of(spec.path), root, _utterances(spec, options, cut))


@dataclass(frozen=True)
class _Recording:
    """A line of wav.scp. channel: what the pipe would have chosen."""

    name: str
    audio: AudioRef
    channel: int | None


class _About:
    """What the directory tells of utterances besides their audio."""

    def __init__(self, spec: Spec, cut: bool) -> None:
        self._ignore = spec.choice("unknown", "refuse", "ignore") == "ignore"
        self._text = KeyedLines(os.path.join(spec.path, spec.get("text", "text") or "text"))
        self._fields = {
            name: KeyedLines(os.path.join(spec.path, file))
            for name, file in spec.family("field").items()
        }
        for name, file in (("speaker", "utt2spk"), ("lang", "utt2lang")):
            path = os.path.join(spec.path, file)
            if name not in self._fields and os.path.exists(path):
                self._fields[name] = KeyedLines(path)
        # Where recordings are cut, utt2dur is of the segments, some of which have their names.
        told = ("reco2dur",) if cut else ("reco2dur", "utt2dur")
        lengths = (os.path.join(spec.path, name) for name in told)
        self._lengths = [KeyedLines(path) for path in lengths if os.path.exists(path)]
        genders = os.path.join(spec.path, "spk2gender")
        self._genders = _two_columns(genders) if os.path.exists(genders) else {}

    def text(self, name: bytes) -> str | None:
        return _rest(self._text, name)

    def fields(self, name: bytes) -> dict[str, str]:
        found = {field: _rest(lines, name) for field, lines in self._fields.items()}
        fields = {field: value for field, value in found.items() if value is not None}
        if (gender := self._genders.get(fields.get("speaker", ""))) is not None:
            fields["gender"] = gender
        return fields

    def seconds(self, recording: bytes) -> float | None:
        """Length of a recording, where a file tells it."""
        for lines in self._lengths:
            if (text := _rest(lines, recording)) is not None:
                return values.seconds(text, "duration", lines.path)
        return None

    def refuse_unknown(self, label: str) -> None:
        unused = self._text.unused()
        if unused is not None and not self._ignore:
            count, number, name = unused
            raise DataError(
                f"{self._text.path}:{number}: utterance {name!r} is not in {label} ({count} such "
                "lines in all); mend it with utils/fix_data_dir.sh, or go on without them: "
                "unknown=ignore"
            )


def _utterances(
    spec: Spec, options: SourceOptions, cut: bool
) -> Iterator[tuple[int, SourceUtterance]]:
    about = _About(spec, cut)
    scp = os.path.join(spec.path, "wav.scp")
    rows = _segments(spec, options, scp) if cut else _whole(spec, options, scp)
    number = None
    for number, name, recording, (start, end, channel) in rows:
        yield (
            number,
            SourceUtterance(
                id=name,
                audio=recording.audio,
                text=about.text(name.encode()),
                start=start,
                end=end,
                channel=recording.channel if channel is None else channel,
                fields=about.fields(name.encode()),
                seconds=about.seconds(recording.name.encode()),
            ),
        )
    label = os.path.join(spec.path, "segments") if cut else scp
    if number is None:
        raise DataError(f"{label}: no lines")
    about.refuse_unknown(label)


_Span = tuple[float | None, float | None, int | None]
_Row = tuple[int, str, _Recording, _Span]


def _whole(spec: Spec, options: SourceOptions, scp: str) -> Iterator[_Row]:
    for number, line in numbered_lines(scp):
        recording = _recording(line, f"{scp}:{number}", spec, options)
        yield number, recording.name, recording, (None, None, None)


def _segments(spec: Spec, options: SourceOptions, scp: str) -> Iterator[_Row]:
    recordings: dict[str, _Recording] = {}
    for number, line in numbered_lines(scp):
        recording = _recording(line, f"{scp}:{number}", spec, options)
        if recording.name in recordings:
            raise DataError(
                f"{scp}:{number}: recording {recording.name!r} is on an earlier line already"
            )
        recordings[recording.name] = recording
    path = os.path.join(spec.path, "segments")
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        words = decoded(line, where).split()
        if len(words) not in (4, 5):
            raise DataError(
                f"{where}: {len(words)} words; a line reads UTTERANCE RECORDING START END [CHANNEL]"
            )
        if words[1] not in recordings:
            raise DataError(
                f"{where}: recording {words[1]!r} is not in {scp}; mend it with "
                "utils/fix_data_dir.sh"
            )
        # An end of -1 is that of the recording (extract-segments).
        end = None if words[3].startswith("-") else values.seconds(words[3], "end", where)
        start = values.seconds(words[2], "start", where)
        channel = None
        if len(words) == 5:
            channel = _CHANNELS.get(words[4])
            channel = values.channel(words[4], "channel", where) if channel is None else channel
        yield number, words[0], recordings[words[1]], (start, end, channel)


def _recording(line: bytes, where: str, spec: Spec, options: SourceOptions) -> _Recording:
    name, _, rest = decoded(line, where).strip().partition(" ")
    name, tab, after = name.partition("\t")
    rest = (after + " " + rest if tab else rest).strip()
    if not rest:
        raise DataError(
            f"{where}: a line reads RECORDING PATH, RECORDING X.ark:OFFSET or RECORDING COMMAND |"
        )
    if rest.endswith("|"):
        command = rest[:-1].strip()
        file = plain_file(command, spec.get("root") or os.getcwd(), options.allow_commands)
        if file is not None:
            return _Recording(name, FileAudio(file.path), file.channel)
        if not options.allow_commands:
            raise DataError(
                f"{where}: a pipe ({command} |): commands of a corpus are run only with "
                "--allow-commands, because they can do anything that you can"
            )
        return _Recording(name, CommandAudio(command), None)
    if rest == "-" or rest.endswith("]"):
        raise DataError(f"{where}: {rest}: neither standard input nor ranges of rows can be read")
    if match := _ARK.fullmatch(rest):
        return _Recording(name, SliceAudio(match[1], int(match[2]), None, ""), None)
    return _Recording(name, FileAudio(rest), None)


def _rest(lines: KeyedLines, name: bytes) -> str | None:
    found = lines.get(name)
    if found is None:
        return None
    number, line = found
    words = line.split(None, 1)
    return decoded(words[1], f"{lines.path}:{number}").strip() if len(words) == 2 else None


def _two_columns(path: str) -> dict[str, str]:
    found = {}
    for number, line in numbered_lines(path):
        words = decoded(line, f"{path}:{number}").split()
        if len(words) != 2:
            raise DataError(f"{path}:{number}: {len(words)} words; a line reads SPEAKER GENDER")
        found[words[0]] = words[1]
    return found
