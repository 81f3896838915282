from __future__ import annotations

import io
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import fsspec
import pytest
from http_files import Server, serve

from speechllm.data import remote
from speechllm.data.files import file_stamp, list_tars, open_binary, read_bytes, write_atomically
from speechllm.data.remote import Stat, fetch, fetch_all, stat
from speechllm.errors import DataError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    (tmp_path / "empty.bin").touch()
    with serve(tmp_path) as files:
        yield files


def test_ranges_and_whole_files(server: Server) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    assert about.size == len(CONTENT)
    assert about.version
    assert fetch(url, 0, 10, about) == CONTENT[:10]
    assert fetch(url, 1000, 500, about) == CONTENT[1000:1500]
    assert fetch(url, 5, 0, about) == b""
    assert fetch_all(url) == read_bytes(url) == CONTENT
    assert server.requests[2] == ("/a.bin", "bytes=1000-1499")
    assert stat(f"{server.url}/empty.bin").size == 0
    assert fetch_all(f"{server.url}/empty.bin") == b""


def test_urls_are_encoded_where_they_are_not_yet(server: Server) -> None:
    for name in ("žluť kůň.bin", "50%.bin", "a%20b.bin"):
        (server.directory / name).write_bytes(CONTENT)
    about = stat(f"{server.url}/žluť kůň.bin?sign=á b")
    for name in ("žluť kůň.bin", "%C5%BElu%C5%A5%20k%C5%AF%C5%88.bin", "50%25.bin", "a%2520b.bin"):
        assert fetch(f"{server.url}/{name}", 5, 5, about) == CONTENT[5:10]
    assert server.requests[0][0] == "/%C5%BElu%C5%A5%20k%C5%AF%C5%88.bin?sign=%C3%A1%20b"
    assert server.requests[1][0] == server.requests[2][0]


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(DataError, match=r"http://\[::1/a\.flac: cannot be reached \(Invalid IPv6"):
        stat("http://[::1/a.flac")


def test_a_file_of_ranges_seeks(server: Server) -> None:
    with open_binary(f"{server.url}/a.bin") as file:
        assert file.seek(-6, io.SEEK_END) == len(CONTENT) - 6
        assert file.read() == CONTENT[-6:]
        file.seek(300)
        assert file.read(4) == CONTENT[300:304]


@pytest.mark.parametrize(
    "fault", ["status 500", "status 503", "status 429", "short", "drop", "hang"]
)
def test_a_passing_fault_is_tried_again(server: Server, fault: str) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    server.requests.clear()
    server.fault = lambda path, times: fault if times < 3 else ""
    assert fetch(url, 100, 200, about) == CONTENT[100:300]
    assert server.times("a.bin") == 3
    server.requests.clear()
    assert fetch_all(url) == CONTENT
    server.requests.clear()
    assert stat(url) == about


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("status 503", "HTTP status 503"),
        ("short", "100 of 200 bytes at 100"),
        ("drop", "RemoteDisconnected"),
        ("hang", "timed out"),
    ],
)
def test_a_lasting_fault_is_named_with_the_attempts(server: Server, fault: str, said: str) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    server.requests.clear()
    server.fault = lambda path, times: fault
    with pytest.raises(DataError, match=rf"{url}: 5 attempts failed, the last with: .*{said}"):
        fetch(url, 100, 200, about)
    assert server.times("a.bin") == remote.ATTEMPTS


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [
        ("30", 30, 31),
        ("9000", remote.LONGEST_PAUSE, remote.LONGEST_PAUSE + 1),
        (formatdate(4e9, usegmt=True), remote.LONGEST_PAUSE, remote.LONGEST_PAUSE + 1),
        (formatdate(0, usegmt=True), 0, 1),
        ("soon", 0, 1),
    ],
)
def test_a_server_may_ask_for_a_pause(
    server: Server, monkeypatch: pytest.MonkeyPatch, asked: str, least: float, most: float
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    server.retry_after = asked
    server.fault = lambda path, times: "status 429" if times < 2 else ""
    assert fetch_all(f"{server.url}/a.bin") == CONTENT
    assert least <= max(pauses) <= most


@pytest.mark.parametrize(
    ("status", "kind"), [(404, FileNotFoundError), (403, PermissionError), (400, OSError)]
)
def test_what_will_not_pass_is_not_tried_again(
    server: Server, status: int, kind: type[OSError]
) -> None:
    server.fault = lambda path, times: f"status {status}"
    with pytest.raises(kind, match=f"a.bin: HTTP status {status}"):
        stat(f"{server.url}/a.bin")
    assert server.times("a.bin") == 1


def test_a_server_without_ranges_is_found_out_before_it_sends_all(server: Server) -> None:
    url = f"{server.url}/a.bin"
    server.ranges = False
    about = stat(url)
    assert about.size == len(CONTENT)
    with pytest.raises(DataError, match=r"a\.bin: the server serves no byte ranges"):
        fetch(url, 100, 200, about)
    assert fetch(url, 0, len(CONTENT), about) == CONTENT


def test_a_file_that_changes_under_way_is_refused(server: Server) -> None:
    url = f"{server.url}/a.bin"
    about = stat(url)
    for changed in (CONTENT[::-1], CONTENT + b"x", CONTENT[:50]):
        (server.directory / "a.bin").write_bytes(changed)
        with pytest.raises(DataError, match=r"a\.bin: changed while in use"):
            fetch(url, 100, 200, about)
    (server.directory / "a.bin").write_bytes(CONTENT + b"x")
    with pytest.raises(DataError, match="changed while in use"):
        fetch(url, 100, 200, about._replace(version=""))
    assert stat(url) != about


def test_what_fsspec_raises_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with fsspec.open("memory://remote/a.bin", "wb") as file:
        file.write(CONTENT)
    memory = type(fsspec.filesystem("memory"))
    usual, calls = memory.cat_file, []

    def flaky(self: object, *args: object, **options: object) -> bytes:
        calls.append(args)
        if len(calls) < 3:
            raise RuntimeError("SlowDown")
        return usual(self, *args, **options)

    about = stat("memory://remote/a.bin")
    assert about.size == len(CONTENT)
    monkeypatch.setattr(memory, "cat_file", flaky)
    assert fetch("memory://remote/a.bin", 7, 9, about) == CONTENT[7:16]
    assert len(calls) == 3
    with pytest.raises(DataError, match=r"a.bin: 5 attempts failed.* 1 of 9 bytes"):
        fetch("memory://remote/a.bin", len(CONTENT) - 1, 9, about)
    with pytest.raises(FileNotFoundError):
        stat("memory://remote/none.bin")


def test_an_http_directory_is_listed_by_its_dataset_json(server: Server) -> None:
    assert list_tars(f"{server.url}/x-{{00..01}}.tar") == [
        f"{server.url}/x-00.tar",
        f"{server.url}/x-01.tar",
    ]
    for pattern in (f"{server.url}/d", f"{server.url}/*.tar"):
        with pytest.raises(DataError, match=r"cannot be listed.*train-\{000000\.\.000123\}"):
            list_tars(pattern)
    (server.directory / "d").mkdir()
    (server.directory / "d" / "dataset.json").write_text('{"shards": [{"file": "t-0.tar"}]}')
    assert list_tars(f"{server.url}/d/") == [f"{server.url}/d/t-0.tar"]
    (server.directory / "d" / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="cannot be listed"):
        list_tars(f"{server.url}/d")


def test_http_is_not_written(server: Server) -> None:
    with pytest.raises(DataError, match="cannot be written over http"):
        write_atomically(f"{server.url}/b.bin", b"x")


def test_stamps_follow_content_and_size(server: Server) -> None:
    before = file_stamp(f"{server.url}/a.bin"), file_stamp(str(server.directory / "a.bin"))
    assert before[0].size == before[1].size == len(CONTENT)
    (server.directory / "a.bin").write_bytes(CONTENT[::-1])
    after = file_stamp(f"{server.url}/a.bin"), file_stamp(str(server.directory / "a.bin"))
    assert all(
        isinstance(one, Stat) and one != other for one, other in zip(before, after, strict=True)
    )
