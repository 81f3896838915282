"""The decoding benchmark at sizes that take a moment; what is asserted is what it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_decode
import pytest
from speech_files import write_shards

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "configs" / "tiny.yaml")
CHAT = ["model.prompt.kind=chat", 'model.prompt.texts=["Say it: {audio}"]']


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("bench")
    pieces = write_shards(directory / "pieces", 30, seconds=(0.5, 3.0))
    file = directory / "found" / "bench.json"
    bench_decode.main(
        [TINY, *CHAT, "--mean-seconds", "2", "--count", "5", "--beams", "1,2", "--batches", "1,3",
         "--rounds", "1", "--source", str(pieces), "--speech-cache", str(directory / "speech"),
         "--json", str(file), "performance.plain_utterances=2"]
    )  # fmt: skip
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_way_says_the_same(found: dict[str, Any]) -> None:
    assert [entry["equal_text"] for entry in found["beams"]] == [1.0, 1.0]
    assert [entry["num_beams"] for entry in found["beams"]] == [1, 2]


def test_the_ratios_of_the_ways_multiply_to_the_speedup(found: dict[str, Any]) -> None:
    product = 1.0
    for entry in found["ablation"]:
        product *= entry["ratio"]
    assert [entry["added"] for entry in found["ablation"]] == [
        "plain path", "the encoder as configured", "batches by length", "own loop",
        "prefix once a run",
    ]  # fmt: skip
    assert product == pytest.approx(found["speedup"])
    speeds = [found[name]["utterances_per_second"] for name in ("plain", "full")]
    assert speeds[1] / speeds[0] == pytest.approx(found["speedup"])


def test_speed_is_counted_in_texts_and_in_their_audio(found: dict[str, Any]) -> None:
    assert [(size["num_beams"], size["batch"]) for size in found["batches"]] == [
        (1, 1), (1, 3), (2, 1), (2, 3),
    ]  # fmt: skip
    spoken = found["speech"]["mean"] * 5
    for size in found["batches"]:
        seconds = 5 / size["utterances_per_second"]
        assert size["real_time_factor"] == pytest.approx(seconds / spoken, rel=0.01)
        assert size["tokens_per_second"] == pytest.approx(found["full"]["tokens"] / seconds)
