"""Each recipe on a tiny corpus in the layout of the real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

import pyarrow as pa
import pytest
import soundfile
from source_files import write_lines, write_tone
from speech_files import tone

from speechllm.config.load import load_config
from speechllm.data.audio import encode_flac
from speechllm.data.index import open_corpus

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "tools" / "recipes"


def recipe(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RECIPES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable, "OPTIONS": "--num-workers 1", **environment},
    )


def built(*call: object, **environment: str) -> dict[str, list[str]]:
    """Run a recipe; the texts of each split that it says to train with."""
    done = recipe(*map(str, call), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"train (\S+) data\.train=(\S+) data\.validation=(\S+)", done.stdout)
    assert said is not None, done.stdout
    config = load_config(str(ROOT / said[1]))
    for split, path in (("train", said[2]), ("validation", said[3])):
        [written] = getattr(config.data, split)
        assert Path(written).name == Path(path).name
    return {folder.name: texts(folder) for folder in Path(said[2]).parent.iterdir()}


def texts(folder: Path) -> list[str]:
    if not list(folder.glob("*.tar")):
        return []
    corpus = open_corpus([str(folder)])
    found = []
    for number in range(len(corpus)):
        where = corpus.location(number)
        with open(where.shard, "rb") as tar:
            tar.seek(where.meta_offset)
            found.append(json.loads(tar.read(where.meta_size))["text"])
    return sorted(found)


def test_librispeech(tmp_path: Path) -> None:
    corpus = tmp_path / "LibriSpeech"
    parts = ("train-clean-100", "train-other-500", "dev-clean", "test-clean")
    for speaker, part in enumerate(parts, start=1):
        name = f"{speaker}-7-0000"
        write_tone(corpus / part / f"{speaker}/7/{name}.flac", 0.5, seed=speaker)
        trans = corpus / part / f"{speaker}/7/{speaker}-7.trans.txt"
        write_lines(trans, [f"{name} {part.upper()}"])
    assert built("librispeech.sh", corpus, tmp_path / "out") == {
        "train": ["train-clean-100", "train-other-500"],
        "dev-clean": ["dev-clean"],
        "test-clean": ["test-clean"],
    }


def test_what_is_said_can_be_run_as_it_stands(tmp_path: Path) -> None:
    corpus = tmp_path / "Libri Speech"
    name = "1-7-0000"
    for part in ("train-clean-100", "dev-clean"):
        write_tone(corpus / part / f"1/7/{name}.flac", 0.5, seed=len(part))
        write_lines(corpus / part / "1/7/1-7.trans.txt", [f"{name} {part.upper()}"])
    done = recipe("librispeech.sh", corpus, tmp_path / "my shards")
    words = shlex.split(done.stdout.splitlines()[-1])
    assert f"data.train={tmp_path / 'my shards' / 'train'}" in words, done.stderr


def test_common_voice(tmp_path: Path) -> None:
    corpus = tmp_path / "cs"
    for number, split in enumerate(("train", "dev", "test")):
        write_tone(corpus / f"clips/c{number}.mp3", 1.0, seed=number, rate=32000)
        lines = [
            "client_id\tpath\tsentence\tlocale",
            f"s{number}\tc{number}.mp3\tVěta {split}.\tcs",
        ]
        write_lines(corpus / f"{split}.tsv", lines)
    assert built("commonvoice.sh", corpus, tmp_path / "out") == {
        split: [f"Věta {split}."] for split in ("train", "dev", "test")
    }


def test_hugging_face(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "dev", "test")):
        folder = tmp_path / "how2" / split
        folder.mkdir(parents=True)
        audio = {"bytes": encode_flac(tone(0.5, seed=number)), "path": None}
        table = pa.Table.from_pylist([{"sound": audio, "said": f"how to {split}"}])
        file = folder / "data-00000-of-00001.arrow"
        with open(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        state = {"_data_files": [{"filename": file.name}]}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    splits = {"splits": ["train", "dev", "test"]}
    (tmp_path / "how2" / "dataset_dict.json").write_text(json.dumps(splits))
    found = built("huggingface.sh", tmp_path / "how2", tmp_path / "out", "sound", "said")
    assert found == {
        "train": ["how to train"],
        "validation": ["how to dev"],
        "test": ["how to test"],
    }


def test_fisher(tmp_path: Path) -> None:
    for number in (1, 50, 100):
        name = f"fe_03_{number:05d}"
        sides = np.stack([tone(3.0, seed=number + i, rate=8000) for i in range(2)], axis=1)
        audio = tmp_path / "audio" / f"{name}.sph"
        audio.parent.mkdir(exist_ok=True)
        soundfile.write(audio, sides, 8000, format="NIST", subtype="ULAW")
        said = [f"0.0 1.0 A: call {number} [laughter]", "1.0 2.0 B: (( what ))"]
        write_lines(tmp_path / "trans" / "000" / f"{name}.txt", said)
    found = built("fisher.sh", tmp_path / "trans", tmp_path / "audio", tmp_path / "out")
    found.pop("transcripts")
    assert found == {"train": ["call 1"], "dev": ["call 100"], "test": ["call 50"]}


@pytest.mark.parametrize("name", sorted(p.name for p in RECIPES.glob("*.sh") if p.stem != "steps"))
def test_without_arguments_they_say_what_they_want(name: str) -> None:
    done = recipe(name)
    assert done.returncode == 2
    assert f"tools/recipes/{name} /corpora/" in done.stderr
    assert "#" not in done.stderr


def test_a_cluster_is_asked_for_the_work_where_that_is_wanted(tmp_path: Path) -> None:
    corpus = tmp_path / "LibriSpeech"
    write_tone(corpus / "train-clean-100/1/7/1-7-0000.flac", 0.5)
    write_lines(corpus / "train-clean-100/1/7/1-7.trans.txt", ["1-7-0000 A"])
    done = recipe(
        "librispeech.sh", corpus, tmp_path / "out", TASKS="3", SPEECHLLM_SITE="sge_pe",
        OPTIONS="--dry-run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#$ -t 1-3" in done.stdout
    assert not list(tmp_path.glob("out/**/*.tar"))
