from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

import pytest
from http_files import serve
from runs import TINY, tiny_config

from speechllm.config.load import load_config
from speechllm.errors import DataError
from speechllm.prepare import open_split, prepare_text
from speechllm.training_data import epoch_plans, train_loader


def test_a_run_over_http_with_a_cache_is_the_run_on_local_shards(
    tmp_path: Path, shards: Path
) -> None:
    def first_steps(config) -> list[object]:
        text = prepare_text(config)
        split = open_split(config, config.data.train, text, key="data.train", budget=1024)
        loader = train_loader(config, split, text, epoch_plans(config, split), rank=0, world=1)
        with closing(loader.steps(0, 0)) as steps:
            microbatches = [m for _ in range(2) for m in next(steps).microbatches]
        return [(m.batch.keys, m.batch.audio_AN.tolist(), m.bad) for m in microbatches]

    options = ["data.num_workers=1", "data.microbatch_tokens=300"]
    local = first_steps(tiny_config(tmp_path, shards, *options))
    names = sorted(path.name for path in shards.glob("*.tar"))
    with serve(shards) as server:
        urls = ",".join(f"{server.url}/{name}" for name in names)
        cache = tmp_path / "cache"
        options += [f"data.cache_dir={cache}", "data.cache_size=0.1", f"data.train=[{urls}]"]
        remote = first_steps(tiny_config(tmp_path, shards, *options))
        assert remote == local
        asked = len(server.requests)
        again = first_steps(tiny_config(tmp_path, shards, *options))
        assert again == local
        ranges = {wanted for _, wanted in server.requests[asked:]}
    assert ranges == {"bytes=0-0"}  # whether they are what they were


def test_nothing_left_names_the_key_and_the_reasons(tmp_path: Path, shards: Path) -> None:
    config = tiny_config(tmp_path, shards, "data.min_seconds=50")
    with pytest.raises(DataError, match=r"data.train: none of the 48 .*'too_short': 48"):
        open_split(config, config.data.train, prepare_text(config), key="data.train", budget=99)


def test_hours_and_costs_of_a_split(tmp_path: Path, shards: Path) -> None:
    config = tiny_config(tmp_path, shards)
    split = open_split(config, config.data.train, prepare_text(config), key="k", budget=1024)
    assert split.hours == pytest.approx(split.corpus.durations.sum() / 3600)
    assert split.costs.dtype == np.int32
    assert split.table.bounds[-1] == len(split.selection.kept) == 48


def test_the_runs_prefix_is_shared_by_all_data_sets(tmp_path: Path, shards: Path) -> None:
    plain = tiny_config(tmp_path, shards, 'model.prompt.texts=["Write: {audio}"]')
    text = prepare_text(plain)
    assert text.prefix == text.prompter.pieces("Write: {audio}")[0]
    other = 'data.mixture.a.prompt.texts=["Writing what they say: {audio}"]'
    mixed = load_config(
        TINY, ['model.prompt.texts=["Write: {audio}"]', f"data.mixture.a.shards={shards}", other]
    )
    text = prepare_text(mixed)
    assert text.tokenizer.decode(text.prefix) == "<|im_start|>user\nWrit"
