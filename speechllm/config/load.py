"""Reads YAML and dotted overrides into one validated Config, and writes it back.

Scalars stay text until the type of their field decides what they are. So `2e-3` is a number where
a number is wanted, although YAML 1.1 calls it a string; `no` is a string where a string is wanted
and false where a truth value is; a revision such as `1234567` or `1e5` stays as it was written.
Only an unquoted `null`, `~` or nothing at all means none.

A file and overrides are merged before the one validation, so the order of keys never matters.
Relative paths are relative to the current directory, not to the file.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError

from speechllm.config.explain import Origins, explain
from speechllm.config.fields import children, default_kind, kinds, named_children
from speechllm.config.schema import Config
from speechllm.config.section import Section
from speechllm.errors import ConfigError

S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader that tells only null and merge keys (<<) from text; see the module."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes text with odd line breaks (U+0085, U+2028) so that it reads back."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


class Override(NamedTuple):
    key: str
    value: Any
    text: str  # as the user wrote it


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path` (None: nothing but overrides), apply `a.b.c=value`s, validate.

    A later override of the same key wins. A value that starts with `[`, `{` or a quote is YAML;
    everything else is the text itself. An override that changes the `kind` of a section drops what
    the file says in that section, for those are settings of the kind that is no longer meant.

    Raises:
        ConfigError: one line for each thing that is wrong, with file and line or the override.
    """
    tree, origins = read_tree(path, overrides, Config)
    return validated(_with_empty_sections(tree, Config), origins, Config)


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal Config; every key is written out."""
    content = config.model_dump(mode="json")
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_tree(
    path: str | None, overrides: Sequence[str], root: type[Section]
) -> tuple[dict[str, Any], Origins]:
    """A file of a `root` with the overrides put in, not yet validated, and where its keys stand."""
    tree, lines = _read(path) if path is not None else ({}, {})
    parsed = [_parse_override(text) for text in overrides]
    origins = Origins(path, lines, {o.key: o.text for o in parsed})
    return _apply(tree, parsed, origins, root), origins


def validated(tree: Mapping[str, Any], origins: Origins, root: type[S]) -> S:
    """Raises ConfigError with a line for each thing that is wrong."""
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, origins, root))) from None


def dumped_values(text: str) -> dict[str, Any]:
    """The values of what `dump_config` wrote, as text, by dotted key; whatever the schema was then.

    Raises ConfigError where it is no such text.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_error("configuration", error)) from None
    finally:
        loader.dispose()
    if not isinstance(root, dict):
        raise ConfigError("configuration: expected `key: value` lines at the top level")
    return dict(_leaves(root, ""))


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The file as nested dictionaries, and the line of every dotted key in it."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_neighbour(file)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; name a YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                raise ConfigError(f"{path}: the file is empty; expected `key: value` lines")
            if not isinstance(root, yaml.MappingNode):
                raise ConfigError(f"{path}: expected `key: value` lines at the top level")
            lines: dict[str, int] = {}
            _locate(root, "", path, lines, above=())
            return loader.construct_document(root), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_error(path, error)) from None


def _neighbour(file: Path) -> str:
    if not file.parent.is_dir():
        return f" (and no directory {file.parent})"
    names = sorted(p.name for p in file.parent.iterdir() if p.suffix in (".yaml", ".yml", ".json"))
    near = difflib.get_close_matches(file.name, names, n=1)
    return f"; did you mean {file.parent / near[0]}?" if near else ""


def _syntax_error(where: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{place}: not valid YAML: {problem}"


def _locate(
    node: yaml.MappingNode,
    prefix: str,
    path: str,
    lines: dict[str, int],
    above: tuple[yaml.MappingNode, ...],
) -> None:
    """Record the line of every key; refuse keys that stand twice (YAML would keep the last)."""
    if node in above:
        raise ConfigError(f"{path}: {prefix} is an alias of a section that holds it")
    here: dict[str, int] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            place = f"{path}:{key_node.start_mark.line + 1}"
            raise ConfigError(f"{place}: a key must be a plain name, not a list or a mapping")
        key = f"{prefix}.{key_node.value}" if prefix else key_node.value
        line = key_node.start_mark.line + 1
        if key in here:
            raise ConfigError(
                f"{path}:{line}: {key} stands twice, first in line {here[key]}; remove one"
            )
        here[key] = line
        lines.setdefault(key, line)
        if isinstance(value_node, yaml.MappingNode):
            _locate(value_node, key, path, lines, (*above, node))


def _parse_override(text: str) -> Override:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"override {text!r}: not UTF-8; config.yaml could not hold it") from None
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {text!r}: expected KEY=VALUE, as in optim.lr=2e-4")
    value = value.strip()
    if value in ("", "null", "~"):
        return Override(key, None, text)
    if value[0] not in "[{\"'":
        return Override(key, value, text)
    try:
        loader = _Loader(value)
        try:
            return Override(key, loader.get_single_data(), text)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {text}: the value starts like a YAML list, mapping or quoted text but is "
            f"none ({getattr(error, 'problem', error)}); for the text as it stands write "
            f"{key}='\"...\"'"
        ) from None


def _apply(
    tree: dict[str, Any], overrides: Sequence[Override], origins: Origins, root: type[Section]
) -> dict[str, Any]:
    """`tree` with the overrides put in: changed kinds first, then all in the order given."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        if override.key.endswith(".kind"):
            _drop_other_kind(tree, override, root)
    for override in overrides:
        *parents, last = override.key.split(".")
        section = tree
        for depth, name in enumerate(parents, start=1):
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                parent = ".".join(parents[:depth])
                raise ConfigError(
                    f"{origins.of(parent)}: {parent} is {section!r}, not a section, so "
                    f"{override.text} cannot be set in it"
                )
        section[last] = override.value
    return tree


def _drop_other_kind(tree: dict[str, Any], override: Override, root: type[Section]) -> None:
    """Empty the section whose kind the override changes, where it is one of several kinds."""
    *parents, name, _ = override.key.split(".")
    parent: Any = tree
    cls = root
    for step in parents:
        below = kinds(cls.model_fields[step].annotation) if step in cls.model_fields else {}
        parent = parent.get(step) if isinstance(parent, dict) else None
        if None not in below or not isinstance(parent, dict):
            return
        cls = below[None]
    members = children(cls).get(name, {})
    section = parent.get(name)
    if len(members) < 2 or not isinstance(section, dict):
        return
    if section.get("kind", default_kind(members)) != override.value:
        parent[name] = {}


def _with_empty_sections(tree: Mapping[str, Any], cls: type[Section]) -> dict[str, Any]:
    """Sections that are missing or empty become {}, so that their missing keys are named."""
    full = dict(tree)
    for name, members in children(cls).items():
        if full.get(name) is None:
            full[name] = {}
        if isinstance(full[name], dict) and None in members:
            full[name] = _with_empty_sections(full[name], members[None])
    for name, by_name in named_children(cls).items():
        if isinstance(full.get(name), dict):
            named = {key: {} if value is None else value for key, value in full[name].items()}
            full[name] = {
                key: _with_empty_sections(value, by_name) if isinstance(value, dict) else value
                for key, value in named.items()
            }
    return full
