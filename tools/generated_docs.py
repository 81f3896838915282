"""Keeps up to date what is generated in the documents: the references and the planner's tables.

python tools/generated_docs.py            # renew it between its markers
python tools/generated_docs.py --check    # change nothing; exit 1 where it is out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import strategy_tables

from speechllm.cluster.reference import profile_reference
from speechllm.config.reference import config_reference

ROOT = Path(__file__).parent.parent
END = "<!-- generated: end -->"


class Part(NamedTuple):
    """Of a document. source: the file that it is made from, which the marker names."""

    document: str
    source: str
    make: Callable[[], str]


PARTS = (
    Part("docs/configuration.md", "speechllm/config/schema.py", config_reference),
    Part("docs/cluster.md", "speechllm/cluster/profile.py", profile_reference),
    Part("docs/strategies.md", "tools/strategy_tables.py", strategy_tables.tables),
)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    code = 0
    for part in PARTS:
        file = root / part.document
        old = file.read_text(encoding="utf-8")
        new = renewed(old, part)
        if options.check and new != old:
            print(f"{file} is out of date: run make docs", file=sys.stderr)
            code = 1
        elif new != old:
            file.write_text(new, encoding="utf-8")
    return code


def renewed(text: str, part: Part) -> str:
    """A document with what stands between its markers made anew."""
    marker = f"<!-- generated from {part.source}: begin -->"
    head, begin, rest = text.partition(marker)
    _, end, tail = rest.partition(END)
    assert begin, f"{part.document} needs {marker}"
    assert end, f"{part.document} needs {END} behind {marker}"
    return f"{head}{marker}\n\n{part.make().strip()}\n\n{END}{tail}"


if __name__ == "__main__":
    sys.exit(main())
