"""The reference of the site profile as Markdown: python -m speechllm.cluster.reference [FILE].

Prints the tables, or renews them between the markers of FILE.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from speechllm.cluster.profile import SiteProfile
from speechllm.config.fields import children, sections

BEGIN = "<!-- generated from speechllm/cluster/profile.py: begin -->"
END = "<!-- generated: end -->"


def profile_reference() -> str:
    """One table for each section of a profile: key, default, meaning."""
    return "\n".join(_lines())


def splice_reference(document: str) -> str:
    """`document` with what stands between its markers renewed. Raises ValueError without them."""
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document needs {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{profile_reference()}\n{END}{tail}"


def _lines() -> Iterator[str]:
    for prefix, kind, cls in sections(SiteProfile):
        title = f"`{prefix}`" if prefix else "Top level"
        yield f"### {title}{f', kind `{kind}`' if kind and prefix else ''}\n"
        yield "| key | default | meaning |\n|---|---|---|"
        below = children(cls)
        for name, field in cls.model_fields.items():
            shown = "section" if name in below else _default(field)
            meaning = (field.description or "").replace("|", r"\|")
            yield f"| `{name}` | {shown} | {meaning} |"
        yield ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    if isinstance(value, tuple) and value:
        return f"`{list(value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value in (None, "", (), {}) else f"`{value}`"


def main(arguments: list[str]) -> int:
    if not arguments:
        print(profile_reference())
        return 0
    file = Path(arguments[0])
    file.write_text(splice_reference(file.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
