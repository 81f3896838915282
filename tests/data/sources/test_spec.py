from __future__ import annotations

import os

import pytest

from speechllm.data.sources.spec import Spec, name_of, parse_spec
from speechllm.errors import DataError


def test_a_text_is_taken_apart() -> None:
    text = "csv:s3://b:80/a,b.csv,text=x=y, z,set.lang=cs,limit=3"
    spec = parse_spec(text)
    options = {"text": "x=y, z", "set.lang": "cs", "limit": "3"}
    assert spec == Spec("csv", "s3://b:80/a,b.csv", options, text)
    assert (spec.limit, spec.constants(), spec.get("root")) == (3, {"lang": "cs"}, None)
    assert parse_spec("kaldi:~/x").path == f"{os.path.expanduser('~')}/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x.jsonl", "reads KIND:PATH"),
        ("wav:x", "one of the kinds jsonl, csv"),
        ("jsonl:", "names no path after jsonl:"),
        ("jsonl:x,text=a,text=b", "'text' is given twice"),
    ],
)
def test_wrong_texts(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"--source {text}.*{message}"):
        parse_spec(text)


def test_unknown_options_and_values() -> None:
    spec = parse_spec("kaldi:x,field.a=b,set.b=c,limit=0,ids=none")
    with pytest.raises(DataError, match="a kaldi source has no option 'ids'; it has root, field"):
        spec.accept(("root",), ("field",))
    spec.accept(("ids",), ("field",))
    with pytest.raises(DataError, match=r"no option 'field\.a'"):
        spec.accept(("ids",))
    with pytest.raises(DataError, match="limit=0: give a number"):
        _ = spec.limit
    with pytest.raises(DataError, match="ids=none: give one of a, b"):
        spec.choice("ids", "a", "b")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/my.train.jsonl.gz", "my.train"),
        ("data/train/", "train"),
        ("org/name", "name"),
        ("s3://b/x/y-*.tar", "y-_"),
        ("/d/ž k.csv", "ž_k"),
    ],
)
def test_names_of_shards(path: str, name: str) -> None:
    assert name_of(path) == name


def test_home_is_meant_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    spec = parse_spec("lhotse:~/r.jsonl,supervisions=~/s.jsonl,root=~/audio,set.note=~/x")
    assert spec.path == "/home/me/r.jsonl"
    assert spec.options == {
        "supervisions": "/home/me/s.jsonl",
        "root": "/home/me/audio",
        "set.note": "~/x",
    }
