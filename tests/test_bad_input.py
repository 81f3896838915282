"""What wrong input gets: exit code 2 and a message that names the thing and the mend, or, for
single utterances, a counted skip. Never a traceback, never silence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import pytest
import soundfile
from runs import ROOT, TINY, metrics
from speech_files import tone, write_shards

from speechllm.cli import main
from speechllm.data.index import index_path, open_corpus
from speechllm.data.store import Store

Case = Callable[[Path, Path], list[str]]


def train(run: Path, shards: Path | str, *more: str) -> list[str]:
    return ["train", TINY, f"run_dir={run}", f"data.train={shards}", "train.steps=1",
            "data.num_workers=0", *more]  # fmt: skip


def tool(name: str, *arguments: str | Path) -> list[str]:
    return [f"tool:{name}", *map(str, arguments)]


def no_index(tmp: Path, shards: Path) -> list[str]:
    for tar in shards.glob("*.tar"):
        Path(index_path(str(tar))).unlink()
    return train(tmp / "run", shards)


def stale_index(tmp: Path, shards: Path) -> list[str]:
    """The tar was made anew, the index was not."""
    tar = next(shards.glob("*.tar"))
    index = Path(index_path(str(tar))).read_bytes()
    other = write_shards(tmp / "other", 5, seed=9)
    tar.write_bytes(next(other.glob("*.tar")).read_bytes())
    Path(index_path(str(tar))).write_bytes(index)
    return train(tmp / "run", shards)


def truncated(tmp: Path, shards: Path) -> list[str]:
    tar = next(shards.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    return train(tmp / "run", shards)


def truncated_foreign(tmp: Path, shards: Path) -> list[str]:
    truncated(tmp, shards)
    return tool("index_shards", next(shards.glob("*.tar")))


def trained(tmp: Path, shards: Path, *more: str) -> list[str]:
    assert main(train(tmp / "run", shards)) == 0
    return train(tmp / "run", shards, "train.steps=2", *more)


def manifest(tmp: Path, *lines: str) -> Path:
    path = tmp / "manifest.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def shard_tool(tmp: Path, *lines: str) -> list[str]:
    return tool("make_shards", manifest(tmp, *lines), "--out", tmp / "out")


def text_file(tmp: Path, content: str) -> Path:
    path = tmp / "file"
    path.write_text(content)
    return path


CASES: dict[str, tuple[Case, list[str]]] = {
    "mistyped key": (
        lambda t, s: train(t, s, "optim.learning_rate=1"), ["optim.learning_rate", "lr"],
    ),
    "mistyped section": (lambda t, s: train(t, s, "optm.lr=1"), ["optm", "optim"]),
    "wrong type": (lambda t, s: train(t, s, "train.steps=many"), ["train.steps", "many"]),
    "out of range": (lambda t, s: train(t, s, "optim.lr=-1"), ["optim.lr", "-1"]),
    "unknown kind": (
        lambda t, s: train(t, s, "model.connector.kind=qformer"),
        ["model.connector", "qformer", "transformer"],
    ),
    "no equals sign": (lambda t, s: train(t, s, "optim.lr"), ["optim.lr"]),
    "missing configuration": (lambda t, s: ["train", str(t / "none.yaml")], ["none.yaml"]),
    "broken YAML": (lambda t, s: ["train", str(text_file(t, "a: [1"))], ["file"]),
    "no data": (lambda t, s: ["train", TINY, f"run_dir={t}"], ["data.train"]),
    "no run directory": (lambda t, s: ["train", TINY, f"data.train={s}"], ["run_dir"]),
    "no shards matched": (lambda t, s: train(t, t / "nothing*.tar"), ["nothing*.tar"]),
    "no shards in the directory": (lambda t, s: train(t / "run", t), ["no"]),
    "no index": (no_index, ["index_shards"]),
    "stale index": (stale_index, ["index_shards"]),
    "truncated tar": (truncated, [".tar"]),
    "truncated foreign tar": (truncated_foreign, [".tar", "truncated"]),
    "everything dropped": (lambda t, s: train(t, s, "data.min_seconds=99"), ["min_seconds"]),
    "no such model": (
        lambda t, s: train(t, s, f"model.llm.id={t}/none"), [f"{'none'}", "hub id"],
    ),
    "not a model": (lambda t, s: train(t, s, f"model.llm.id={t}"), ["config.json"]),
    "no such random model": (
        lambda t, s: train(t, s, "model.llm.id=random:gpt"), ["random:gpt", "random:llama"],
    ),
    "a GPU where there is none": (lambda t, s: train(t, s, "device=cuda"), ["cuda", "cpu"]),
    "another connector": (
        lambda t, s: trained(t, s, "model.connector.downsampling_factor=4"), ["model.connector"],
    ),
    "another LLM": (lambda t, s: trained(t, s, "model.llm.id=random:qwen2"), ["llm", "run_dir"]),
    "another encoder": (lambda t, s: trained(t, s, "model.encoder.kind=fbank"), ["encoder"]),
    "init_from nothing": (
        lambda t, s: train(t, s, f"train.init_from={t}/none"), ["none", "checkpoint"],
    ),
    "generate without a run": (
        lambda t, s: ["generate", str(t), "--split", f"test={s}"], ["checkpoint"],
    ),
    "a split without a name": (lambda t, s: ["generate", str(t), "--split", str(s)], ["NAME="]),
    "a split named as a path": (
        lambda t, s: ["generate", str(t), "--split", f"../x={s}"], ["../x"],
    ),
    "a split named twice": (
        lambda t, s: ["generate", str(t), "--split", f"test={s}", "--split", "test=data/other"],
        ["'test'", "twice"],
    ),
    "wer of nothing": (lambda t, s: ["wer", str(t / "none.jsonl")], ["none.jsonl"]),
    "wer of something else": (lambda t, s: ["wer", str(text_file(t, "hello"))], ["file"]),
    "report of no run": (lambda t, s: ["report", str(t)], ["config.yaml"]),
    "transcribe a missing file": (
        lambda t, s: ["transcribe", str(t), str(t / "none.wav")], ["none.wav"],
    ),
    "transcribe no audio": (
        lambda t, s: ["transcribe", str(t), str(text_file(t, "hello"))], ["file"],
    ),
    "manifest missing": (
        lambda t, s: tool("make_shards", t / "none.jsonl", "--out", t / "o"), ["none.jsonl"],
    ),
    "manifest not JSON": (lambda t, s: shard_tool(t, "{"), ["manifest.jsonl:1"]),
    "manifest without audio": (
        lambda t, s: shard_tool(t, '{"id": "a", "text": "b"}'), ["manifest.jsonl:1", "audio"],
    ),
    "manifest with an id twice": (
        lambda t, s: shard_tool(t, *['{"id": "a", "audio": "a.wav", "text": "b"}'] * 2),
        ["'a'", "1", "2"],
    ),
    "manifest of missing files": (
        lambda t, s: shard_tool(t, '{"id": "a", "audio": "gone.wav", "text": "b"}'), ["gone.wav"],
    ),
    "inspect nothing": (lambda t, s: tool("inspect_shards", t / "none.tar"), ["none.tar"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train"], "required: CONFIG\n"),
        (["wer", "a.jsonl", "--json", "--errors", "3"], "--errors: not allowed with"),
    ],
)
def test_the_parser_says_what_is_wrong(
    command: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_exit_code_2_and_a_message(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case, wanted = CASES[name]
    shards = write_shards(tmp_path / "shards", 8, num_shards=2)
    command = case(tmp_path, shards)
    capfd.readouterr()
    if command[0].startswith("tool:"):
        script = ROOT / "tools" / f"{command[0].removeprefix('tool:')}.py"
        done = subprocess.run(
            [sys.executable, str(script), *command[1:]], capture_output=True, text=True
        )
        code, message = done.returncode, done.stderr
    else:
        code = main(command)
        message = capfd.readouterr().err
    assert code == 2, message
    assert "Traceback" not in message
    for word in wanted:
        assert word in message, f"{word!r} is not in: {message}"


AUDIO = {
    "stereo": np.stack([tone(0.5)] * 2, axis=1),
    "8 kHz": tone(0.5, rate=8_000),
    "44.1 kHz": tone(0.5, rate=44_100),
    "48 kHz": tone(0.5, rate=48_000),
}
RATES = {"8 kHz": 8_000, "44.1 kHz": 44_100, "48 kHz": 48_000}


def build(tmp: Path, lines: list[dict[str, object]]) -> tuple[Store, dict[str, object], list[dict]]:
    path = manifest(tmp, *(json.dumps(line, ensure_ascii=False) for line in lines))
    script = ROOT / "tools" / "make_shards.py"
    done = subprocess.run(
        [sys.executable, str(script), str(path), "--out", str(tmp / "out"), "--num-workers", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp / "out" / "report.json").read_text())
    dropped = (tmp / "out" / "dropped.jsonl").read_text().splitlines()
    return Store(open_corpus([str(tmp / "out")])), report, [json.loads(x) for x in dropped]


def test_odd_audio_and_text_are_taken_and_broken_ones_counted(tmp_path: Path) -> None:
    """Every rate and channel count ends as 16 kHz mono; what cannot be used is listed with why."""
    lines = []
    for name, samples in AUDIO.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, RATES.get(name, 16_000))
        lines.append({"id": name, "audio": f"{name}.wav", "text": "žluťoučký kůň 漢字"})
    nan = np.full(800, np.nan, dtype=np.float32)
    soundfile.write(tmp_path / "nan.wav", nan, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.int16), 16_000)
    (tmp_path / "noise.wav").write_bytes(b"this is not audio")
    for name in ("nan", "empty", "noise", "gone"):
        lines.append({"id": name, "audio": f"{name}.wav", "text": "x"})
    lines.append({"id": "no text", "audio": "stereo.wav"})
    lines.append({"id": "blank text", "audio": "stereo.wav", "text": "  "})
    store, report, dropped = build(tmp_path, lines)
    found = {store.read(i).fields["id"]: store.read(i) for i in range(len(AUDIO))}
    assert found.keys() == AUDIO.keys()
    for utterance in found.values():
        assert utterance.text == "žluťoučký kůň 漢字"
        assert utterance.samples.dtype == np.int16
        assert len(utterance.samples) == pytest.approx(8000, abs=2)
        assert np.abs(utterance.samples).max() > 5000
    assert {line["id"] for line in dropped} == {
        "nan", "empty", "noise", "gone", "no text", "blank text",
    }  # fmt: skip
    assert all(line["reason"] for line in dropped)
    assert report["utterances"] == len(AUDIO)


def test_bad_members_of_a_foreign_shard_are_skipped_in_training(tmp_path: Path) -> None:
    """Audio that goes bad after indexing costs its utterance, and is counted."""
    shards = write_shards(tmp_path / "shards", 12)
    corpus = open_corpus([str(shards)])
    where = corpus.location(3)
    with open(where.shard, "r+b") as tar:
        tar.seek(where.audio_offset)
        tar.write(b"\0" * where.audio_size)
    assert main(train(tmp_path / "run", shards, "data.max_bad_fraction=0.2")) == 0
    assert metrics(tmp_path / "run")[0]["bad_utterances"] == 1
    assert main(train(tmp_path / "strict", shards, "data.max_bad_fraction=0")) == 2


def test_wer_and_help_need_no_torch() -> None:
    code = (
        "import sys; from speechllm.cli import main\n"
        "try:\n    main(['train', 'none.yaml'])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
