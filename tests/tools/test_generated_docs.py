from __future__ import annotations

import shutil
from pathlib import Path

import generated_docs as tool
import pytest
import strategy_tables
from runs import ROOT


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_documents_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--check"]) == 0, capsys.readouterr().err


def test_outdated_documents_are_reported_and_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(strategy_tables, "GPUS", (8,))
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    file = tmp_path / "docs" / "configuration.md"
    text = file.read_text()
    file.write_text(text.replace("Peak learning rate.", "Old words."))
    assert tool.main(["--check"], root=tmp_path) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in said] == [str(file), str(file.with_name("strategies.md"))]
    assert "Old words." in file.read_text()
    assert tool.main([], root=tmp_path) == 0
    assert tool.main(["--check"], root=tmp_path) == 0
    assert file.read_text() == text
    tables = file.with_name("strategies.md").read_text()
    assert "| OLMo-2 1B | 8 |" in tables
    assert "| OLMo-2 1B | 64 |" not in tables
