"""Word, character and sentence error rates of predictions, as numbers, a table or JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jiwer

from speechllm.errors import UserError
from speechllm.text import normalizer as normalizer_named

Predictions = dict[str, tuple[list[str], list[str]]]  # split -> (references, hypotheses)
COUNTS = ("hits", "substitutions", "deletions", "insertions", "words", "utterances")


def score(
    refs: Sequence[str], hyps: Sequence[str], normalizer: str = "whisper_en"
) -> dict[str, float]:
    """Corpus-level error rates: errors of all utterances over words of all references.

    wer, cer: (S + D + I) / (reference words, reference characters), fractions; spaces between words
    count as characters. ser: part of the utterances with any word error. Words of an utterance
    whose reference is empty (after normalisation) are insertions; where all references are empty
    the denominator is taken as 1, so that the rate is a number and shows them.
    substitutions, deletions, insertions, hits, words (of the references), utterances: counts.

    Raises:
        UserError: the lists are of different lengths, or there is no such normalizer.
    """
    refs, hyps = _normalised(refs, hyps, normalizer)
    if not refs:
        return {"wer": 0.0, "cer": 0.0, "ser": 0.0} | dict.fromkeys(COUNTS, 0)
    words = jiwer.process_words(refs, hyps)
    characters = jiwer.process_characters(refs, hyps)
    wrong = sum(ref.split() != hyp.split() for ref, hyp in zip(refs, hyps, strict=True))
    return {
        "wer": _rate(words),
        "cer": _rate(characters),
        "ser": wrong / len(refs),
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "hits": words.hits,
        "words": words.hits + words.substitutions + words.deletions,
        "utterances": len(refs),
    }


def _rate(out: jiwer.WordOutput | jiwer.CharacterOutput) -> float:
    errors = out.substitutions + out.deletions + out.insertions
    return errors / max(1, out.hits + out.substitutions + out.deletions)


def _normalised(
    refs: Sequence[str], hyps: Sequence[str], normalizer: str
) -> tuple[list[str], list[str]]:
    if len(refs) != len(hyps):
        raise UserError(f"{len(refs)} references but {len(hyps)} hypotheses; they must pair up")
    clean = normalizer_named(normalizer)
    return [clean(ref) for ref in refs], [clean(hyp) for hyp in hyps]


def frequent_errors(
    refs: Sequence[str], hyps: Sequence[str], normalizer: str = "whisper_en", limit: int = 10
) -> list[tuple[int, str, str]]:
    """The `limit` most frequent (count, said, recognised); "" for nothing, ties in word order."""
    refs, hyps = _normalised(refs, hyps, normalizer)
    counts: Counter[tuple[str, str]] = Counter()
    out = jiwer.process_words(refs, hyps) if refs else None
    for said, heard, chunks in (
        zip(out.references, out.hypotheses, out.alignments, strict=True) if out else ()
    ):
        for chunk in chunks:
            spoken = said[chunk.ref_start_idx : chunk.ref_end_idx]
            found = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
            match chunk.type:
                case "substitute":
                    counts.update(zip(spoken, found, strict=True))
                case "delete":
                    counts.update((word, "") for word in spoken)
                case "insert":
                    counts.update(("", word) for word in found)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(count, said, heard) for (said, heard), count in ranked[:limit]]


def read_predictions(path: str) -> Predictions:
    """References and hypotheses by split.

    path: a `.jsonl` of {"id", "ref", "hyp"} lines (the split is the file's stem); a JSON file
    {"SPLIT": {"labels": [...], "predictions": [...]}}, as every run writes in
    test_predictions.json; or a run directory, whose predictions/*.jsonl are taken, else its
    test_predictions.json.

    Raises:
        UserError: nothing there, or the content is of another form; names file and line.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        # The other .jsonl files of a run directory are its metrics and evaluations.
        is_run = (file / "config.yaml").is_file()
        for folder in (file / "predictions", *(() if is_run else (file,))):
            # Hidden ones are slices of splits, and what an interrupted decoding has so far.
            if lines := sorted(folder.glob("[!.]*.jsonl")):
                return {each.stem: _read_lines(each) for each in lines}
        if not (file / "test_predictions.json").is_file():
            raise UserError(
                f"{path}: no predictions/*.jsonl and no test_predictions.json in this directory; "
                "write them with `generate`"
            )
        return _read_splits(file / "test_predictions.json")
    if not file.is_file():
        raise UserError(f"{path}: no such file or directory")
    return {file.stem: _read_lines(file)} if file.suffix == ".jsonl" else _read_splits(file)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text: {error}") from None


def _read_lines(file: Path) -> tuple[list[str], list[str]]:
    refs, hyps = [], []
    seen: dict[str, int] = {}
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: not a line of JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise UserError(f'{file}:{number}: expected {{"id", "ref", "hyp"}}, got {line.strip()}')
        for key in ("ref", "hyp"):
            if not isinstance(row.get(key), str):
                raise UserError(f"{file}:{number}: {key!r} must be text, got {row.get(key)!r}")
        if "id" in row and seen.setdefault(str(row["id"]), number) != number:
            first = seen[str(row["id"])]
            raise UserError(f"{file}:{number}: id {row['id']!r} stands in line {first} already")
        refs.append(row["ref"])
        hyps.append(row["hyp"])
    if not refs:
        raise UserError(f"{file}: no predictions in it")
    return refs, hyps


def _read_splits(file: Path) -> Predictions:
    try:
        content = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f'{file}: expected {{"SPLIT": {{"labels": [...], "predictions": [...]}}}}')
    return {split: _read_split(f"{file}: split {split!r}", it) for split, it in content.items()}


def _read_split(where: str, split: Any) -> tuple[list[str], list[str]]:
    columns: list[list[str]] = []
    for key in ("labels", "predictions"):
        column = split.get(key) if isinstance(split, dict) else None
        if not isinstance(column, list) or not all(isinstance(text, str) for text in column):
            raise UserError(f"{where}: {key!r} must be a list of texts")
        columns.append(column)
    refs, hyps = columns
    if len(refs) != len(hyps):
        raise UserError(f"{where}: {len(refs)} labels but {len(hyps)} predictions")
    return refs, hyps


def wer_command(
    paths: Sequence[str], normalizer: str = "whisper_en", as_json: bool = False, errors: int = 0
) -> str:
    """What `speechllm wer` prints: a table in percent, or JSON {file: {split: score(...)}}.

    errors: below the table, that many of the most frequent confusions of each split.

    Raises:
        UserError: see `read_predictions`.
    """
    predictions = {path: read_predictions(path) for path in paths}
    scores = {
        path: {split: score(*texts, normalizer=normalizer) for split, texts in splits.items()}
        for path, splits in predictions.items()
    }
    if as_json:
        return json.dumps(scores, indent=2)
    names = dict(zip(paths, experiment_names(paths), strict=True))
    text = "\n".join(_table(scores, names))
    for path, splits in predictions.items():
        for split, (refs, hyps) in splits.items() if errors else ():
            text += f"\n\n{names[path]} {split}: said -> recognised"
            for count, said, heard in frequent_errors(refs, hyps, normalizer, errors):
                text += f"\n{count:6d}  {said or '(nothing)'} -> {heard or '(nothing)'}"
    return text


def experiment_names(paths: Sequence[str]) -> list[str]:
    """The run directory's name for each file of predictions; the path itself where names clash."""
    names = []
    for path in paths:
        file = Path(path).expanduser()
        run = file.resolve() if file.is_dir() else file.parent
        names.append((run.parent.name if run.name == "predictions" else run.name) or path)
    return [n if names.count(n) == 1 else path for n, path in zip(names, paths, strict=True)]


def _table(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]], names: Mapping[str, str]
) -> Iterator[str]:
    rows = [["experiment", "split", "WER", "CER", "SER", "S", "D", "I", "words", "utts"]]
    for path, splits in scores.items():
        for split, s in splits.items():
            rates = [f"{100 * s[rate]:.2f}" for rate in ("wer", "cer", "ser")]
            counts = [str(s[c]) for c in ("substitutions", "deletions", "insertions")]
            rows.append(
                [names[path], split, *rates, *counts, str(s["words"]), str(s["utterances"])]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
