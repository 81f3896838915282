"""The options that say which corpora a tool reads."""

from __future__ import annotations

import argparse

from speechllm.data.manifest import Manifest
from speechllm.data.sources.read import read_sources
from speechllm.data.sources.spec import KINDS, SourceOptions, parse_spec
from speechllm.errors import UserError


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """`manifest` (short for `--source jsonl:...`), `--source` and what belongs to them."""
    group = parser.add_argument_group("sources", f"kinds: {', '.join(KINDS)}")
    group.add_argument(
        "manifest", nargs="?", help="JSONL file; the same as --source jsonl:MANIFEST"
    )
    group.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="KIND:PATH[,key=value...]",
        help="a corpus; may be given several times",
    )
    group.add_argument("--name", help="of the shards (default: the first source's)")
    group.add_argument(
        "--allow-commands",
        action="store_true",
        help="run the shell commands that the corpora name (`cmd |` of wav.scp)",
    )
    group.add_argument(
        "--command-timeout",
        type=float,
        default=SourceOptions.command_timeout,
        metavar="SECONDS",
        help=f"kill slower commands (default {SourceOptions.command_timeout:g})",
    )
    group.add_argument(
        "--command-cache",
        metavar="DIR",
        help="keep what commands write, so that each runs once for all segments of a recording",
    )


def sources_of(options: argparse.Namespace) -> Manifest:
    """The manifest of all sources. Raises UserError for wrong options, DataError for corpora."""
    specs = specs_of(options)
    return read_sources(
        specs,
        SourceOptions(
            allow_commands=options.allow_commands,
            command_timeout=options.command_timeout,
            command_cache=options.command_cache,
            name=options.name,
        ),
    )


def specs_of(options: argparse.Namespace) -> list[str]:
    """All `KIND:PATH`; no corpus is looked at. Raises UserError for wrong options."""
    if options.manifest is None and not options.source:
        raise UserError("no corpus is given: say MANIFEST.jsonl or --source KIND:PATH")
    if options.name is not None and not options.name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"--name {options.name}: letters, digits, - and _ only")
    if options.command_timeout <= 0:
        raise UserError(f"--command-timeout {options.command_timeout:g}: must be above 0")
    specs = [*([f"jsonl:{options.manifest}"] if options.manifest else []), *options.source]
    for spec in specs:
        parse_spec(spec)
    return specs
