"""The configuration reference as Markdown, from the schema's own types, defaults, descriptions."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from speechllm.config.fields import children, default_kind, named_children, sections
from speechllm.config.section import Section


def config_reference() -> str:
    """One Markdown table for each section (and each kind of it): key, type, default, meaning."""
    tables = [_table(prefix, kind, cls) for prefix, kind, cls in sections()]
    return "\n\n".join(tables) + "\n"


def _table(prefix: str, kind: str | None, cls: type[Section]) -> str:
    title = f"`{prefix}`" if prefix else "Top level"
    rows = [f"### {title}{f', kind `{kind}`' if kind else ''}", ""]
    rows += ["| key | type | default | meaning |", "|---|---|---|---|"]
    below, by_name = children(cls), named_children(cls)
    for name, field in cls.model_fields.items():
        if name in below:
            known = list(below[name])
            cells = ("section", "required" if field.is_required() else _usual(below[name]))
            if len(known) > 1:
                cells = ("section of a kind: " + ", ".join(f"`{k}`" for k in known), cells[1])
        elif name in by_name:
            cells = ("sections by name", "none")
        else:
            cells = (_type(field), _default(field))
        assert field.description, f"{cls.__name__}.{name} has no description"
        rows.append(
            "| " + " | ".join((f"`{name}`", *map(_cell, (*cells, field.description)))) + " |"
        )
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _usual(members: dict[str | None, type[Section]]) -> str:
    kind = default_kind(members)
    return f"kind `{kind}`" if kind else "as below"


def _type(field: FieldInfo) -> str:
    return _describe(field.annotation) + _bounds(field.metadata)


def _describe(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _describe(a) for a in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"one or a list of {_describe(arguments[0])}"
        return f"list of {len(arguments)}: {_describe(arguments[0])}"
    return {int: "integer", float: "number", bool: "true or false", str: "text"}[annotation]


def _bounds(metadata: Any) -> str:
    words = ""
    for item in metadata:
        for bound in item.metadata if isinstance(item, FieldInfo) else [item]:
            match bound:
                case annotated_types.Ge(ge):
                    words += f", ≥ {ge}"
                case annotated_types.Gt(gt):
                    words += f", > {gt}"
                case annotated_types.Le(le):
                    words += f", ≤ {le}"
                case annotated_types.Lt(lt):
                    words += f", < {lt}"
                case annotated_types.MinLen(length):
                    words += f", at least {length}"
    return words


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    match value:
        case None:
            return "none"
        case str():
            return f"`{value}`"
        case ():
            return "none"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"
