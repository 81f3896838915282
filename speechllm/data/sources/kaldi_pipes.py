"""Pipes of wav.scp that only decode one file, which libsndfile does without them.

Nearly all pipes in Kaldi's recipes are of these two forms (LibriSpeech's `flac -c -d -s FILE |`,
Fisher's and Switchboard's `sph2pipe -f wav -p -c 1 FILE |`). Read directly, a segment of a long
recording costs its own length, not that of the recording, and needs no permission to run commands.
"""

from __future__ import annotations

import os
import shlex
from typing import NamedTuple

_FLAC_FLAGS = frozenset({"-c", "-d", "-s", "--stdout", "--decode", "--silent", "--totally-silent"})
_SPHERE_HEADER = 1024


class PlainFile(NamedTuple):
    """channel: from 0, None for all."""

    path: str
    channel: int | None


def plain_file(command: str, root: str, has_tools: bool) -> PlainFile | None:
    """The file that the command decodes; None where it is any other command.

    has_tools: commands may be run, so that one which needs `sph2pipe` (a sphere file compressed
    with shorten, which libsndfile does not read) is left to it.
    """
    if any(character in command for character in "|<>;&$`*?(){}\n"):
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    match [os.path.basename(words[0]) if words else "", *words[1:]]:
        case ["flac", *rest]:
            return _of_flac(rest)
        case ["sph2pipe", *rest]:
            found = _of_sph2pipe(rest)
            if found and has_tools and _is_shortened(os.path.join(root, found.path)):
                return None
            return found
    return None


def _of_flac(words: list[str]) -> PlainFile | None:
    flags: set[str] = set()
    files = []
    for word in words:
        if word in _FLAC_FLAGS:
            flags.add(word)
        elif word.startswith("-") and not word.startswith("--") and set(word[1:]) <= set("cds"):
            flags |= {f"-{letter}" for letter in word[1:]}
        else:
            files.append(word)
    decodes = bool(flags & {"-d", "--decode"}) and bool(flags & {"-c", "--stdout"})
    if not decodes or len(files) != 1 or not files[0].lower().endswith(".flac"):
        return None
    return PlainFile(files[0], None)


def _of_sph2pipe(words: list[str]) -> PlainFile | None:
    """`-p` (16 bit samples) changes nothing here, nor do the formats that have a header."""
    channel = None
    while words and words[0].startswith("-"):
        match words:
            case ["-p", *rest]:
                words = rest
            case ["-f", "wav" | "rif" | "riff" | "sph", *rest]:
                words = rest
            case ["-c", "1" | "2" as one, *rest]:
                channel, words = int(one) - 1, rest
            case _:
                return None
    return PlainFile(words[0], channel) if len(words) == 1 else None


def _is_shortened(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return b"shorten" in file.read(_SPHERE_HEADER)
    except OSError:
        return False  # it is told as missing when it is read
