"""lhotse manifests, read without lhotse: cuts, or recordings and supervisions, as JSONL.

Format: https://lhotse.readthedocs.io, "Representing a corpus" and "Cuts"; the dictionaries are what
`MonoCut.to_dict`, `Recording.to_dict` and `SupervisionSegment.to_dict` of lhotse 1.x write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from speechllm.data.sources import values
from speechllm.data.sources.lhotse_audio import audio_of
from speechllm.data.sources.lines import KeyedLines, numbered_lines
from speechllm.data.sources.spec import SourceOptions, Spec, name_of
from speechllm.data.sources.utterance import Source, SourceUtterance
from speechllm.errors import DataError

# A span this near to the whole recording is the whole: lhotse rounds durations to 1e-8 s, and
# recordings to samples.
_WHOLE_SLACK_SECONDS = 0.001
_FIELDS = {"speaker": "speaker", "language": "lang", "gender": "gender"}


def open_lhotse(spec: Spec, options: SourceOptions) -> Source:
    """`lhotse:CUTS.jsonl.gz`, or `lhotse:RECORDINGS.jsonl.gz,supervisions=SUPERVISIONS.jsonl.gz`.

    Every supervision is an utterance: its own id (ids=cut takes that of the cut), text, span and
    channel; speaker, lang, gender and what is in `custom` become fields. root is what relative
    paths start at (default: the working directory, as in lhotse). Cuts of several recordings or
    channels, and recordings with transforms other than resampling, are refused by name. Raises
    DataError naming file and line, also while it is read.
    """
    spec.accept(("supervisions", "ids", "root"))
    root = spec.get("root") or os.getcwd()
    supervisions = spec.get("supervisions")
    if supervisions is None:
        utterances = _of_cuts(spec, options)
    else:
        utterances = _of_recordings(spec, supervisions, options)
    return Source(supervisions or spec.path, name_of(spec.path), root, utterances)


def _of_cuts(spec: Spec, options: SourceOptions) -> Iterator[tuple[int, SourceUtterance]]:
    by_cut = spec.choice("ids", "supervision", "cut") == "cut"
    number = None
    for number, line in numbered_lines(spec.path):
        where = f"{spec.path}:{number}"
        cut = _parsed(line, where)
        kind = cut.get("type", "MonoCut")
        if kind != "MonoCut":
            raise DataError(
                f"{where}: {cut.get('id')} is a {kind}; only MonoCut (one recording, one channel) "
                "can be read: trim or save it with lhotse first (e.g. CutSet.save_audios)"
            )
        if not isinstance(cut.get("recording"), dict):
            what = "is a recording" if "sources" in cut else "has no `recording`"
            raise DataError(
                f"{where}: {cut.get('id')} {what}; give cuts with recordings, or "
                "lhotse:RECORDINGS,supervisions=SUPERVISIONS"
            )
        supervisions = _objects(cut, "supervisions", where)
        for i, supervision in enumerate(supervisions):
            start = _number(cut, "start", where) + _number(supervision, "start", where)
            # A supervision that reaches out of its cut on the left keeps its own span.
            spans = (start, start + _number(supervision, "duration", where))
            name = supervision["id"] if "id" in supervision else cut.get("id")
            if by_cut:
                name = cut.get("id") if len(supervisions) == 1 else f"{cut.get('id')}-{i}"
            custom = {**_object(cut, "custom", where), **_object(supervision, "custom", where)}
            channel = supervision.get("channel", cut.get("channel"))
            yield (
                number,
                _utterance(
                    name, cut["recording"], supervision, spans, channel, custom, where, options
                ),
            )
    if number is None:
        raise DataError(f"{spec.path}: no lines")


def _of_recordings(
    spec: Spec, path: str, options: SourceOptions
) -> Iterator[tuple[int, SourceUtterance]]:
    if "ids" in spec.options:
        raise DataError(f"{spec.given}: ids is for cuts; supervisions have ids of their own")
    recordings = KeyedLines(spec.path, _id_of)
    number = None
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        supervision = _parsed(line, where)
        wanted = supervision.get("recording_id")
        found = recordings.get(str(wanted).encode())
        if found is None:
            raise DataError(f"{where}: recording {wanted!r} is not in {spec.path}")
        recording = _parsed(found[1], f"{spec.path}:{found[0]}")
        start = _number(supervision, "start", where)
        span = (start, start + _number(supervision, "duration", where))
        custom = _object(supervision, "custom", where)
        channel = supervision.get("channel")
        yield (
            number,
            _utterance(
                supervision.get("id"),
                recording,
                supervision,
                span,
                channel,
                custom,
                where,
                options,
            ),
        )
    if number is None:
        raise DataError(f"{path}: no lines")


def _utterance(
    name: Any,
    recording: dict[str, Any],
    supervision: dict[str, Any],
    span: tuple[float, float],
    channel: Any,
    custom: dict[str, Any],
    where: str,
    options: SourceOptions,
) -> SourceUtterance:
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: a supervision without an id")
    audio, chosen = audio_of(recording, channel, where, options)
    length = _number(recording, "duration", where)
    start, end = max(0.0, span[0]), span[1]
    whole = start <= _WHOLE_SLACK_SECONDS and abs(end - length) <= _WHOLE_SLACK_SECONDS
    text = supervision.get("text")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: `text` must be a string, not {json.dumps(text)[:40]}")
    fields = {
        ours: supervision[theirs]
        for theirs, ours in _FIELDS.items()
        if supervision.get(theirs) is not None
    }
    # Features and arrays that lhotse stores beside are dictionaries with a `storage_path`.
    fields |= {
        key: value
        for key, value in custom.items()
        if not (isinstance(value, dict) and ("storage_path" in value or "array" in value))
    }
    return SourceUtterance(
        id=name,
        audio=audio,
        text=text,
        start=None if whole else start,
        end=None if whole else end,
        channel=chosen,
        fields=fields,
        seconds=length,
    )


def _id_of(line: bytes, where: str) -> bytes:
    return str(_parsed(line, where).get("id")).encode()


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); lhotse manifests must be JSONL") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{where}: not a JSON object; lhotse manifests must be JSONL")
    return parsed


def _number(parsed: dict[str, Any], name: str, where: str) -> float:
    value = parsed.get(name)
    if not values.is_number(value):
        raise DataError(f"{where}: `{name}` of {parsed.get('id')} must be a number, not {value!r}")
    return float(value)


def _object(parsed: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """Empty where there is none."""
    value = parsed.get(name) or {}
    if not isinstance(value, dict):
        raise DataError(f"{where}: `{name}` of {parsed.get('id')} must be a JSON object")
    return value


def _objects(parsed: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    value = parsed.get(name) or []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"{where}: `{name}` of {parsed.get('id')} must be a list of JSON objects")
    return value
