from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch

from safetensors.torch import load_file, save_file

import pytest
from forked_ranks import Ranks
from runs import (
    TINY,
    assert_same_run,
    metrics,
    start,
    stop_after,
    tiny_config,
    wait_for_steps,
)
from speech_files import write_shards

import speechllm.train
from speechllm.checkpoint import complete_checkpoints, find_checkpoint, read_checkpoint
from speechllm.config.load import load_config
from speechllm.errors import CheckpointError, ConfigError, DataError
from speechllm.train import DONE, STOPPED, train
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
SHORT_EPOCH = "data.microbatch_tokens=400"


def tiny(run_dir: Path, shards: Path, *overrides: str, workers: int = 0) -> int:
    return train(tiny_config(run_dir, shards, f"data.num_workers={workers}", *overrides), ALONE)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run_dir, prefer="last") / "trainable.safetensors")


def test_a_run_leaves_its_directory(tmp_path: Path, shards: Path) -> None:
    assert tiny(tmp_path, shards, "train.steps=4", "train.checkpoint_every=2") == DONE
    assert load_config(str(tmp_path / "config.yaml")).train.steps == 4
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    wanted = (
        "step epoch loss lr grad_norm target_tokens utterances audio_seconds step_seconds "
        "data_wait_seconds padding_fraction utterances_per_second audio_seconds_per_second"
    )
    first = json.loads((tmp_path / "metrics.jsonl").read_text().split("\n")[0])
    assert set(wanted.split()) <= first.keys()
    assert list((tmp_path / "tensorboard").iterdir())
    assert "step 4/4" in (tmp_path / "train.log").read_text()
    assert find_checkpoint(tmp_path).name == "step_00000004"


# The tiny model at seed 1 in fp32. A change here is a change of what is trained.
GOLDEN = [5.5766, 5.5136, 5.4952, 5.4952, 5.4851, 5.4941, 5.4831, 5.4937]


def test_golden_loss_curve(tmp_path: Path, shards: Path) -> None:
    tiny(tmp_path, shards, "train.steps=8", "optim.lr=3e-3")
    assert [line["loss"] for line in metrics(tmp_path)] == pytest.approx(GOLDEN, abs=1e-3)


def test_fp16_trains_close_to_fp32(tmp_path: Path, shards: Path) -> None:
    options = ("train.steps=4", "optim.lr=3e-3", "precision=fp16")
    assert tiny(tmp_path, shards, *options) == DONE
    assert [line["loss"] for line in metrics(tmp_path)] == pytest.approx(GOLDEN[:4], rel=1e-2)
    assert all(line["grad_norm"] < 100 for line in metrics(tmp_path)), "norms are unscaled"
    state = json.loads((find_checkpoint(tmp_path) / "state.json").read_text())
    assert state["loss_scale"] == 2.0**16


def test_a_start_by_ctc_goes_over_into_the_language_model(tmp_path: Path, shards: Path) -> None:
    settings = ("train.steps=12", "train.ctc_steps=8", "optim.lr=3e-3", "optim.warmup_steps=1")
    tiny(tmp_path, shards, *settings)
    found = metrics(tmp_path)
    assert [line["objective"] for line in found] == ["ctc"] * 8 + ["lm"] * 4
    # Of the same utterances: an epoch has two steps, in random order.
    first, last = (
        sum(line["loss"] * line["target_tokens"] for line in found[at : at + 2]) for at in (0, 6)
    )
    assert last < 0.75 * first
    assert found[0]["lr"] == found[8]["lr"] == 3e-3  # both warm up


def test_worker_processes_change_nothing(tmp_path: Path, shards: Path) -> None:
    for workers in (0, 2):
        tiny(tmp_path / str(workers), shards, "train.steps=5", workers=workers)
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_resume_equals_uninterrupted_across_epochs(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout on, stopped by a signal in the middle of a step, twice."""
    settings = ("train.steps=10", SHORT_EPOCH)
    tiny(tmp_path / "whole", shards, *settings)
    assert len({line["epoch"] for line in metrics(tmp_path / "whole")}) > 1
    real = speechllm.train.run_step
    for last_step in (3, 6):

        def interrupted(*args: Any, last_step: int = last_step, **kwargs: Any) -> Any:
            if kwargs["step"] == last_step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(speechllm.train, "run_step", interrupted)
        assert tiny(tmp_path / "cut", shards, *settings) == STOPPED
        assert find_checkpoint(tmp_path / "cut").name == f"step_{last_step:08d}"
    monkeypatch.undo()
    assert tiny(tmp_path / "cut", shards, *settings) == DONE
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_every_stop_signal_saves(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    real = speechllm.train.run_step

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 0:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(speechllm.train, "run_step", interrupted)
    before = signal.getsignal(number)
    assert tiny(tmp_path, shards) == STOPPED
    assert find_checkpoint(tmp_path).name == "step_00000001"
    assert signal.getsignal(number) == before


def test_killed_and_terminated_processes_resume_bit_for_bit(tmp_path: Path, shards: Path) -> None:
    """kill -9 at some moment, then SIGTERM to the real command line (exit code 99), then the rest;
    each with a worker process."""
    settings = ["train.steps=40", "train.checkpoint_every=4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["train", TINY, f"run_dir={cut}", f"data.train={shards}", *settings]
    killed = Ranks(tmp_path / "killed", command, launchers=((0,),))
    wait_for_steps(cut, 6, lambda: killed.said(0))
    os.kill(killed.process(0), signal.SIGKILL)
    assert killed.wait().codes == [-signal.SIGKILL]
    resumed_from = read_checkpoint(complete_checkpoints(cut)[-1]).progress.step
    assert resumed_from >= 4
    code, output = stop_after(start(command), cut, resumed_from + 8, signal.SIGTERM)
    assert code == 99, output
    assert f"resuming after step {resumed_from}" in output
    assert tiny(cut, shards, *settings, workers=1) == DONE
    assert tiny(whole, shards, *settings, workers=1) == DONE
    assert_same_run(whole, cut)


@pytest.mark.distributed
def test_one_process_and_several_train_the_same(tmp_path: Path, shards: Path) -> None:
    """20 steps: 1 rank with 4 microbatches a step, 2 with 2, 3 of which some repeat one."""
    settings = ["train.steps=20", "data.microbatches_per_step=4", "data.num_workers=0"]
    settings += [f"data.train={shards}", SHORT_EPOCH]
    tiny(tmp_path / "1", shards, *settings)
    for size in (2, 3):
        command = ["train", TINY, f"run_dir={tmp_path / str(size)}", *settings]
        ended = Ranks(tmp_path / f"ranks_{size}", command, launchers=(range(size),)).wait()
        assert ended.codes == [0] * size, ended.logs
    alone = metrics(tmp_path / "1")
    for size in (2, 3):
        found = metrics(tmp_path / str(size))
        for key in ("loss", "grad_norm"):
            assert [x[key] for x in found] == pytest.approx([x[key] for x in alone], rel=1e-5)
        for key in ("target_tokens", "utterances", "epoch", "lr"):
            assert [x[key] for x in found] == [x[key] for x in alone]
        for name, weight in weights(tmp_path / "1").items():
            torch.testing.assert_close(
                weights(tmp_path / str(size))[name], weight, atol=2e-4, rtol=0
            )


@pytest.mark.distributed
def test_a_run_of_one_rank_goes_on_with_two(tmp_path: Path, shards: Path) -> None:
    settings = ["data.num_workers=0", f"data.train={shards}", SHORT_EPOCH]
    tiny(tmp_path / "whole", shards, "train.steps=8", *settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", symlinks=True)
    command = ["train", TINY, f"run_dir={tmp_path / 'cut'}", "train.steps=12", *settings]
    ended = Ranks(tmp_path / "ranks", command).wait()
    assert ended.codes == [0, 0], ended.logs
    tiny(tmp_path / "whole", shards, "train.steps=12", *settings)
    assert [x["loss"] for x in metrics(tmp_path / "cut")] == pytest.approx(
        [x["loss"] for x in metrics(tmp_path / "whole")], rel=1e-5
    )


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, shards: Path) -> None:
    tiny(tmp_path, shards, "train.steps=2")
    before = metrics(tmp_path)
    assert tiny(tmp_path, shards, "train.steps=2") == DONE
    assert metrics(tmp_path) == before


def test_evaluation_keeps_the_best_and_stops_early(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, float("nan"), 1.0])
    monkeypatch.setattr(
        speechllm.train, "evaluate", lambda *args: {"loss": next(losses), "utterances": 1.0}
    )
    settings = (f"data.validation={shards}", "evaluation.every=2", "evaluation.patience=2")
    assert tiny(tmp_path, shards, *settings) == DONE
    assert metrics(tmp_path)[-1]["step"] == 8  # not the 20 of the configuration
    assert (tmp_path / "best").resolve().name == "step_00000004"
    steps = [path.name for path in complete_checkpoints(tmp_path)]
    assert steps == ["step_00000004", "step_00000008"]
    evaluations = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [2, 4, 6, 8]
    assert tiny(tmp_path, shards, *settings) == DONE  # also after a restart
    assert metrics(tmp_path)[-1]["step"] == 8
    reason = "2 evaluations brought no new best, evaluation.patience is 2"
    log = (tmp_path / "train.log").read_text()
    assert f"done after step 8; {reason}" in log
    assert f"the run is at step 8; {reason}" in log
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == reason


def test_scores_of_another_metric_are_no_rivals(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.2, 0.3, 0.6, 0.5])
    monkeypatch.setattr(
        speechllm.train,
        "evaluate",
        lambda *args: {"loss": 3.0, "token_accuracy": next(accuracies)},
    )
    settings = (f"data.validation={shards}", "evaluation.every=1", "evaluation.patience=2")
    tiny(tmp_path, shards, *settings, "train.steps=2")
    tiny(tmp_path, shards, *settings, "train.steps=4", "evaluation.metric=token_accuracy")
    progress = read_checkpoint(find_checkpoint(tmp_path, prefer="last")).progress
    assert progress.best == [{"step": 3, "score": 0.6}]
    assert progress.evaluations_without_best == 1
    assert (tmp_path / "best").resolve().name == "step_00000003"
    assert "evaluation.metric=loss" in (tmp_path / "train.log").read_text()


def test_real_evaluation_with_wer_changes_nothing_of_training(tmp_path: Path, shards: Path) -> None:
    settings = ("train.steps=4",)
    evaluation = (
        f"data.validation={shards}", "evaluation.every=2", "evaluation.max_utterances=7",
        "evaluation.wer_utterances=3", "evaluation.metric=wer", "generation.max_new_tokens=4",
    )  # fmt: skip
    tiny(tmp_path / "without", shards, *settings)
    tiny(tmp_path / "with", shards, *settings, *evaluation)
    assert metrics(tmp_path / "without") == metrics(tmp_path / "with")
    lines = [json.loads(x) for x in (tmp_path / "with/evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["utterances"] == 7 and 0 < line["loss"] < 20 for line in lines)
    assert all(line["wer"] >= 0 and 0 <= line["token_accuracy"] <= 1 for line in lines)


def test_starting_from_the_weights_of_another_run(tmp_path: Path, shards: Path) -> None:
    tiny(tmp_path / "first", shards, "train.steps=3")
    tiny(
        tmp_path / "second", shards, "train.steps=1", f"train.init_from={tmp_path / 'first'}",
        "optim.lr=1e-12", "seed=5",
    )  # fmt: skip
    for name, weight in weights(tmp_path / "first").items():
        torch.testing.assert_close(weights(tmp_path / "second")[name], weight)


def test_another_connector_is_refused_with_the_difference(tmp_path: Path, shards: Path) -> None:
    tiny(tmp_path / "first", shards, "train.steps=1")
    with pytest.raises(CheckpointError, match=r'model.connector: .*"downsampling_factor": 6'):
        tiny(tmp_path / "first", shards, "model.connector.downsampling_factor=4")
    with pytest.raises(CheckpointError, match=r"hidden"):
        tiny(
            tmp_path / "second", shards, "model.connector.hidden_size=32",
            f"train.init_from={tmp_path / 'first'}",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.llm.id=random:olmo2", "llm"),
        ("seed=2", "seed"),
        ("data.microbatch_tokens=512", "microbatch_tokens"),
        ("data.max_seconds=1.0", "data"),
        ("model.connector.norm_first=false", "norm_first"),
    ],
)
def test_a_resume_that_would_not_be_the_same_run_is_refused(
    tmp_path: Path, shards: Path, override: str, named: str
) -> None:
    tiny(tmp_path, shards, "train.steps=1")
    with pytest.raises(CheckpointError, match=named):
        tiny(tmp_path, shards, "train.steps=2", override)


def test_what_a_start_changes_is_named_by_whole_keys(tmp_path: Path, shards: Path) -> None:
    targets = "model.lora.targets=[a, {}]"
    tiny(tmp_path, shards, "train.steps=1", targets.format("b"))
    tiny(
        tmp_path, shards, "train.steps=1", targets.format("c"), "evaluation.wer_utterances=2",
        "data.augmentation.gain.probability=0.5",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text("seed: [1")
    tiny(tmp_path, shards, "train.steps=1")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition("last start: ")[2] for line in lines if "last start" in line] == [
        'model.lora.targets was ["a", "b"], is ["a", "c"]',
        "data.augmentation.gain.probability was 0.0, is 0.5",
        "evaluation.wer_utterances was 0, is 2",
        f"{tmp_path}/config.yaml cannot be read",
    ]


def test_missing_weights_of_a_checkpoint_are_refused(tmp_path: Path, shards: Path) -> None:
    tiny(tmp_path, shards, "train.steps=1")
    file = find_checkpoint(tmp_path) / "trainable.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="in this model, not in the checkpoint"):
        tiny(tmp_path, shards, "train.steps=2")


def test_too_many_unreadable_utterances_stop_the_run_with_the_list(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 24, num_shards=2)
    _spoil_audio(shards, every=4)
    with pytest.raises(DataError, match=r"max_bad_fraction.*[\s\S]*utt-"):
        tiny(tmp_path / "run", shards)
    assert tiny(tmp_path / "run2", shards, "data.max_bad_fraction=0.5", "train.steps=3") == DONE
    assert sum(line["utterances"] for line in metrics(tmp_path / "run2")) < 3 * 24
    assert "skipped utt-" in (tmp_path / "run2" / "train.log").read_text()


def _spoil_audio(shards: Path, *, every: int) -> None:
    """Overwrite the FLAC data of some members in place; headers and index stay as they are."""
    from speechllm.data.index import open_corpus

    corpus = open_corpus([str(shards)])
    for number in range(0, len(corpus), every):
        where = corpus.location(number)
        with open(where.shard, "r+b") as tar:
            tar.seek(where.audio_offset)
            tar.write(b"\0" * where.audio_size)


def test_nothing_to_train_on(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train"):
        train(load_config("configs/tiny.yaml", [f"run_dir={tmp_path}"]), ALONE)
    with pytest.raises(ConfigError, match="run_dir"):
        train(load_config("configs/tiny.yaml", [f"data.train={shards}"]), ALONE)
    with pytest.raises(DataError, match="none of the 48 utterances"):
        tiny(tmp_path, shards, "data.min_seconds=50")
    with pytest.raises(ConfigError, match=r"data\.validation"):
        tiny(tmp_path, shards, "evaluation.every=1")
