from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from speechllm.data.files import expand_braces, list_tars, local_path, write_atomically
from speechllm.errors import DataError


def test_local_paths_and_urls() -> None:
    assert local_path("a/b.tar") == "a/b.tar"
    assert local_path("file:///a/b.tar") == "/a/b.tar"
    assert local_path("s3://bucket/b.tar") is None
    assert local_path("simplecache::s3://bucket/b.tar") is None


def test_brace_ranges() -> None:
    assert expand_braces("x-{008..010}.tar") == ["x-008.tar", "x-009.tar", "x-010.tar"]
    assert expand_braces("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_directories_globs_ranges_and_names(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "a-0.index.arrow", "note.txt"):
        (tmp_path / name).touch()
    names = lambda found: sorted(Path(one).name for one in found)  # noqa: E731
    assert names(list_tars(str(tmp_path))) == ["a-0.tar", "a-1.tar", "b-0.tar"]
    assert names(list_tars(f"{tmp_path}/a-*.tar")) == ["a-0.tar", "a-1.tar"]
    assert names(list_tars(f"{tmp_path}/a-{{0..1}}.tar")) == ["a-0.tar", "a-1.tar"]
    assert names(list_tars(f"{tmp_path}/missing.tar")) == ["missing.tar"]
    assert list_tars(f"{tmp_path}/c-*.tar") == []


def test_a_directory_with_brackets_in_its_name(tmp_path: Path) -> None:
    odd = tmp_path / "set[1]"
    odd.mkdir()
    (odd / "a.tar").touch()
    assert list_tars(str(odd)) == [str(odd / "a.tar")]
    assert list_tars(str(odd / "a.tar")) == [str(odd / "a.tar")]


def test_remote_directories_and_globs() -> None:
    for name in ("a-0.tar", "a-1.tar", "a-0.index.arrow"):
        with fsspec.open(f"memory://files/{name}", "wb") as file:
            file.write(b"x")
    expected = ["memory:///files/a-0.tar", "memory:///files/a-1.tar"]
    assert [one.replace("memory:///", "memory://") for one in list_tars("memory://files")] == [
        one.replace("memory:///", "memory://") for one in expected
    ]
    assert len(list_tars("memory://files/a-*.tar")) == 2
    assert list_tars("memory://files/a-{0..1}.tar") == [
        "memory://files/a-0.tar",
        "memory://files/a-1.tar",
    ]


def test_unknown_protocols_are_a_users_error() -> None:
    with pytest.raises(DataError, match=r"nosuch://x/\*.tar: cannot be reached"):
        list_tars("nosuch://x/*.tar")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write_atomically(str(target), b"old")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        write_atomically(str(tmp_path / "b"), b"new")
    write_atomically(str(target), b"new")
    assert target.read_bytes() == b"new"
    with pytest.raises(DataError, match="cannot be written"):
        write_atomically(str(tmp_path / "none" / "a"), b"new")
