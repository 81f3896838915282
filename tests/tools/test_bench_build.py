from __future__ import annotations

import json

import pytest
from bench_build import main, measure_build


def test_a_small_measurement() -> None:
    kinds = ("wav to flac", "flac as it is", "wav to opus")
    values = measure_build(utterances=2, seconds=(0.2, 0.3), rounds=1, kinds=kinds)
    assert tuple(json.loads(json.dumps(values))["kinds"]) == kinds
    for measured in values["kinds"].values():
        assert (measured["shards"], measured["utterances"]) == (1, 2)
        assert measured["limit_core_seconds"] > 0
        assert measured["build_core_seconds"] > 0
        assert measured["share_of_limit"] > 0


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(SystemExit):
        main(["--kinds", "mp3 to flac"])
