from __future__ import annotations

import re
from pathlib import Path

import pytest

from speechllm.cluster.profile import SiteProfile, site_names
from speechllm.cluster.submit import main
from speechllm.config.fields import sections

DOCUMENT = Path(__file__).parents[2] / "docs" / "cluster.md"


def test_every_key_says_what_it_is_for() -> None:
    for prefix, _, cls in sections(SiteProfile):
        for name, field in cls.model_fields.items():
            assert field.description, f"{prefix}.{name}"


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
