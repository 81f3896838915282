from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import write_lines

from speechllm.data.sources.lines import KeyedLines, numbered_lines
from speechllm.errors import DataError


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\n  \nb\n\xc2\x85c")
    assert list(numbered_lines(str(path))) == [(1, b"a"), (4, b"b"), (5, b"\xc2\x85c")]
    assert [number for number, _ in numbered_lines(str(path), blank=True)] == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        list(numbered_lines(f"{tmp_path}/nowhere"))


@pytest.mark.parametrize(
    ("name", "pack"), [("x.gz", gzip.compress), ("x.bz2", bz2.compress), ("x.xz", lzma.compress)]
)
def test_a_damaged_archive_is_refused_by_name(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    packed = pack(b"".join(b"%d some text\n" % i for i in range(5000)))
    damage = b"\xff" * 100
    for damaged in (packed[:-20], packed[:40] + damage + packed[140:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):
            list(numbered_lines(str(path)))


@given(keys=st.lists(st.text("ab", min_size=1), unique=True), wanted=st.lists(st.text("ab")))
def test_lines_are_found_by_key_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], wanted: list[str]
) -> None:
    path = write_lines(tmp_path_factory.mktemp("x") / "x", [f"{key} value {key}" for key in keys])
    lines = KeyedLines(str(path))
    for key in wanted:
        found = (keys.index(key) + 1, f"{key} value {key}".encode()) if key in keys else None
        assert lines.get(key.encode()) == found
    left = [key for key in keys if key not in wanted]
    first = (len(left), keys.index(left[0]) + 1, left[0]) if left else None
    assert lines.unused() == first


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.gz", ["a 1", "b 1", "", "a 2"])
    with pytest.raises(DataError, match=r"x\.gz: 'a' is on line 1 and on line 4"):
        KeyedLines(str(path))
