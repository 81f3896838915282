from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import pytest
from http_files import Server, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_copy import worker_copy

from speechllm.data import cache as cache_module
from speechllm.data import remote
from speechllm.data.cache import BlockCache, blocks_of
from speechllm.data.remote import stat
from speechllm.errors import ConfigError, DataError

BLOCK = 1000
CONTENT = np.random.default_rng(0).bytes(50 * BLOCK + 123)
context = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "BLOCK", BLOCK)
    monkeypatch.setattr(remote, "PAUSE", 0.001)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.bin").write_bytes(CONTENT)
    with serve(tmp_path / "web") as files:
        yield files


def files_of(cache: BlockCache) -> list[Path]:
    return [path for path in (cache.directory / "blocks").rglob("*") if path.is_file()]


def used(cache: BlockCache) -> int:
    """Bytes in files, at one moment: nobody makes room meanwhile."""
    sizes = {}
    with cache._lock("used"):
        for path in files_of(cache):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                sizes[about.st_ino] = about.st_size
    return sum(sizes.values())


def test_a_block_is_fetched_once(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    server.requests.clear()
    cache = BlockCache(str(tmp_path / "cache"), 100 * BLOCK)
    for one in (cache, BlockCache(str(tmp_path / "cache"), 100 * BLOCK), worker_copy(cache)):
        assert one.read(url, about, 2500, 1000) == CONTENT[2500:3500]
    assert [wanted for _, wanted in server.requests] == ["bytes=2000-2999", "bytes=3000-3999"]
    cache.keep(url, about, 50)
    assert cache.read(url, about, 50_000, 123) == CONTENT[-123:]
    assert server.requests[2:] == [("/a.bin", "bytes=50000-50122")]
    assert used(cache) == 2 * BLOCK + 123


@given(st.lists(st.tuples(st.integers(0, len(CONTENT)), st.integers(0, 3500)), max_size=25))
@settings(max_examples=30, deadline=None)
def test_any_range_in_any_order_comes_back_within_the_limit(wanted: list[tuple[int, int]]) -> None:
    def fetch(url: str, offset: int, size: int, about: remote.Stat) -> bytes:
        return CONTENT[offset : offset + size]

    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "fetch", fetch)
        cache = BlockCache(directory, 7 * BLOCK)
        for offset, size in wanted:
            size = min(size, len(CONTENT) - offset)
            about = remote.Stat(len(CONTENT), "v")
            assert cache.read("u", about, offset, size) == CONTENT[offset : offset + size]
            assert used(cache) <= cache.limit


def test_the_blocks_not_read_for_longest_make_room(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    cache = BlockCache(str(tmp_path / "cache"), 10 * BLOCK)
    for number in range(10):
        cache.keep(url, about, number)
        time.sleep(0.002)
    cache.read(url, about, 0, 10)
    cache.keep(url, about, 20)
    server.requests.clear()
    for number in (0, 20, 9, 8):
        cache.read(url, about, number * BLOCK, 10)
    assert not server.requests
    cache.read(url, about, 1 * BLOCK, 10)
    assert len(server.requests) == 1


def test_another_version_is_another_block(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/a.bin"
    cache = BlockCache(str(tmp_path / "cache"), 100 * BLOCK)
    old = stat(url)
    assert cache.read(url, old, 0, 100) == CONTENT[:100]
    (server.directory / "a.bin").write_bytes(CONTENT[::-1])
    assert cache.read(url, stat(url), 0, 100) == CONTENT[::-1][:100]
    assert cache.read(url, old, 0, 100) == CONTENT[:100]
    with pytest.raises(DataError, match="changed while in use"):
        cache.read(url, old, 5000, 100)


def test_a_lower_limit_and_foreign_deletions_are_noticed(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    BlockCache(str(tmp_path / "cache"), 40 * BLOCK).read(url, about, 0, 40 * BLOCK)
    smaller = BlockCache(str(tmp_path / "cache"), 5 * BLOCK)
    assert smaller.read(url, about, 45 * BLOCK, BLOCK) == CONTENT[45 * BLOCK : 46 * BLOCK]
    assert used(smaller) <= 5 * BLOCK
    for path in files_of(smaller):
        path.unlink()
    assert smaller.read(url, about, 0, 30 * BLOCK) == CONTENT[: 30 * BLOCK]
    assert used(smaller) <= 5 * BLOCK


def test_a_block_cut_short_by_a_dead_machine_is_fetched_again(
    server: Server, tmp_path: Path
) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    cache = BlockCache(str(tmp_path / "cache"), 100 * BLOCK)
    cache.keep(url, about, 3)
    (block,) = files_of(cache)
    os.truncate(block, 10)
    assert cache.read(url, about, 3000, 1000) == CONTENT[3000:4000]
    assert used(cache) == BLOCK


def test_a_full_disk_costs_only_the_cache(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    cache = BlockCache(str(tmp_path / "cache"), 100 * BLOCK)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    assert cache.read(url, about, 3000, 1000) == CONTENT[3000:4000]
    assert files_of(cache) == []
    assert "a block cannot be kept" in caplog.text


def test_a_directory_that_cannot_be_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*file: cannot be made"):
        BlockCache(str(tmp_path / "file"), 100)
    # As root no permission is missing; a lock that cannot be opened is what another user meets.
    (tmp_path / "theirs" / "locks" / "used").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"theirs: cannot be made or written .*of your own"):
        BlockCache(str(tmp_path / "theirs"), 100)


def test_what_was_left_unfinished_goes_after_an_hour(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/a.bin"
    cache = BlockCache(str(tmp_path / "cache"), 5 * BLOCK)
    (cache.directory / "blocks" / "ab").mkdir()
    old, new = (cache.directory / "blocks" / "ab" / name for name in (".old", ".new"))
    for path in (old, new):
        path.write_bytes(bytes(BLOCK))
    os.utime(old, (time.time() - 4000,) * 2)
    cache.read(url, stat(url), 0, 10 * BLOCK)
    assert not old.exists()
    assert new.exists()
    assert used(cache) <= 5 * BLOCK


def _read_for_ever(url: str, about: remote.Stat, directory: str, seed: int) -> None:
    cache, random = BlockCache(directory, 12 * BLOCK), np.random.default_rng(seed)
    while True:
        offset, size = int(random.integers(len(CONTENT))), int(random.integers(3000))
        size = min(size, len(CONTENT) - offset)
        assert cache.read(url, about, offset, size) == CONTENT[offset : offset + size]


def test_processes_share_it_and_die_in_the_middle(server: Server, tmp_path: Path) -> None:
    """At no time more than the limit, and whatever is killed, no block that is not whole."""
    url = f"{server.url}/a.bin"
    about = stat(url)
    cache = BlockCache(str(tmp_path / "cache"), 12 * BLOCK)
    arguments = (url, about, str(cache.directory))
    readers: list = []
    most = 0
    for round_ in range(6):
        while len(readers) < 3:
            seed = 10 * round_ + len(readers)
            readers.append(context.Process(target=_read_for_ever, args=(*arguments, seed)))
            readers[-1].start()
        until = time.monotonic() + 0.25
        while time.monotonic() < until:
            most = max(most, used(cache))
        victim = readers.pop(0)
        assert victim.is_alive()
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    for reader in readers:
        assert reader.is_alive()
        reader.kill()
        reader.join()
    assert 0 < most <= cache.limit
    server.requests.clear()
    whole = {CONTENT[n * BLOCK : (n + 1) * BLOCK] for n in range(51)}
    blocks = [path for path in files_of(cache) if not path.name.startswith(".")]
    assert len(blocks) > 3
    assert all(path.read_bytes() in whole for path in blocks)
    assert cache.read(url, about, 0, len(CONTENT)) == CONTENT  # no lock is left


def test_two_processes_fetch_a_block_once(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    server.requests.clear()
    server.latency = 0.1
    cache = BlockCache(str(tmp_path / "cache"), 100 * BLOCK)
    children = [context.Process(target=cache.keep, args=(url, about, 4)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert server.times("a.bin") == 1


def test_a_process_forked_during_a_fetch_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As evaluation forks its workers while blocks of training are fetched ahead."""
    begun, forked = threading.Event(), threading.Event()

    def fetch(url: str, offset: int, size: int, about: remote.Stat) -> bytes:
        begun.set()
        assert forked.wait(30)
        return CONTENT[offset : offset + size]

    monkeypatch.setattr(cache_module, "fetch", fetch)
    cache = BlockCache(str(tmp_path / "cache"), 100 * BLOCK)
    ahead = threading.Thread(target=cache.keep, args=("u", remote.Stat(len(CONTENT), "v"), 4))
    ahead.start()
    assert begun.wait(30)
    child = context.Process(target=signal.pause)
    child.start()
    forked.set()
    ahead.join()
    try:
        for lock in (cache.directory / "locks").iterdir():
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else BlockingIOError
    finally:
        child.kill()
        child.join()


def test_blocks_of_ranges() -> None:
    assert list(blocks_of(0, 0)) == []
    assert list(blocks_of(999, 1)) == [0]
    assert list(blocks_of(999, 2)) == [0, 1]
    assert list(blocks_of(1000, 2000)) == [1, 2]
