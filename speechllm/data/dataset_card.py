"""What stands beside the shards of a build and tells what they are.

`dataset.json`: what they were made from, how, by which versions, and every shard's hash.
`report.json`: totals, drops by reason and histograms. `report.html`: the same to look at.
`dropped.jsonl`: every utterance that was left out, and why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from speechllm.data.files import local_path, read_bytes, write_atomically
from speechllm.data.histograms import EDGES
from speechllm.data.journal import CARDS, ShardReport
from speechllm.data.packing import PackReport
from speechllm.data.report_page import report_page
from speechllm.errors import DataError

NAME = "dataset.json"
_FORMAT = 1


@dataclass(frozen=True)
class ShardCard:
    """One shard of `dataset.json`. file: its name, beside it."""

    file: str
    utterances: int
    seconds: float
    bytes: int
    sha256: str


def dataset_values(report: PackReport) -> dict[str, Any]:
    """What `dataset.json` holds."""
    return {
        "format": _FORMAT,
        "name": report.plan.name,
        "source_sha256": report.plan.manifest,
        "settings": report.plan.settings,
        "versions": _distinct([shard.versions for shard in report.shards]),
        "utterances": report.utterances,
        "hours": report.seconds / 3600,
        "bytes": report.bytes,
        "shards": [asdict(_shard_card(shard)) for shard in report.shards],
    }


def report_values(report: PackReport) -> dict[str, Any]:
    """What `report.json` holds."""
    return {
        "name": report.plan.name,
        "manifest": {"name": report.plan.name, "sha256": report.plan.manifest},
        "settings": report.plan.settings,
        "shards": len(report.shards),
        "utterances": report.utterances,
        "hours": report.seconds / 3600,
        "bytes": report.bytes,
        "kept": report.kept,
        "encoded": report.encoded,
        "sample_rates": report.sample_rates,
        "dropped": report.drops_by_reason(),
        "histograms": {
            name: {"edges": EDGES[name], "counts": counts}
            for name, counts in report.histograms().items()
        },
    }


def write_cards(directory: str, report: PackReport) -> None:
    """Write all of them, each whole or not at all, `dataset.json` last.

    Nothing in them tells of time or place, so that the same build gives the same files.
    """
    values = report_values(report)
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in report.dropped]
    contents = {
        "dropped.jsonl": "".join(lines),
        "report.json": _json(values),
        "report.html": report_page(values),
        NAME: _json(dataset_values(report)),
    }
    assert set(contents) == set(CARDS)
    for name, text in contents.items():
        # A detail of a drop may quote a path that is not Unicode.
        write_atomically(os.path.join(directory, name), text.encode("utf-8", "backslashreplace"))


def read_card(directory: str) -> list[ShardCard] | None:
    """The shards that the `dataset.json` of a directory or url tells of; None where there is none.

    Raises DataError for one that cannot be read.
    """
    path = f"{directory.rstrip('/')}/{NAME}"
    try:
        values = json.loads(read_bytes(path))
        return [ShardCard(**one) for one in values["shards"]]
    except FileNotFoundError:
        return None
    except OSError as error:
        if local_path(path) is None:  # each server has its own way to say that there is none
            return None
        raise DataError(f"{path}: cannot be read ({error})") from error
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(f"{path}: not what make_shards writes ({error})") from error


def _shard_card(shard: ShardReport) -> ShardCard:
    return ShardCard(
        os.path.basename(shard.shard), shard.utterances, shard.seconds, shard.bytes, shard.sha256
    )


def _distinct(values: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Usually one; more where shards were made on hosts that are set up differently."""
    found: list[dict[str, str]] = []
    for one in values:
        if one not in found:
            found.append(dict(one))
    return found


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
