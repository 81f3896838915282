"""Tokens with which several sequences begin."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from speechllm.types import AudioSegment, Example


def common_prefix(sequences: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest with which all of `sequences` (at least one) begin."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return tuple(column[0] for column in columns)


def opening(example: Example) -> tuple[int, ...]:
    """Text before all else, as far as the LLM's output there is of no use: neither does a label
    follow on it, nor does the example end with it."""
    tokens: list[int] = []
    for segment in example.segments:
        if isinstance(segment, AudioSegment):
            return tuple(tokens)
        if segment.trained:
            break
        tokens += segment.tokens
    return tuple(tokens[:-1])
