from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from speech_files import write_corpus

import speechllm
from speechllm.data.cleaning import CleanSettings
from speechllm.data.dataset_card import ShardCard, read_card, write_cards
from speechllm.data.histograms import EDGES
from speechllm.data.packing import PackReport, pack
from speechllm.data.prepare import PrepareSettings
from speechllm.data.sources.read import read_sources
from speechllm.data.sources.spec import SourceOptions
from speechllm.data.surveying import PackSettings
from speechllm.errors import DataError


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> PackReport:
    directory = tmp_path_factory.mktemp("build")
    path = write_corpus(directory / "in", 8, seconds=(0.1, 0.4), name="dev")
    clean = CleanSettings(max_seconds=0.25, normalise=("lowercase",))
    built = pack(
        read_sources([f"jsonl:{path}"], SourceOptions()),
        str(directory / "out"),
        PackSettings(20_000, 3, PrepareSettings(clean=clean)),
        num_workers=1,
        overwrite=False,
        progress=lambda what, done, total: None,
    )
    write_cards(str(directory / "out"), built)
    return built


@pytest.fixture
def out(report: PackReport) -> Path:
    return Path(report.shards[0].shard).parent


def test_dataset_json_tells_what_the_shards_are(report: PackReport, out: Path) -> None:
    values = json.loads((out / "dataset.json").read_text())
    assert list(values) == [
        "format",
        "name",
        "source_sha256",
        "settings",
        "versions",
        "utterances",
        "hours",
        "bytes",
        "shards",
    ]
    assert values["name"] == "dev"
    assert values["settings"]["seed"] == 3
    assert values["settings"]["normalise"] == ["lowercase"]
    assert values["versions"][0]["speechllm"] == speechllm.__version__
    assert {"libsndfile", "soxr"} <= set(values["versions"][0])
    assert 0 < values["utterances"] == report.utterances < 8
    assert len(values["shards"]) == len(list(out.glob("*.tar"))) > 1
    for shard in values["shards"]:
        content = (out / shard["file"]).read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    for name in ("utterances", "bytes"):
        assert values[name] == sum(shard[name] for shard in values["shards"])
    assert values["hours"] == pytest.approx(sum(s["seconds"] for s in values["shards"]) / 3600)


def test_a_card_is_read_back(report: PackReport, out: Path) -> None:
    card = read_card(str(out))
    assert card is not None
    assert all(isinstance(shard, ShardCard) for shard in card)
    assert [shard.sha256 for shard in card] == [shard.sha256 for shard in report.shards]
    assert read_card(str(out.parent)) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shards": [{"file": 1}]}'])
def test_a_card_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset\.json: not what make_shards writes"):
        read_card(str(tmp_path))


def test_the_report_counts_and_the_page_shows(report: PackReport, out: Path) -> None:
    values = json.loads((out / "report.json").read_text())
    assert values["dropped"] == {"too long": 8 - report.utterances}
    assert set(values["histograms"]) == set(EDGES)
    for histogram in values["histograms"].values():
        assert len(histogram["edges"]) == len(histogram["counts"])
        assert sum(histogram["counts"]) == report.utterances
    page = (out / "report.html").read_text()
    assert page.count("<svg") == len(EDGES)
    assert "too long" in page
    assert "http" not in page  # nothing is fetched
    lines = (out / "dropped.jsonl").read_text().splitlines()
    assert len(lines) == 8 - report.utterances
    assert json.loads(lines[0])["reason"] == "too long"
