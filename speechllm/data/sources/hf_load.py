"""Datasets by name, through the package `datasets`: its cached Arrow files, or a spool of ours."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from speechllm.data.files import write_atomically
from speechllm.data.reference import open_table
from speechllm.data.sources.spec import Spec
from speechllm.errors import DataError

_MARKER = "spool.json"
_ROWS = 100
_PART_BYTES = 1 << 29


def cached_files(spec: Spec) -> list[str]:
    """The Arrow files in the cache of `datasets`, downloaded where they are not there yet.

    Raises DataError where `datasets` is missing, where it finds no such dataset, and where a split
    must be chosen.
    """
    loaded = _load(spec, streaming=False)
    files = [one["filename"] for one in loaded.cache_files]
    # A part of a split (train[:10%]) is whole files with a range of rows.
    if not files or sum(open_table(file).num_rows for file in files) != loaded.num_rows:
        raise DataError(
            f"{spec.given}: is not whole Arrow files; choose a whole split (and limit=N), or save "
            "it with Dataset.save_to_disk and give that folder"
        )
    return files


def spooled_files(spec: Spec) -> list[str]:
    """The Arrow files in `spool=DIR`, which are written from a stream where they are not there.

    Raises DataError as `cached_files` does, for a missing option, and where DIR is of another
    dataset.
    """
    directory = spec.get("spool")
    if directory is None:
        raise DataError(
            f"{spec.given}: streaming=true needs spool=DIR, a local directory for the rows: shards "
            "are made in shuffled order, which a stream cannot serve"
        )
    directory = os.path.abspath(os.path.expanduser(directory))
    wanted = {key: spec.get(key) for key in ("config", "split", "revision", "limit")}
    wanted["dataset"] = spec.path
    if not os.path.exists(directory):
        rows = _load(spec, streaming=True)
        features = _undecoded(rows)
        schema = None if features.features is None else features.features.arrow_schema
        spool(islice(features, spec.limit), schema, directory, wanted)
    return _spooled(spec, directory, wanted)


def spool(
    rows: Iterable[dict[str, Any]], schema: Any, directory: str, origin: dict[str, Any]
) -> None:
    """Write rows into Arrow files in a new directory, which appears whole or not at all.

    schema: a pyarrow.Schema, or None to take that of the first rows. Several processes may do this
    at once: the first that is ready wins.
    """
    aside = f"{directory.rstrip('/')}.tmp-{os.uname().nodename}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)  # of a killed process that had the same number
    try:
        os.makedirs(aside)
        parts = _write_parts(iter(rows), schema, aside)
        marker = json.dumps({"origin": origin, "parts": parts}) + "\n"
        write_atomically(os.path.join(aside, _MARKER), marker.encode())
        os.rename(aside, directory)
    except OSError as error:
        if not os.path.exists(os.path.join(directory, _MARKER)):
            raise DataError(f"{directory}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_parts(rows: Iterator[dict[str, Any]], schema: Any, directory: str) -> list[str]:
    parts: list[str] = []
    chunk = list(islice(rows, _ROWS))
    while chunk:
        parts.append(f"part-{len(parts):05d}.arrow")
        schema = pa.Table.from_pylist(chunk).schema if schema is None else schema
        with (
            open(os.path.join(directory, parts[-1]), "wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):
            size = 0
            while chunk and size < _PART_BYTES:
                table = pa.Table.from_pylist(chunk, schema=schema)
                writer.write_table(table)
                size += table.nbytes
                chunk = list(islice(rows, _ROWS))
    return parts


def _spooled(spec: Spec, directory: str, wanted: dict[str, Any]) -> list[str]:
    try:
        with open(os.path.join(directory, _MARKER), encoding="utf-8") as file:
            marker = json.load(file)
        found, parts = marker["origin"], marker["parts"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{directory}: no spool of a dataset ({error}); give spool= a directory that is not "
            "there yet"
        ) from error
    if found != wanted:
        raise DataError(
            f"{directory}: holds the spool of {found}, not of {wanted}; give another spool="
        )
    if not parts:
        raise DataError(f"{spec.given}: the stream had no rows; remove {directory}")
    return [os.path.join(directory, part) for part in parts]


def _load(spec: Spec, *, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{spec.given}: no folder of save_to_disk, and the package `datasets`, which could "
            'load it by name, is missing: pip install "speechllm[datasets]"'
        ) from error
    try:
        loaded = datasets.load_dataset(
            spec.path,
            spec.get("config"),
            split=spec.get("split"),
            revision=spec.get("revision"),
            streaming=streaming,
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{spec.given}: datasets cannot load it: {error}") from error
    if isinstance(loaded, dict):
        splits = list(loaded)
        raise DataError(
            f"{spec.given}: no split is chosen; it has {', '.join(splits)}: add e.g. "
            f"split={splits[0]}"
        )
    return loaded


def _undecoded(rows: Any) -> Any:
    """The same stream with audio as bytes or paths."""
    import datasets

    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Audio):
            rows = rows.cast_column(name, datasets.Audio(decode=False))
    return rows
