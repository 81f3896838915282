import itertools
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

import pytest
from http_files import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_corpus import (
    COSTS,
    MemoryStore,
    audio_tokens,
    build_prompter,
    facts,
    plan_of,
    processes,
    take,
    train_loader,
)
from speech_files import write_shards

from speechllm.data import cache
from speechllm.data.index import open_corpus
from speechllm.data.loader import read_batches
from speechllm.data.plan import EpochPlan, PlanSettings, plan_epoch
from speechllm.data.prompt import Prompter
from speechllm.data.store import Store
from speechllm.errors import ConfigError, DataError
from speechllm.types import IGNORE, Microbatch, StepData, Utterance


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return build_prompter(tmp_path_factory.mktemp("llm") / "tiny")


def keys(data: StepData) -> list[list[str]]:
    return [m.batch.keys for m in data.microbatches]


def test_steps_are_those_of_the_plan_epoch_after_epoch(prompter: Prompter) -> None:
    epochs = [plan_of(e).num_steps for e in (0, 1)]
    steps = take(train_loader(prompter), sum(epochs) + 1)
    expected = [(e, k) for e in (0, 1) for k in range(epochs[e])] + [(2, 0)]
    assert [(data.epoch, data.step) for data in steps] == expected
    for data in steps:
        planned = plan_of(data.epoch).step(data.step)
        assert keys(data) == [[f"u{u}" for u in m] for m in planned]
        assert [m.index for m in data.microbatches] == list(range(len(planned)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_worker_processes_change_nothing(prompter: Prompter, num_workers: int) -> None:
    count = plan_of(0).num_steps + 3
    store = MemoryStore({3: "noise", 60: "cut"})
    alone = take(train_loader(prompter, store), count)
    before = processes()
    read_ahead = take(train_loader(prompter, store, num_workers=num_workers), count)
    assert processes() <= before
    assert [facts(data) for data in read_ahead] == [facts(data) for data in alone]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_at_any_step_equals_uninterrupted(prompter: Prompter, num_workers: int) -> None:
    plan = plan_of(0)
    whole = take(train_loader(prompter), plan.num_steps + 2)
    every = 1 if num_workers == 0 else 5  # starting processes takes its time
    for step in range(0, plan.num_steps + 1, every):
        loader = train_loader(prompter, num_workers=num_workers)
        resumed = take(loader, plan.num_steps + 2 - step, step=step)
        assert [facts(data) for data in resumed] == [facts(data) for data in whole[step:]]


def test_resuming_plans_and_reads_nothing_earlier(prompter: Prompter) -> None:
    planned, read = [], []

    class Watched(MemoryStore):
        def read(self, i: int) -> Utterance:
            read.append(i)
            return super().read(i)

    def watch(epoch: int) -> EpochPlan:
        planned.append(epoch)
        return plan_of(epoch)

    take(train_loader(prompter, Watched(), plan_of=watch), 1, epoch=7, step=2)
    assert planned == [7]
    assert sorted(read) == sorted(int(u) for m in plan_of(7).step(2) for u in m)


def test_remote_shards_are_fetched_ahead_of_the_workers(
    prompter: Prompter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BLOCK", 20_000)
    write_shards(tmp_path / "web", 60, num_shards=4, seconds=(0.2, 0.6))
    with serve(tmp_path / "web") as server:
        blocks = cache.BlockCache(str(tmp_path / "cache"), 1 << 30)
        url = f"{server.url}/train-{{000000..000003}}.tar"
        remote, local = open_corpus([url], blocks), open_corpus([str(server.directory)])

        def planned(epoch: int) -> EpochPlan:
            costs = 20 + np.arange(60) * 7 % 30
            return plan_epoch(
                local.shard_sizes, costs, np.arange(60), PlanSettings(1, 300, 2, 30), 0
            )

        usual = take(train_loader(prompter, Store(local), plan_of=planned), 5)
        server.latency = 0.01
        with closing(train_loader(prompter, Store(remote), plan_of=planned).steps(0, 0)) as steps:
            first = next(steps)
            for _ in range(1000):  # of the steps that nobody has asked for yet
                if sum(path.endswith(".tar") for path, _ in server.requests) >= 12:
                    break
                time.sleep(0.01)
            else:
                raise AssertionError(f"only {server.requests}")
            found = [first, *itertools.islice(steps, 4)]
    assert [facts(data) for data in found] == [facts(data) for data in usual]


def test_an_index_that_goes_away_costs_its_utterances_only(
    prompter: Prompter, tmp_path: Path
) -> None:
    write_shards(tmp_path, 8, num_shards=2, seconds=(0.2, 0.3))
    store = Store(open_corpus([str(tmp_path)]))
    (tmp_path / "train-000001.index.arrow").unlink()
    (microbatch,) = read_batches(
        store, prompter, audio_tokens, 0, [np.array([0, 5])], with_target=True, pad_left=False,
        num_workers=0, prefetch=1,
    )  # fmt: skip
    assert microbatch.batch.keys == ["utt-00000"]
    (bad,) = microbatch.bad
    assert (bad.key, Path(bad.shard).name) == ("utterance 5", "train-000001.tar")
    assert "has no index" in bad.reason


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_ranks_together_run_the_global_step(
    prompter: Prompter, per_step: int, world: int, step: int
) -> None:
    def planned(epoch: int) -> EpochPlan:
        return plan_of(epoch, per_step)

    step %= planned(0).num_steps
    ranks = [
        take(train_loader(prompter, plan_of=planned, rank=r, world=world), 2, step=step)
        for r in range(world)
    ]
    for at_once in zip(*ranks, strict=True):
        assert len({(data.epoch, data.step) for data in at_once}) == 1
        assert len({len(data.microbatches) for data in at_once}) == 1
        wanted = [[f"u{u}" for u in m] for m in planned(at_once[0].epoch).step(at_once[0].step)]
        run = {m.index: m.batch.keys for data in at_once for m in data.microbatches if m.weight}
        assert [run[m] for m in range(len(wanted))] == wanted
        counted = sum(m.weight for data in at_once for m in data.microbatches)
        assert counted == len(wanted)
        assert sum(m.utterances for data in at_once for m in data.microbatches) == sum(
            len(m) for m in wanted
        )


def test_a_short_rank_repeats_its_last_microbatch_and_reads_it_once(prompter: Prompter) -> None:
    microbatches = plan_of(0).step(0)
    bad = {int(u): "noise" for u in microbatches[3][:1]}
    for rank in (0, 1, 2):
        loader = train_loader(prompter, MemoryStore(bad), rank=rank, world=3)
        (data,) = take(loader, 1)
        assert [m.index for m in data.microbatches] == [[0, 3], [1, 4], [2, 2]][rank]
        assert [m.weight for m in data.microbatches] == [[1, 1], [1, 1], [1, 0]][rank]
    own, repeat = data.microbatches
    assert repeat.batch is own.batch
    assert (repeat.utterances, repeat.audio_seconds, repeat.bad) == (0, 0, ())


def test_a_rank_without_a_microbatch_repeats_anothers(prompter: Prompter) -> None:
    bad = {int(u): "noise" for m in plan_of(0).step(0) for u in m[:1]}
    loader = train_loader(prompter, MemoryStore(bad), rank=6, world=8)
    for data in take(loader, 2):
        (only,) = data.microbatches
        assert (only.weight, only.utterances, only.audio_seconds, only.bad) == (0, 0, 0, ())
        assert only.batch.num_target_tokens > 0


def test_the_prompt_follows_epoch_and_key(prompter: Prompter) -> None:
    count = plan_of(0).num_steps
    texts = {}
    for data in take(train_loader(prompter), 2 * count):
        for m in data.microbatches:
            for key, tokens in zip(m.batch.keys, m.batch.tokens_BS.tolist(), strict=True):
                texts[data.epoch, key] = tokens[0]
    assert len(set(texts.values())) == 3
    moved = [key for e, key in texts if e == 0 and texts[0, key] != texts[1, key]]
    assert 0.4 < len(moved) / len(COSTS) < 0.9


def test_only_target_and_end_are_labels_with_padding_the_same_token(prompter: Prompter) -> None:
    (data,) = take(train_loader(prompter), 1)
    for m in data.microbatches:
        labels = m.batch.labels_BS
        assert m.batch.num_target_tokens == (labels != IGNORE).sum()
        for key, row, tokens in zip(m.batch.keys, labels, m.batch.tokens_BS, strict=True):
            trained = row[row != IGNORE]
            assert trained[-1] == prompter.end_token_id
            assert bytes_of(trained[:-1]) == f"text {key[1:]}"
            assert torch.equal(tokens[row != IGNORE], trained)


def bytes_of(tokens: torch.Tensor) -> str:
    """The tiny tokenizer's printable bytes are one token each, in the order of their characters."""
    return "".join(" " if t == 220 else chr(int(t) + 33) for t in tokens)


def test_what_cannot_be_read_is_left_out_and_told(prompter: Prompter) -> None:
    (planned, *_) = plan_of(0).step(0)
    broken, wordless = int(planned[0]), int(planned[1])
    store = MemoryStore({broken: "not audio"}, silent=(wordless,))
    (data,) = take(train_loader(prompter, store), 1)
    microbatch = data.microbatches[0]
    assert microbatch.batch.keys == [f"u{u}" for u in planned[2:]]
    assert microbatch.utterances == len(planned) - 2
    assert microbatch.weight == 1
    assert microbatch.audio_seconds == pytest.approx(sum(160 + u for u in planned[2:]) / 16_000)
    assert [(b.key, b.shard, b.reason) for b in microbatch.bad] == [
        (f"u{broken}", f"shard{broken % 3}.tar", "not audio"),
        (f"u{wordless}", f"shard{wordless % 3}.tar", "the text is empty"),
    ]
    assert [r.number for r in microbatch.references] == planned[2:].tolist()


def test_a_microbatch_of_which_nothing_can_be_read_is_silence_of_no_weight(
    prompter: Prompter,
) -> None:
    planned = plan_of(0).step(0)[1].tolist()
    store = MemoryStore(dict.fromkeys(planned, "not audio"))
    (data,) = take(train_loader(prompter, store), 1)
    silent = data.microbatches[1]
    assert (silent.weight, silent.utterances, silent.audio_seconds) == (0, 0, 0)
    assert silent.references == ()
    assert len(silent.bad) == len(planned)
    assert silent.batch.audio_AN.shape == (1, 1600)
    assert not silent.batch.audio_AN.any()
    assert silent.batch.num_target_tokens == 1
    assert [m.weight for m in data.microbatches] == [1, 0, 1, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_are_not_hidden(prompter: Prompter, num_workers: int) -> None:
    class Broken(MemoryStore):
        def read(self, i: int) -> Utterance:
            raise ConfigError("wrong setting")

    with pytest.raises(ConfigError, match="wrong setting"):
        take(train_loader(prompter, Broken(), num_workers=num_workers), 1)


def test_an_epoch_without_utterances_and_a_cursor_beyond_the_end_are_refused(
    prompter: Prompter,
) -> None:
    nothing = np.empty(0, dtype=np.int64)
    empty = plan_epoch(nothing, nothing, nothing, PlanSettings(1, 10, 1, 10), 0)
    with pytest.raises(DataError, match="no utterance is left"):
        take(train_loader(prompter, plan_of=lambda epoch: empty), 1)
    with pytest.raises(DataError, match="not those that the run started with"):
        take(train_loader(prompter), 1, step=plan_of(0).num_steps + 1)


def read(prompter: Prompter, store: MemoryStore | None = None, **changes) -> list[Microbatch]:
    arguments = {"with_target": False, "pad_left": True, "num_workers": 0, "prefetch": 2}
    cut = [np.array(m) for m in ([7, 3], [40, 2, 9], [11])]
    return list(
        read_batches(store or MemoryStore(), prompter, audio_tokens, 0, cut, **arguments | changes)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_read_batches_once_in_the_given_order(prompter: Prompter, num_workers: int) -> None:
    before = processes()
    microbatches = read(prompter, num_workers=num_workers)
    assert processes() <= before
    assert [m.batch.keys for m in microbatches] == [["u7", "u3"], ["u40", "u2", "u9"], ["u11"]]
    assert [m.index for m in microbatches] == [0, 1, 2]
    references = [(r.number, r.id, r.text, r.duration) for r in microbatches[0].references]
    assert references == [(7, "u7", "text 7", 167 / 16_000), (3, "u3", "text 3", 163 / 16_000)]


def test_no_more_processes_than_microbatches(prompter: Prompter) -> None:
    before = processes()
    batches = read_batches(
        MemoryStore(),
        prompter,
        audio_tokens,
        0,
        [np.array([5])],
        with_target=True,
        pad_left=False,
        num_workers=2,
        prefetch=2,
    )
    assert next(batches).batch.keys == ["u5"]
    assert len(processes() - before) == 1
    batches.close()
    assert processes() <= before


def test_read_batches_with_and_without_targets(prompter: Prompter) -> None:
    (first, *_) = read(prompter)
    assert first.batch.num_target_tokens == 0
    assert first.batch.attention_mask_BS[:, -1].all()
    wordless = MemoryStore(silent=(7,))
    assert read(prompter, wordless)[0].batch.keys == ["u7", "u3"]
    (first, *_) = read(prompter, wordless, with_target=True, pad_left=False)
    assert first.batch.keys == ["u3"]
    assert first.batch.num_target_tokens == len("text 3") + 1


def test_an_id_in_the_metadata_names_the_reference(prompter: Prompter) -> None:
    class Named(MemoryStore):
        def read(self, i: int) -> Utterance:
            return Utterance(f"u{i}", np.ones(200, dtype=np.int16), "x", {"id": i * 10})

    assert [r.id for r in read(prompter, Named())[0].references] == ["70", "30"]


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_id_in_the_metadata_is_none(prompter: Prompter, empty: str | None) -> None:
    class Unnamed(MemoryStore):
        def read(self, i: int) -> Utterance:
            return Utterance(f"u{i}", np.ones(200, dtype=np.int16), "x", {"id": empty})

    assert [r.id for r in read(prompter, Unnamed())[0].references] == ["u7", "u3"]


def test_the_models_random_state_is_left_alone(prompter: Prompter) -> None:
    before = torch.get_rng_state()
    take(train_loader(prompter, num_workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)
