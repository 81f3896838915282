"""Transcripts with time spans, whose recordings are found by name below a directory."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Iterable

from speechllm.data.audio import AUDIO_EXTENSIONS
from speechllm.data.sources import values
from speechllm.data.sources.spec import SourceOptions, Spec
from speechllm.data.sources.utterance import AudioRef, CommandAudio, FileAudio
from speechllm.errors import DataError

KEYS = ("audio", "command", "ids")
_EXTENSIONS = AUDIO_EXTENSIONS | {"wv1", "wv2"}


class Recordings:
    """Audio files below `audio=DIR` by their names without extension.

    With `command=sph2pipe -f wav {}` each is read through that command, {} being its path; that
    needs `allow_commands`. Raises DataError for a missing option or directory.
    """

    def __init__(self, spec: Spec, options: SourceOptions) -> None:
        directory = spec.get("audio")
        if directory is None:
            raise DataError(
                f"{spec.given}: say where the recordings are: {spec.kind}:{spec.path},audio=DIR"
            )
        self.root = os.path.abspath(os.path.expanduser(directory))
        values.require_directory(self.root, "audio=DIR must hold the recordings")
        self._command = spec.get("command")
        if self._command is not None and not options.allow_commands:
            raise DataError(f"{spec.given}: command={self._command} needs --allow-commands")
        if self._command is not None and "{}" not in self._command:
            raise DataError(f"{spec.given}: command= must hold {{}} where the path goes")
        self._paths: dict[str, list[str]] = {}
        for folder, files in values.walk(self.root):
            for file in files:
                stem, extension = os.path.splitext(file)
                if extension[1:].lower() in _EXTENSIONS:
                    path = os.path.relpath(os.path.join(folder, file), self.root)
                    self._paths.setdefault(stem, []).append(path)

    def find(self, name: str, where: str) -> AudioRef:
        """Raises DataError, starting with `where`, for a name that no file or several have."""
        stem = os.path.basename(name)
        if os.path.splitext(stem)[1][1:].lower() in _EXTENSIONS:
            stem = os.path.splitext(stem)[0]
        paths = self._paths.get(stem, [])
        if len(paths) != 1:
            found = f"{len(paths)} of that name ({', '.join(paths)})" if paths else "none"
            raise DataError(f"{where}: recording {name!r}: {found} below {self.root}")
        if self._command is None:
            return FileAudio(paths[0])
        full = shlex.quote(os.path.join(self.root, paths[0]))
        return CommandAudio(self._command.replace("{}", full))


def transcripts(spec: Spec, extensions: Iterable[str]) -> list[str]:
    """The file, or all files of these extensions below the directory. Raises DataError."""
    if not os.path.isdir(spec.path):
        if not os.path.exists(spec.path):
            raise DataError(f"{spec.path}: no such file or directory")
        return [spec.path]
    found: set[str] = set()
    for extension in extensions:
        pattern = os.path.join(glob.escape(spec.path), "**", f"*.{extension}")
        found.update(glob.glob(pattern, recursive=True))
    if not found:
        raise DataError(f"{spec.path}: no *.{', *.'.join(extensions)} below it")
    return sorted(found)


def span_id(recording: str, channel: str, start: float, end: float) -> str:
    """`fe_03_00001-A-0003760-0005540`: the span in milliseconds."""
    stem = os.path.splitext(os.path.basename(recording))[0]
    return f"{stem}-{channel}-{round(1000 * start):07d}-{round(1000 * end):07d}"
