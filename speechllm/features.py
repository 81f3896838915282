"""Which encoder outputs a configuration can read from disk in place of running the encoder."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechllm.config.schema import Config
from speechllm.data.cache import BlockCache
from speechllm.data.features import Dtype, FeatureStore, content_hash, feature_path, open_features
from speechllm.data.files import local_path
from speechllm.data.index import open_index
from speechllm.errors import ConfigError, DataError, ModelError
from speechllm.log import logger
from speechllm.model.frontend import FRAME_SAMPLES, MEL_HOP, WINDOW
from speechllm.model.hub import hash_weights, resolve
from speechllm.prepare import Split
from speechllm.types import SAMPLE_RATE

_KEY_LENGTH = 12
_SHOWN = 40  # characters of a value that is another
_THREADS = 16
# What a Whisper's frames follow from besides its weights, by the names of its config.json.
_ARCHITECTURE = (
    "activation_function", "d_model", "encoder_attention_heads", "encoder_layers",
    "max_source_positions", "num_mel_bins", "scale_embedding",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """key: of everything that the frames follow from but the audio, which `facts` say."""

    key: str
    dtype: Dtype
    width: int
    facts: dict[str, Any]

    def path(self, tar: str) -> str:
        return feature_path(tar, self.key, self.dtype)


def kind_of(config: Config, dtype: Dtype) -> Kind:
    """What the configured encoder's outputs are called on disk. Loads no weights.

    Raises ConfigError where its outputs change while it trains, ModelError where it is not there.
    """
    assert config.precision != "auto", "precision is settled first"
    encoder = config.model.encoder
    if encoder.kind != "whisper" or config.model.unfreeze_encoder_layers:
        raise ConfigError(
            "only outputs of a frozen encoder can be kept: set model.encoder.kind=whisper and "
            "model.unfreeze_encoder_layers=0"
        )
    directory = resolve(encoder.id, encoder.revision)
    about = _architecture(encoder.id, directory)
    fp32 = config.precision == "fp32" or config.model.frozen_dtype == "fp32"
    facts = {
        "weights": hash_weights(directory),
        "architecture": about,
        "model.encoder.context": encoder.context,
        "precision": config.precision,
        "frozen weights": "fp32" if fp32 else "bf16",
        "front end": [SAMPLE_RATE, FRAME_SAMPLES, MEL_HOP, WINDOW],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Kind(digest[:_KEY_LENGTH], dtype, int(about["d_model"]), facts)


def _architecture(id: str, directory: Path) -> dict[str, Any]:
    try:
        about = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{directory}/config.json: is no JSON ({error}); get it again") from error
    if about.get("model_type") != "whisper":
        raise ModelError(f"{id} is a {about.get('model_type')} model, not a Whisper")
    return {name: about.get(name) for name in _ARCHITECTURE}


def read_features(config: Config, split: Split, key: str) -> Split:
    """The split as `performance.encoder_cache` wants it read: with encoder outputs, or unchanged.

    key: of the configuration, for messages. Raises ConfigError, with the command that helps, where
    any shard's are missing, stale or of other settings.
    """
    dtype = config.performance.encoder_cache
    if dtype == "off" or isinstance(split.store, FeatureStore):
        return split
    corpus, kind = split.corpus, kind_of(config, dtype)

    def attempt(tar: str) -> str | None:
        return why_not(tar, kind, corpus.cache)

    with ThreadPoolExecutor(min(_THREADS, len(corpus.shards))) as pool:
        reasons = [reason for reason in pool.map(attempt, corpus.shards) if reason is not None]
    if reasons:
        raise ConfigError(
            f"performance.encoder_cache={dtype}: {len(reasons)} of {len(corpus.shards)} shards of "
            f"{key} have no encoder outputs to be read. {reasons[0]}. Write what is missing with: "
            f"python tools/cache_features.py CONFIG --dtype {dtype} (with this run's "
            "configuration), or set performance.encoder_cache=off"
        )
    logger.info("%s: the encoder's outputs are read from *.features-%s-%s.bin",
                key, kind.key, dtype)  # fmt: skip
    return replace(split, store=FeatureStore(corpus, kind.key, dtype))


def why_not(tar: str, kind: Kind, cache: BlockCache | None = None) -> str | None:
    """Why a shard's encoder outputs cannot be read; None where they can."""
    path = kind.path(tar)
    try:
        file = open_features(path, cache)
        index = open_index(tar, cache, verify_headers=False)
    except FileNotFoundError:
        return f"{path} is not there{_others(tar, kind)}"
    except DataError as error:
        return str(error)
    if file.about["index"] != content_hash(index) or file.rows.num_rows != index.rows.num_rows:
        return f"{path} is stale: it was written for other audio than {tar} has now"
    return None


def _others(tar: str, kind: Kind) -> str:
    """What there is in its place, and in what that is another."""
    local = local_path(tar)
    if local is None:
        return ""
    for path in other_files(local, [kind.path(local)]):
        try:
            facts = open_features(path).about["made with"]
        except (OSError, DataError):
            continue
        if facts == kind.facts:
            return f", but {path} is"
        named = [
            f"{name} {str(facts.get(name))[:_SHOWN]}, now {str(kind.facts[name])[:_SHOWN]}"
            for name in kind.facts
            if facts.get(name) != kind.facts[name]
        ]
        return f"; {path} is of other settings: {'; '.join(named)}"
    return ""


def other_files(tar: str, paths: Sequence[str]) -> list[str]:
    """Feature files beside a local shard that are none of `paths`."""
    found = glob.glob(f"{glob.escape(tar.removesuffix('.tar'))}.features-*.bin")
    return sorted(set(found) - set(paths))
