from __future__ import annotations

import re
from pathlib import Path

import pytest

from speechllm.cluster.profile import SiteProfile, site_names
from speechllm.cluster.reference import splice_reference
from speechllm.cluster.submit import main
from speechllm.config.fields import sections

DOCUMENT = Path(__file__).parents[2] / "docs" / "cluster.md"


def test_the_profile_reference_is_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert splice_reference(text) == text, (
        f"run: python -m speechllm.cluster.reference {DOCUMENT.relative_to(Path.cwd())}"
    )


def test_every_key_says_what_it_is_for() -> None:
    for prefix, _, cls in sections(SiteProfile):
        for name, field in cls.model_fields.items():
            assert field.description, f"{prefix}.{name}"


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs <!-- generated"):
        splice_reference("text")


def test_the_document_knows_every_command_and_site(capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert {"train", "doctor", "cancel"} <= set(commands)
    for command in commands:
        assert f"| `{command} " in text or f"| `{command}`" in text, command
    for site in site_names():
        assert f"| `{site}` |" in text, site
