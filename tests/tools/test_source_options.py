from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from source_files import write_lines
from source_options import add_source_arguments, sources_of

from speechllm.data.manifest import Manifest
from speechllm.errors import UserError


def read(*arguments: str) -> Manifest:
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    return sources_of(parser.parse_args(arguments))


def test_a_manifest_and_sources(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "m.jsonl", [{"id": "a", "audio": "a.wav", "text": "x"}]))
    assert list(read(path).ids) == ["a"]
    both = read(path, "--source", f"jsonl:{path},prefix=b-", "--name", "my-set_1")
    assert list(both.ids) == ["a", "b-a"]
    assert both.name == "my-set_1"
    manifest = read(path, "--command-timeout", "7", "--command-cache", "/c")
    assert (manifest.access.command_timeout, manifest.access.command_cache) == (7.0, "/c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no corpus is given"),
        (["m.jsonl", "--name", "a/b"], "--name a/b: letters"),
        (["m.jsonl", "--command-timeout", "0"], "must be above 0"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(*arguments)
