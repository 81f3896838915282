from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import pyarrow as pa
import pytest
from source_files import Corpus, write_tone
from speech_files import tone

from speechllm.data.audio import encode_flac
from speechllm.data.sources.hf_load import spool
from speechllm.data.sources.utterance import FileAudio, RowAudio
from speechllm.errors import AudioError, DataError

AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "gender": {"names": ["male", "female"], "_type": "ClassLabel"},
    "tags": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
}


def flac(seed: int) -> bytes:
    return encode_flac(tone(0.5, seed=seed))


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "audio": {"bytes": flac(i), "path": f"{i}.flac"},
            "text": f"text {i}",
            "gender": i % 2,
            "tags": ["a", "b"],
        }
        for i in range(first, first + count)
    ]


def write_arrow(
    path: Path, values: list[dict[str, Any]], audio: Any = AUDIO, features: Any = FEATURES
) -> None:
    """As `datasets` does: an Arrow stream of several batches; the metadata tell the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    others = [
        ("text", pa.string()),
        ("gender", pa.int64()),
        ("tags", pa.list_(pa.string())),
        ("id", pa.int32()),
    ]
    fields = [("audio", audio), *(one for one in others if one[0] in values[0])]
    told = json.dumps({"info": {"features": features}})
    schema = pa.schema(fields).with_metadata({"huggingface": told})
    table = pa.Table.from_pylist(values, schema=schema)
    with open(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(table, max_chunksize=3)


def save(folder: Path, *parts: list[dict[str, Any]], **options: Any) -> Path:
    """What `Dataset.save_to_disk` leaves."""
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        write_arrow(folder / name, part, **options)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def test_a_saved_dataset_is_read_row_by_row(tmp_path: Path) -> None:
    folder = save(tmp_path / "my set", rows(5), rows(2, first=5))
    corpus = Corpus(f"hf:{folder}")
    assert corpus.manifest.name == "my_set"
    assert len(corpus.utterances) == 7
    one = corpus["my_set-000000006"]
    assert one.audio == RowAudio("data-00001-of-00002.arrow", 1, "audio", "flac")
    assert one.text == "text 6"
    assert one.fields == {"gender": "male", "tags": ["a", "b"]}
    for i in range(7):
        np.testing.assert_array_equal(corpus.samples(f"my_set-{i:09d}"), tone(0.5, seed=i))


def test_a_split_of_several_is_chosen(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / split, rows(2))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    corpus = Corpus(f"hf:{tmp_path},split=test")
    assert list(corpus.utterances) == ["test-000000000", "test-000000001"]
    with pytest.raises(DataError, match=r"no split is chosen; it has train, test: .*split=NAME"):
        Corpus(f"hf:{tmp_path}")
    with pytest.raises(DataError, match="has no split dev"):
        Corpus(f"hf:{tmp_path},split=dev")


def test_columns_are_chosen_and_ids_taken(tmp_path: Path) -> None:
    values = [{**row, "id": 70 + i} for i, row in enumerate(rows(2))]
    folder = save(tmp_path, values)
    assert list(Corpus(f"hf:{folder}").utterances) == ["70", "71"]
    corpus = Corpus(f"hf:{folder},id=text,audio=audio,text=text")
    assert list(corpus.utterances) == ["text 0", "text 1"]
    assert corpus.texts == {"text 0": "text 0", "text 1": "text 1"}
    assert corpus["text 0"].fields["id"] == 70


def test_audio_as_bytes_as_a_path_and_missing(tmp_path: Path) -> None:
    write_tone(tmp_path / "x.flac", 0.5, seed=9)
    values = rows(4)
    values[0]["audio"]["path"] = None
    values[1]["audio"] = {"bytes": None, "path": "x.flac"}
    values[2]["audio"] = None
    values[3]["text"] = None
    corpus = Corpus(f"hf:{save(tmp_path / 'set', values)}")
    names = list(corpus.utterances)
    assert corpus[names[0]].audio == RowAudio("data-00000-of-00001.arrow", 0, "audio", "flac")
    assert corpus[names[1]].audio == FileAudio("x.flac")
    with pytest.raises(AudioError, match=r"missing: .*row 2 holds no bytes"):
        corpus.samples(names[2])
    assert corpus[names[3]].text is None
    plain = [{**row, "audio": row["audio"]["bytes"]} for row in rows(2)]
    corpus = Corpus(f"hf:{save(tmp_path / 'plain', plain, audio=pa.binary(), features={})}")
    np.testing.assert_array_equal(corpus.samples("plain-000000001"), tone(0.5, seed=1))
    paths = [{**rows(1)[0], "audio": str(tmp_path / "x.flac")}]
    corpus = Corpus(f"hf:{save(tmp_path / 'paths', paths, audio=pa.string(), features={})}")
    np.testing.assert_array_equal(corpus.samples("paths-000000000"), tone(0.5, seed=9))


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", rows(2))
    with pytest.raises(DataError, match="no column of texts 'words'; its columns are audio, text"):
        Corpus(f"hf:{folder},text=words")
    with pytest.raises(DataError, match=r"no column 'sound'; .*audio=COLUMN"):
        Corpus(f"hf:{folder},audio=sound")
    with pytest.raises(DataError, match="no column 'key'"):
        Corpus(f"hf:{folder},id=key")
    with pytest.raises(DataError, match="'gender' is of type int64, which holds no audio"):
        Corpus(f"hf:{folder},audio=gender")
    (save(tmp_path / "b", rows(1)) / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"missing: .*data-00000-of-00001\.arrow"):
        Corpus(f"hf:{tmp_path}/b")
    arrow = save(tmp_path / "c", rows(2)) / "data-00000-of-00001.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-2000])
    with pytest.raises(DataError, match="is no whole Arrow file"):
        Corpus(f"hf:{tmp_path}/c")
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json names no Arrow files"):
        Corpus(f"hf:{folder}")
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state\.json: cannot be read"):
        Corpus(f"hf:{folder}")


def test_a_name_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "speechllm\[datasets\]"'):
        Corpus("hf:org/name,split=train")
    with pytest.raises(DataError, match="streaming=true needs spool=DIR"):
        Corpus("hf:org/name,split=train,streaming=true")


def test_a_stream_is_spooled_once(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    origin = {"config": None, "split": "train", "revision": None, "limit": "230"}
    origin["dataset"] = "org/name"
    small = [{**rows(1)[0], "text": f"row {i}"} for i in range(230)]
    spool(small, None, str(directory), origin)
    spec = f"hf:org/name,split=train,streaming=true,limit=230,spool={directory}"
    corpus = Corpus(spec)
    assert len(corpus.utterances) == 230
    assert corpus["train-000000229"].text == "row 229"
    np.testing.assert_array_equal(corpus.samples("train-000000229"), tone(0.5, seed=0))
    with pytest.raises(DataError, match=r"holds the spool of .*, not of"):
        Corpus(spec.replace("train,", "test,"))
    # Another process that was slower leaves what is there, and nothing of its own.
    spool(small[:1], None, str(directory), origin)
    assert len(Corpus(spec).utterances) == 230
    assert [one.name for one in tmp_path.iterdir()] == ["spool"]
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no spool of a dataset"):
        Corpus(spec.replace("/spool", "/other"))


def test_a_stream_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield rows(1)[0]
        raise OSError("connection reset")

    with pytest.raises(DataError, match=r"cannot be written .connection reset"):
        spool(broken(), None, str(tmp_path / "spool"), {})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    asides: list[Path] = []

    def observed() -> Any:
        asides.extend(tmp_path.iterdir())
        yield rows(1)[0]

    spool(observed(), None, str(directory), {})
    directory.rename(asides[0])  # of the same number, as processes of containers often are
    spool(rows(1), None, str(directory), {})
    assert list(tmp_path.iterdir()) == [directory]
    assert (directory / "spool.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/spool: cannot be written"):
        spool(rows(1), None, str(tmp_path / "file/spool"), {})


def test_with_the_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    values = rows(5)
    saved = datasets.Dataset.from_list(values).cast_column("audio", datasets.Audio())
    saved.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    corpus = Corpus(f"hf:{tmp_path}/saved")
    assert [one.text for one in corpus.utterances.values()] == [f"text {i}" for i in range(5)]
    np.testing.assert_array_equal(corpus.samples("saved-000000004"), tone(0.5, seed=4))
    (tmp_path / "hub").mkdir()
    saved.to_parquet(str(tmp_path / "hub/train-00000-of-00001.parquet"))
    with pytest.raises(DataError, match="no split is chosen; it has train"):
        Corpus(f"hf:{tmp_path}/hub")
    with pytest.raises(DataError, match="datasets cannot load it"):
        Corpus(f"hf:{tmp_path}/hub,split=dev")
    spool_option = f"streaming=true,limit=3,spool={tmp_path}/spool"
    for spec, count in (
        (f"hf:{tmp_path}/hub,split=train", 5),
        (f"hf:{tmp_path}/hub,split=train,{spool_option}", 3),
    ):
        corpus = Corpus(spec)
        assert len(corpus.utterances) == count
        np.testing.assert_array_equal(corpus.samples("train-000000002"), tone(0.5, seed=2))
