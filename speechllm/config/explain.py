"""Turns pydantic's errors into lines that name the place, the key, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from speechllm.config.fields import all_keys, children, members_at, named_children
from speechllm.config.section import Section


@dataclass(frozen=True)
class Origins:
    """Where each dotted key was given: in which line of the file, or in which override."""

    path: str | None
    lines: Mapping[str, int]
    overrides: Mapping[str, str]

    def of(self, key: str) -> str:
        """The override that gave `key` or a part of it, else the file with the line."""
        for given, text in reversed(list(self.overrides.items())):
            if given == key or given.startswith(f"{key}.") or key.startswith(f"{given}."):
                return f"override {text}"
        if self.path is None:
            return "configuration"
        while key:
            if key in self.lines:
                return f"{self.path}:{self.lines[key]}"
            key = key.rpartition(".")[0]
        return self.path


def explain(error: ValidationError, origins: Origins, root: type[Section]) -> list[str]:
    """One line for each error of a `root`, in the order of its schema."""
    return [_line(details, origins, root) for details in error.errors(include_url=False)]


def _line(details: ErrorDetails, origins: Origins, root: type[Section]) -> str:
    key, item, cls = _place(details["loc"], root)
    context = details.get("ctx", {})
    value = details.get("input")
    match details["type"]:
        case "extra_forbidden":
            meant = _meant(str(details["loc"][-1]), key, cls, root)
            return f"{origins.of(key)}: {key}: no such key{meant}"
        case "missing":
            name = key.rpartition(".")[2]
            return (
                f"{origins.path or 'configuration'}: {key} is missing: "
                f"{cls.model_fields[name].description}"
            )
        case "union_tag_invalid":
            valid = [tag.strip("'") for tag in context["expected_tags"].split(", ")]
            place = origins.of(f"{key}.kind")
            tag = context["tag"]
            return f"{place}: {key}.kind: expected {_listed(valid)}, got {tag!r}{_near(tag, valid)}"
        case "union_tag_not_found" | "model_type" | "model_attributes_type" | "dict_type":
            return f"{origins.of(key)}: {key}: expected a section of keys, got {value!r}"
        case "value_error":
            reason = str(context.get("error", details["msg"]))
            return f"{origins.of(key)}: {key}: {reason}" if key else f"{origins.of('')}: {reason}"
    near = ""
    if details["type"] == "literal_error":
        valid = context["expected"].replace(" or ", ", ").split(", ")
        near = _near(value, [choice.strip("'") for choice in valid])
    return f"{origins.of(key)}: {key}{item}: expected {_expected(details)}, got {value!r}{near}"


def _expected(details: ErrorDetails) -> str:
    match details["type"].split("_")[0]:
        case "int":
            return "a whole number"
        case "float":
            return "a number"
        case "bool":
            return "true or false"
        case "string":
            return "text"
        case "tuple":
            return "a list"
        case "too":  # too_short, too_long
            bound = details["msg"].partition("should have ")[2].partition(" after")[0]
            return f"a list of {bound}"
    return details["msg"].removeprefix("Input should be ")


def _place(loc: Sequence[int | str], root: type[Section]) -> tuple[str, str, type[Section]]:
    """(dotted key, "[i]" of an item in its list or "", class of the section that holds the key).

    In a section of several kinds pydantic puts the kind between the names; it is no key. Behind a
    key of a dictionary that is itself wrong it puts "[key]".
    """
    names: list[str] = []
    cls = root
    members: Mapping[str | None, type[Section]] = {}
    by_name: type[Section] | None = None
    item = ""
    for part in loc:
        if len(members) > 1 and part in members:
            cls, members = members[str(part)], {}
            continue
        if len(members) == 1:
            cls, members = next(iter(members.values())), {}
        if isinstance(part, int):
            item += f"[{part}]"
        elif part != "[key]":
            names.append(part)
            if by_name is not None:
                members, by_name = {None: by_name}, None
            else:
                members = children(cls).get(part, {})
                by_name = named_children(cls).get(part)
    return ".".join(names), item, cls


def _meant(name: str, key: str, cls: type[Section], root: type[Section]) -> str:
    """What an unknown `name`, whose place is `key` in a section `cls`, may have been meant for."""
    known_keys = all_keys(root)
    if "." in name and name in known_keys:
        return f"; write it as nested sections ({': '.join(name.split('.'))}: ...)"
    prefix = key.removesuffix(name).removesuffix(".")
    owners = [
        kind for kind, other in members_at(prefix, root).items() if name in other.model_fields
    ]
    if owners:
        kind = cls.model_fields["kind"].default
        return f" of kind {kind}; it belongs to {_listed([str(owner) for owner in owners])}"
    if name in known_keys:
        return f"; write it without {prefix}." if prefix else ""
    near = difflib.get_close_matches(name, cls.model_fields, n=1)
    if near:
        return f"; did you mean {f'{prefix}.' if prefix else ''}{near[0]}?"
    by_name = {known.rpartition(".")[2]: known for known in known_keys}
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {by_name[near[0]]}?"
    return f"; there are {', '.join(cls.model_fields)}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _near(value: Any, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), valid, n=1)
    return f"; did you mean {near[0]}?" if near else ""
