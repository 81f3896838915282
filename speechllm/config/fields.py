"""Walks the schema: which sections there are, under which dotted key, of which kinds."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from speechllm.config.schema import Config
from speechllm.config.section import Section


def kinds(annotation: Any) -> dict[str | None, type[Section]]:
    """The sections that a field may hold, by `kind` (None where the section has none).

    Empty for a field that holds a value.
    """
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members: dict[str | None, type[Section]] = {}
        for member in get_args(annotation):
            members |= kinds(member)
        return members
    if isinstance(annotation, type) and issubclass(annotation, Section):
        kind = annotation.model_fields.get("kind")
        return {kind.default if kind and len(get_args(kind.annotation)) == 1 else None: annotation}
    return {}


def named(annotation: Any) -> type[Section] | None:
    """The class of the sections that a field holds by names of the user's own; None elsewhere."""
    if get_origin(annotation) is not dict:
        return None
    classes = list(kinds(get_args(annotation)[1]).values())
    assert len(classes) <= 1, f"{annotation}: sections by name are all of one kind"
    return classes[0] if classes else None


def children(section: type[Section]) -> dict[str, dict[str | None, type[Section]]]:
    """The fields of `section` that hold sections themselves, with their kinds."""
    found = {name: kinds(field.annotation) for name, field in section.model_fields.items()}
    return {name: members for name, members in found.items() if members}


def named_children(section: type[Section]) -> dict[str, type[Section]]:
    """The fields of `section` that hold sections by names, and the class of those."""
    found = {name: named(field.annotation) for name, field in section.model_fields.items()}
    return {name: cls for name, cls in found.items() if cls is not None}


def members_at(key: str, root: type[Section] = Config) -> Mapping[str | None, type[Section]]:
    """The sections that may stand at a real dotted key below `root`, by kind."""
    members: Mapping[str | None, type[Section]] = {None: root}
    by_name: type[Section] | None = None
    for name in key.split(".") if key else []:
        if by_name is not None:
            members, by_name = {None: by_name}, None
            continue
        field = next(iter(members.values())).model_fields[name]
        members, by_name = kinds(field.annotation), named(field.annotation)
    return members


def default_kind(members: Mapping[str | None, type[Section]]) -> str | None:
    """The kind meant where `kind` is left out: the first of the union."""
    return next(iter(members))


def sections(root: type[Section] = Config) -> Iterator[tuple[str, str | None, type[Section]]]:
    """(dotted key, kind, class) of the root ("") and of all sections below it, in schema order.

    NAME stands in the key of sections that have names of the user's own.
    """

    def walk(
        prefix: str, members: Mapping[str | None, type[Section]]
    ) -> Iterator[tuple[str, str | None, type[Section]]]:
        for kind, cls in members.items():
            yield prefix, kind, cls
            for name, below in children(cls).items():
                yield from walk(f"{prefix}.{name}" if prefix else name, below)
            for name, by_name in named_children(cls).items():
                yield from walk(f"{prefix}.{name}.NAME", {None: by_name})

    return walk("", {None: root})


def all_keys(root: type[Section] = Config) -> list[str]:
    """Every dotted key that a file of `root` may give, each once."""
    keys = [
        f"{prefix}.{name}" if prefix else name
        for prefix, _, cls in sections(root)
        for name in cls.model_fields
    ]
    return list(dict.fromkeys(keys))
