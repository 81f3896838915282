from pathlib import Path

import pytest
import strategy_tables as tool

DOCUMENT = Path(__file__).parents[2] / "docs" / "strategies.md"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_document_is_up_to_date(capsys):
    assert tool.main(["--check", str(DOCUMENT)]) == 0, capsys.readouterr().err


def test_an_outdated_document_is_reported_and_renewed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "GPUS", (8,))
    file = tmp_path / "doc.md"
    file.write_text(DOCUMENT.read_text())
    assert tool.main(["--check", str(file)]) == 1
    assert "--write" in capsys.readouterr().err
    assert tool.main(["--write", str(file)]) == 0
    assert tool.main(["--check", str(file)]) == 0
    assert "| OLMo-2 1B | 8 |" in file.read_text()
    assert "| OLMo-2 1B | 64 |" not in file.read_text()


def test_a_document_without_markers_is_refused(tmp_path, capsys):
    (tmp_path / "doc.md").write_text("# Title\n")
    assert tool.main(["--check", str(tmp_path / "doc.md")]) == 2
    assert tool.main(["--check", str(tmp_path / "none.md")]) == 2
    assert "doc.md" in capsys.readouterr().err
