from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np

import pytest

from speechllm.data import shared
from speechllm.data.shared import shared_arrays

context = multiprocessing.get_context("fork")
KEY = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"speechllm-{os.getuid()}"


def arrays() -> dict[str, np.ndarray]:
    return {"large": np.arange(100_000), "small": np.array([1.5]), "none": np.empty(0, np.int32)}


def test_the_second_finds_what_the_first_computed(root: Path) -> None:
    calls = []

    def compute() -> dict[str, np.ndarray]:
        calls.append(1)
        return arrays()

    for _ in range(2):
        found = shared_arrays("x", KEY, compute)
        assert sorted(found) == sorted(arrays())
        for name, array in arrays().items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
            assert type(found[name]) is np.ndarray
    assert len(calls) == 1
    assert not found["large"].flags.writeable
    assert (root.stat().st_mode & 0o777) == 0o700
    shared_arrays("y", KEY, compute)
    shared_arrays("x", "f" + KEY, compute)
    assert len(calls) == 3


def _compute_once(queue: multiprocessing.SimpleQueue[str]) -> None:
    def compute() -> dict[str, np.ndarray]:
        queue.put("computed")
        time.sleep(0.2)
        return arrays()

    assert shared_arrays("x", KEY, compute)["large"][-1] == 99_999


def _die_half_way() -> None:
    def compute() -> dict[str, np.ndarray]:
        (next(iter(shared._root().glob("lock")))).touch()
        real = np.save

        def dying(file: Path, array: np.ndarray, allow_pickle: bool) -> None:
            real(file, array, allow_pickle=allow_pickle)
            os._exit(9)

        np.save = dying  # type: ignore[assignment]
        return arrays()

    shared_arrays("x", KEY, compute)


def test_one_process_computes_while_others_wait() -> None:
    queue = context.SimpleQueue()
    children = [context.Process(target=_compute_once, args=(queue,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert queue.get() == "computed"
    assert queue.empty()


def test_a_process_that_dies_in_the_middle_leaves_nothing_half(root: Path) -> None:
    child = context.Process(target=_die_half_way)
    child.start()
    child.join()
    assert child.exitcode == 9
    assert [path.name for path in root.iterdir() if path.is_dir()] == [f"unfinished-{child.pid}"]
    assert shared_arrays("x", KEY, arrays)["large"][-1] == 99_999
    assert [path.name for path in root.iterdir() if path.is_dir()] == [f"x-{KEY[:40]}"]


def test_few_entries_are_kept_and_a_mapped_one_stays_readable(root: Path) -> None:
    first = shared_arrays("x", KEY, arrays)
    for n in range(20):
        shared_arrays("y", f"{n:040d}", arrays)
    entries = [path.name for path in root.iterdir() if path.is_dir()]
    assert len(entries) == shared._ENTRIES_KEPT
    assert f"x-{KEY[:40]}" not in entries
    assert first["large"].sum() == np.arange(100_000).sum()


def test_a_directory_of_somebody_else_is_left_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared_arrays("x", KEY, arrays)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    root.rename(root.with_name("speechllm-12345"))
    found = shared_arrays("x", KEY, lambda: {"own": np.ones(3)})
    assert sorted(found) == ["own"]
    assert "belongs to another user" in caplog.text
