"""`KIND:PATH[,key=value...]`, the user's way to name a corpus."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from speechllm.errors import DataError

KINDS = (
    "jsonl",
    "csv",
    "tsv",
    "kaldi",
    "librispeech",
    "commonvoice",
    "hf",
    "lhotse",
    "tar",
    "stm",
    "tdf",
    "fisher",
)
# A comma starts an option only before `key=`, so that paths may hold commas.
_OPTION = re.compile(r",(?=[A-Za-z_][\w.-]*=)")
_COMMON = ("limit", "prefix")
_PATHS = ("root", "supervisions")  # a shell does not expand `~` behind `=`
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".stm", ".tdf", ".txt", ".tar")


@dataclass(frozen=True)
class SourceOptions:
    """allow_commands: whether shell commands that a corpus names may be run. command_timeout: in
    seconds. command_cache: see `Access`. name: of the shards, in place of the sources' own."""

    allow_commands: bool = False
    command_timeout: float = 600.0
    command_cache: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Spec:
    """One `--source`. options: by key, as written. given: the whole text, for messages."""

    kind: str
    path: str
    options: dict[str, str]
    given: str

    def get(self, key: str, default: str | None = None) -> str | None:
        return self.options.get(key, default)

    def choice(self, key: str, *values: str) -> str:
        """One of few words, the first where the option is missing. Raises DataError."""
        value = self.options.get(key, values[0])
        if value not in values:
            raise DataError(f"{self.given}: {key}={value}: give one of {', '.join(values)}")
        return value

    def family(self, prefix: str) -> dict[str, str]:
        """`set.lang=cs` in the family `set` is {"lang": "cs"}."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.options.items() if k.startswith(start)}

    @property
    def limit(self) -> int | None:
        """How many utterances to take at most. Raises DataError."""
        text = self.options.get("limit")
        if text is not None and (not text.isdecimal() or int(text) == 0):
            raise DataError(f"{self.given}: limit={text}: give a number of utterances, from 1")
        return None if text is None else int(text)

    def accept(self, keys: Collection[str], families: Collection[str] = ()) -> None:
        """Raise DataError for an option that this kind does not know."""
        for key in self.options:
            family = key.partition(".")[0] if "." in key else None
            if key in keys or key in _COMMON or (family in ("set", *families) and family != key):
                continue
            known = [*sorted(keys), *(f"{one}.NAME" for one in families), *_COMMON, "set.NAME"]
            raise DataError(
                f"{self.given}: a {self.kind} source has no option {key!r}; it has "
                f"{', '.join(known)}"
            )

    def constants(self) -> dict[str, Any]:
        """The `set.NAME=VALUE` of all kinds: fields that every utterance gets."""
        return dict(self.family("set"))


def parse_spec(text: str) -> Spec:
    """Raises DataError for an unknown kind or an empty path."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        raise DataError(
            f"--source {text}: reads KIND:PATH[,key=value...] with one of the kinds "
            f"{', '.join(KINDS)}"
        )
    path, *pairs = _OPTION.split(rest)
    if not path:
        raise DataError(f"--source {text}: names no path after {kind}:")
    options: dict[str, str] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key in options:
            raise DataError(f"--source {text}: the option {key!r} is given twice")
        options[key] = os.path.expanduser(value) if key in _PATHS else value
    if "://" not in path:
        path = os.path.expanduser(path)
    return Spec(kind, path, options, text)


def name_of(path: str) -> str:
    """`a/train.jsonl.gz` -> `train`, `data/train/` -> `train`: safe as the start of a file name."""
    base = os.path.basename(os.path.abspath(path)) if "://" not in path else path.rstrip("/")
    base = base.rsplit("/", 1)[-1]
    for extension in (*_COMPRESSIONS, *_EXTENSIONS):
        base = base.removesuffix(extension)
    return re.sub(r"[^\w.-]+", "_", base) or "corpus"
