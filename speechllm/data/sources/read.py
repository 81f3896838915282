"""`--source` texts -> one manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from speechllm.data.manifest import Manifest, ManifestBuilder
from speechllm.data.sources.commonvoice import open_common_voice
from speechllm.data.sources.hf import open_hf
from speechllm.data.sources.kaldi import open_kaldi
from speechllm.data.sources.lhotse import open_lhotse
from speechllm.data.sources.librispeech import open_librispeech
from speechllm.data.sources.spec import SourceOptions, Spec, parse_spec
from speechllm.data.sources.table import open_table
from speechllm.data.sources.tars import open_tars
from speechllm.data.sources.transcribed import open_transcribed
from speechllm.data.sources.utterance import Access, Source
from speechllm.errors import DataError


def read_sources(specs: Sequence[str], options: SourceOptions) -> Manifest:
    """All utterances of `KIND:PATH[,key=value...]` texts, in their order.

    All kinds take limit=N (at most so many), prefix=TEXT (before every id) and set.NAME=VALUE (a
    field of every utterance). Raises DataError naming file, line and remedy for whatever is wrong,
    also for an id that two utterances have.
    """
    builder = ManifestBuilder()
    names = []
    for text in specs:
        spec = parse_spec(text)
        source = open_source(spec, options)
        names.append(source.name)
        prefix, constants = spec.get("prefix", ""), spec.constants()
        builder.begin(source.label, source.root)
        for number, utterance in islice(source.utterances, spec.limit):
            # A column `text` beside the one that text= names would take its place in the shard.
            unwanted = "text" in utterance.fields
            if prefix or constants or unwanted:
                fields = {k: v for k, v in utterance.fields.items() if k != "text"} | constants
                utterance = replace(utterance, id=f"{prefix}{utterance.id}", fields=fields)
            builder.add(number, utterance)
    if not names:
        raise DataError("no source is given; say e.g. --source kaldi:data/train")
    name = options.name or (names[0] if len(names) == 1 else f"{names[0]}+{len(names) - 1}")
    return builder.finish(name, Access((), options.command_timeout, options.command_cache))


def open_source(spec: Spec, options: SourceOptions) -> Source:
    """Raises DataError for options that the kind does not know, and for a corpus that is not there;
    what is wrong in its lines is told while they are read."""
    match spec.kind:
        case "jsonl" | "csv" | "tsv":
            return open_table(spec)
        case "kaldi":
            return open_kaldi(spec, options)
        case "librispeech":
            return open_librispeech(spec)
        case "commonvoice":
            return open_common_voice(spec)
        case "hf":
            return open_hf(spec)
        case "lhotse":
            return open_lhotse(spec, options)
        case "tar":
            return open_tars(spec)
        case "stm" | "tdf" | "fisher":
            return open_transcribed(spec, options)
    raise AssertionError(spec.kind)
