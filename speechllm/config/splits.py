"""`--split NAME=DIR_OR_GLOB`, as decoding takes it here and on a cluster."""

from __future__ import annotations

from collections.abc import Iterable

from speechllm.errors import ConfigError


def parse_splits(words: Iterable[str]) -> dict[str, str]:
    """Name -> directory or pattern. Raises ConfigError; a name is part of file names."""
    splits: dict[str, str] = {}
    for word in words:
        name, _, patterns = word.partition("=")
        if not patterns:
            raise ConfigError(
                f"--split {word!r}: write it as NAME=DIR_OR_GLOB, as in test=data/test"
            )
        if not name or "/" in name or name.startswith("."):
            raise ConfigError(f"--split {name!r}: a split's name is a plain name, as in test=DIR")
        if name in splits:  # both would be one file of predictions
            raise ConfigError(f"--split {name!r} is given twice; give each split a name of its own")
        splits[name] = patterns
    return splits
