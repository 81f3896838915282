from pathlib import Path

import config_reference as tool
import pytest

from speechllm.config.fields import sections
from speechllm.config.reference import config_reference, splice_reference

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_document_is_up_to_date(capsys):
    assert tool.main(["--check", str(DOCUMENT)]) == 0, capsys.readouterr().err


def test_every_key_stands_in_the_reference_with_a_description():
    reference = config_reference()
    for _, _, cls in sections():
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name} needs a description"
            assert f"| `{name}` |" in reference
            assert field.description.replace("|", r"\|") in reference


def test_types_bounds_and_defaults_are_shown():
    rows = set(config_reference().splitlines())
    assert (
        "| `betas` | list of 2: number, ≥ 0, < 1 | `[0.9, 0.999]` "
        "| Decay rates of Adam's moments. |"
    ) in rows
    assert "| `run_dir` | text or none | none | Where everything of the run is written. |" in rows
    assert any(row.startswith("| `id` | text | required | Hub id") for row in rows)
    assert any(row.startswith("| `connector` | section of a kind: `transformer`") for row in rows)


def test_an_outdated_document_is_reported_and_renewed(tmp_path, capsys):
    file = tmp_path / "doc.md"
    file.write_text(DOCUMENT.read_text().replace("Peak learning rate.", "Old words."))
    assert tool.main(["--check", str(file)]) == 1
    assert "--write" in capsys.readouterr().err
    assert tool.main(["--write", str(file)]) == 0
    assert file.read_text() == DOCUMENT.read_text()


def test_a_document_without_markers_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="needs"):
        splice_reference("# Title\n")
    (tmp_path / "doc.md").write_text("# Title\n")
    assert tool.main(["--check", str(tmp_path / "doc.md")]) == 2
    assert tool.main(["--check", str(tmp_path / "none.md")]) == 2
    assert "doc.md" in capsys.readouterr().err


def test_without_options_the_tables_are_printed(capsys):
    assert tool.main([]) == 0
    assert capsys.readouterr().out == config_reference()
