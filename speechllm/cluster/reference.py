"""The reference of the site profile as Markdown, from its own defaults and descriptions."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from speechllm.cluster.profile import SiteProfile
from speechllm.config.fields import children, sections


def profile_reference() -> str:
    """One table for each section of a profile: key, default, meaning."""
    return "\n".join(_lines())


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
