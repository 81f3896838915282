"""How many tokens the texts of a corpus have: read and tokenised once, before the first step.

What is estimated from the length of a text errs by two tokens (standard deviation, English commands
of 25 tokens). The longest row of a microbatch sets its columns, so that this alone pads a fortieth
of them, which counting takes away.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

import pyarrow as pa

from speechllm.data.files import file_stamp, local_path
from speechllm.data.index import Corpus
from speechllm.data.members import parse_metadata
from speechllm.data.prompt import Prompter
from speechllm.data.selection import TextTokens, estimated_tokens
from speechllm.data.shared import shared_arrays
from speechllm.data.store import SILENCE
from speechllm.errors import DataError
from speechllm.log import logger
from speechllm.types import Utterance

_VERSION = "1"
_SHARED = 20_000  # from so many utterances on one process of a node counts for all
_SHARDS_AT_ONCE = 32  # are read at a time, for the sake of network file systems
_WORTH_SAYING = 5.0  # seconds


def count_texts(
    corpus: Corpus, prompters: Sequence[Prompter], characters_per_token: float
) -> TextTokens:
    """Of all utterances of a corpus whose shards are local files.

    From 20,000 utterances on, one process of a node counts, for all of them and for later starts.

    Args:
        prompters: one, or one of each shard.
        characters_per_token: estimate for texts that cannot be read, which nobody trains on.
    """
    begun = time.perf_counter()
    count = partial(_count, corpus, prompters, characters_per_token)
    if len(corpus) < _SHARED:
        arrays = count()
    else:
        facts = [
            _VERSION,
            corpus.fingerprint,
            [file_stamp(tar) for tar in corpus.shards],
            [prompter.digest for prompter in prompters],
            characters_per_token,
        ]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        arrays = shared_arrays("texts", key, count)
    seconds = time.perf_counter() - begun
    if seconds > _WORTH_SAYING:
        logger.info("the tokens of %d texts were counted in %.0f s", len(corpus), seconds)
    return TextTokens(arrays["targets"], arrays["prompts"])


def _count(
    corpus: Corpus, prompters: Sequence[Prompter], characters_per_token: float
) -> dict[str, np.ndarray]:
    targets = estimated_tokens(corpus.text_lengths, characters_per_token).astype(np.int32)
    prompts = np.zeros(len(corpus), dtype=np.int32)
    columns = (corpus.column(name).chunks for name in ("meta_offset", "meta_size", "meta_ext"))
    tasks = list(zip(corpus.shards, *columns, strict=True))
    first = 0
    with ThreadPoolExecutor(min(_SHARDS_AT_ONCE, len(tasks))) as pool:
        for at in range(0, len(tasks), _SHARDS_AT_ONCE):
            group = pool.map(_read, *zip(*tasks[at : at + _SHARDS_AT_ONCE], strict=True))
            for shard, found in enumerate(group, at):
                prompter = prompters[shard] if len(prompters) > 1 else prompters[0]
                numbers = [first + row for row, _ in found]
                targets[numbers] = prompter.target_tokens([one.text for _, one in found])
                prompts[numbers] = [_own_prompt_tokens(prompter, one) for _, one in found]
                first += int(corpus.shard_sizes[shard])
    return {"targets": targets, "prompts": prompts}


def _own_prompt_tokens(prompter: Prompter, utterance: Utterance) -> int:
    try:
        return prompter.own_prompt_tokens(utterance)
    except DataError:
        return 0  # is not trained on; reading it says why


def _read(
    tar: str, offsets: pa.Array, sizes: pa.Array, extensions: pa.Array
) -> list[tuple[int, Utterance]]:
    """Row and utterance, without audio, of those of a shard whose metadata can be read."""
    path = local_path(tar)
    assert path is not None, "its bytes would have to be fetched"
    places = zip(offsets.to_pylist(), sizes.to_pylist(), extensions.to_pylist(), strict=True)
    found = []
    with open(path, "rb") as file:
        for row, (offset, size, extension) in enumerate(places):
            try:
                text, fields = parse_metadata(os.pread(file.fileno(), size, offset), extension)
            except DataError:
                continue
            found.append((row, Utterance("", SILENCE.samples, text, fields)))
    return found
