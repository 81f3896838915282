"""Prints the configuration reference, or keeps it up to date in a Markdown document.

python tools/config_reference.py                                # print the tables
python tools/config_reference.py --write docs/configuration.md  # renew them between the markers
python tools/config_reference.py --check docs/configuration.md  # exit 1 if they are out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speechllm.config.reference import config_reference, splice_reference


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="FILE")
    action.add_argument("--check", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    file = options.write or options.check
    if file is None:
        print(config_reference(), end="")
        return 0
    try:
        old = file.read_text(encoding="utf-8")
        new = splice_reference(old)
    except (OSError, ValueError) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 2
    if options.write:
        file.write_text(new, encoding="utf-8")
        return 0
    if old != new:
        print(
            f"{file} is out of date: run python tools/config_reference.py --write {file}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
