from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import torch

import pytest

from speechllm.checkpoint import (
    Progress,
    checkpoint_path,
    complete_checkpoints,
    find_checkpoint,
    read_checkpoint,
    refuse_other_identity,
)
from speechllm.errors import CheckpointError, LostLease
from speechllm.lease import Lease
from speechllm.snapshot import CheckpointWriter, read_trainable
from speechllm.strategy.base import TrainableState

IDENTITY = {"llm": {"id": "a", "hash": "1"}, "seed": 1}


def state(value: float = 1.0, step: int = 3) -> TrainableState:
    tensors = [{"connector.w": torch.full((2, 3), value + i)} for i in range(3)]
    return TrainableState(*tensors, step=step)


def write(
    run: Path, steps: list[int], *, best: list[int] | None = None, last: int = 1, n_best: int = 1
) -> None:
    writer = CheckpointWriter(run, keep_last=last, keep_best=n_best)
    for step in steps:
        ranked = [{"step": s, "score": 0.0} for s in best or [] if s <= step]
        writer.save(state(step, step), Progress(step=step, best=ranked), IDENTITY, "seed: 1\n")
    writer.close()


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_best=0)
    progress = Progress(step=7, epoch=2, epoch_step=3, bad_in_epoch=1, evaluations_without_best=2)
    writer.save(state(step=5), progress, IDENTITY, "seed: 1\n")
    writer.close()
    path = find_checkpoint(tmp_path)
    found = read_checkpoint(path)
    assert found.progress == progress
    assert found.identity == IDENTITY
    weights = read_trainable(path)
    assert weights.step == 5  # the optimizer's count, which skips what was not finite
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        assert torch.equal(
            getattr(weights, name)["connector.w"], getattr(state(), name)["connector.w"]
        )
    assert (path / "config.yaml").read_text() == "seed: 1\n"
    assert not list(path.parent.glob(".*"))


def test_newest_and_best_are_kept_and_the_rest_forgotten(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3, 4, 5], best=[2], last=2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == [
        "step_00000002", "step_00000004", "step_00000005",
    ]  # fmt: skip
    assert (tmp_path / "best").resolve().name == "step_00000002"
    assert find_checkpoint(tmp_path).name == "step_00000002"
    assert find_checkpoint(tmp_path, prefer="last").name == "step_00000005"


def test_a_better_one_moves_best_and_lets_the_former_go(tmp_path: Path) -> None:
    write(tmp_path, [1], best=[1])
    write(tmp_path, [2], best=[2])
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000002"]
    assert (tmp_path / "best" / "COMPLETE").is_file()


def test_a_kill_before_the_best_is_there_leaves_no_link_to_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [1], best=[1])
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == checkpoint_path(tmp_path, 2):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [2], best=[2])
    assert os.readlink(tmp_path / "best") == "checkpoints/step_00000002"
    assert find_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1), "a link to nothing"
    monkeypatch.undo()
    write(tmp_path, [2], best=[2])
    assert find_checkpoint(tmp_path).name == "step_00000002"


def test_without_best_ones_nothing_points_to_them(tmp_path: Path) -> None:
    write(tmp_path, [1, 2], best=[1], n_best=0)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000002"]
    assert not (tmp_path / "best").exists()


def test_incomplete_ones_are_not_seen_and_leftovers_are_removed(tmp_path: Path) -> None:
    write(tmp_path, [1, 2], last=2)
    (checkpoint_path(tmp_path, 2) / "COMPLETE").unlink()
    leftover = tmp_path / "checkpoints" / ".step_00000003.77"
    leftover.mkdir()
    assert find_checkpoint(tmp_path).name == "step_00000001"
    write(tmp_path, [2])  # the half one of the same step is replaced
    assert read_trainable(find_checkpoint(tmp_path)).weights["connector.w"][0, 0] == 2
    assert not leftover.exists()


def test_a_failed_write_is_reported_and_leaves_the_former_one(tmp_path: Path) -> None:
    write(tmp_path, [1])
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_best=0)
    (tmp_path / "checkpoints" / f".step_00000002.{os.getpid()}").touch()
    writer.save(state(), Progress(step=2), IDENTITY, "")
    with pytest.raises(FileExistsError):
        writer.close()
    assert find_checkpoint(tmp_path).name == "step_00000001"


def test_no_checkpoint_is_an_error_and_not_step_zero(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_is_found_by_any_path_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [1])
    (tmp_path / "best").unlink(missing_ok=True)
    (tmp_path / "best").symlink_to("checkpoints/step_00000001")
    found = checkpoint_path(tmp_path, 1)
    assert find_checkpoint(tmp_path / "best") == found
    monkeypatch.chdir(found.parent)
    assert find_checkpoint(Path(found.name)) == found


@pytest.mark.parametrize("damage", ["{", '{"format": 99}', "{}"])
def test_unreadable_state_names_the_file(tmp_path: Path, damage: str) -> None:
    write(tmp_path, [1])
    path = find_checkpoint(tmp_path)
    (path / "state.json").write_text(damage)
    with pytest.raises(CheckpointError, match="step_00000001"):
        read_checkpoint(path)


def test_truncated_weights_name_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, [1])
    path = find_checkpoint(tmp_path)
    data = (path / "trainable.safetensors").read_bytes()
    (path / "trainable.safetensors").write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        read_trainable(path)


def test_another_identity_is_refused_with_the_difference() -> None:
    path = Path("run")
    refuse_other_identity(IDENTITY, json.loads(json.dumps(IDENTITY)), path)
    refuse_other_identity(IDENTITY, {**IDENTITY, "llm": {"id": "moved", "hash": "1"}}, path)
    with pytest.raises(CheckpointError, match=r"llm.*\n?.*") as caught:
        refuse_other_identity(IDENTITY, {**IDENTITY, "llm": {"id": "b", "hash": "2"}}, path)
    assert "seed" not in str(caught.value)
    with pytest.raises(CheckpointError, match="seed"):
        refuse_other_identity(IDENTITY, {**IDENTITY, "seed": 2}, path)


def test_shapes_and_names_that_differ_are_all_listed() -> None:
    parameters = {
        "connector.w": torch.nn.Parameter(torch.zeros(2, 4)),
        "connector.new": torch.nn.Parameter(torch.zeros(1)),
    }
    with pytest.raises(CheckpointError) as caught:
        state().refuse_unless_fits(parameters)
    assert "connector.w: (2, 3) in the checkpoint, (2, 4)" in str(caught.value)
    assert "connector.new: in this model, not in the checkpoint" in str(caught.value)


def test_the_loop_does_not_wait_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=2, keep_best=0)
    disk = threading.Event()
    write = writer._write
    monkeypatch.setattr(writer, "_write", lambda *args: (disk.wait(10), write(*args)))
    for step in (1, 2):
        writer.save(state(step, step), Progress(step=step), IDENTITY, "")
    assert complete_checkpoints(tmp_path) == []
    disk.set()
    writer.close()
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step_00000001",
        "step_00000002",
    ]


def test_what_went_wrong_with_a_write_is_raised_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_best=0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", full)
    writer.save(state(), Progress(step=1), IDENTITY, "")
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.close()


def test_without_its_lease_nothing_is_published(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease", "second")
    lease.path.write_text("first\n")
    writer = CheckpointWriter(tmp_path, keep_last=1, keep_best=0, lease=lease)
    writer.save(state(), Progress(step=1), IDENTITY, "")
    with pytest.raises(LostLease, match="taken over"):
        writer.wait()
    assert complete_checkpoints(tmp_path) == []
    lease.path.write_text("second\n")
    writer.save(state(), Progress(step=2), IDENTITY, "")
    writer.close()
    assert len(complete_checkpoints(tmp_path)) == 1
