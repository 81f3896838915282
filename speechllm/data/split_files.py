"""Which files a split has, and which it should have by its `dataset.json`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from speechllm.data import dataset_card, journal
from speechllm.data.checking import Finding
from speechllm.data.files import file_size, list_tars, local_path
from speechllm.errors import DataError, UserError


@dataclass(frozen=True)
class SplitFiles:
    """tars: that are there. sha256: what they should have, by tar, of those that are known."""

    pattern: str
    tars: list[str]
    sha256: dict[str, str] = field(default_factory=dict)
    has_card: bool = False
    findings: list[Finding] = field(default_factory=list)


def look_at_files(pattern: str) -> SplitFiles:
    """Compare what is there with `dataset.json`, where the pattern is a directory that has one.

    Raises UserError where there are neither shards nor a dataset.json.
    """
    tars = sorted(set(list_tars(pattern)))
    local = local_path(pattern)
    directory = pattern.rstrip("/")
    if local is not None:
        directory = os.path.abspath(os.path.expanduser(local))
    is_directory = os.path.isdir(directory) if local is not None else not pattern.endswith(".tar")
    card = dataset_card.read_card(directory) if is_directory else None
    if not tars and card is None:
        raise UserError(f"{pattern}: no *.tar there; name tars or a directory that holds them")
    files = SplitFiles(pattern, tars, has_card=card is not None)
    if card is not None:
        _against_card(files, directory, card)
    elif local is not None and is_directory:
        _unfinished(files, directory)
    if local is not None and is_directory:
        for name in sorted(os.listdir(directory)):
            if ".tar.tmp-" in name:
                detail = f"{name} is left over from a build that was killed, or one that is running"
                files.findings.append(Finding("leftover", directory, None, detail))
    return files


def _against_card(files: SplitFiles, directory: str, card: list[dataset_card.ShardCard]) -> None:
    by_name = {tar.rsplit("/", 1)[-1]: tar for tar in files.tars}
    for shard in card:
        tar = by_name.pop(shard.file, None)
        if tar is None:
            detail = f"{shard.file} is in dataset.json and is not there; make or copy it again"
            files.findings.append(Finding("missing shard", directory, None, detail))
            continue
        size = file_size(tar)
        if size is not None and size != shard.bytes:
            detail = f"{size:,} bytes where dataset.json says {shard.bytes:,}; copy it again"
            files.findings.append(Finding("checksum", tar, None, detail))
        else:
            files.sha256[tar] = shard.sha256
    for tar in by_name.values():
        detail = "dataset.json does not tell of it; it is of another build"
        files.findings.append(Finding("foreign shard", tar, None, detail))


def _unfinished(files: SplitFiles, directory: str) -> None:
    """Shards of our own making without a dataset.json: the build has not come to its end."""
    try:
        found = journal.read_journal(directory)
    except DataError as error:
        files.findings.append(Finding("unfinished", directory, None, str(error)))
        return
    if found is None:
        return
    plan, reports = found
    detail = (
        f"{len(reports)} of {len(plan.cuts) - 1} shards are made and there is no dataset.json; run "
        "make_shards again (with --check-complete after tasks)"
    )
    files.findings.append(Finding("unfinished", directory, None, detail))
