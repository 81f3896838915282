"""The tensors of a checkpoint (see checkpoint.py): read whole, written in the background."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speechllm.checkpoint import (
    FORMAT,
    Progress,
    checkpoint_path,
    complete_checkpoints,
    read_checkpoint,
)
from speechllm.errors import CheckpointError
from speechllm.lease import Lease
from speechllm.strategy.base import TrainableState

MOST_PENDING = 2  # snapshots of what trains, fp32 with moments


def read_trainable(path: Path, *, weights_only: bool = False) -> TrainableState:
    """Weights, and unless `weights_only` the Adam moments. Raises CheckpointError."""
    try:
        weights = load_file(path / "trainable.safetensors")
        moments = {} if weights_only else load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: damaged checkpoint ({error}); remove that directory to go on from the "
            "checkpoint before it"
        ) from error
    about = None if weights_only else read_checkpoint(path)
    return TrainableState(
        weights=weights,
        exp_avg={n.removeprefix("exp_avg."): t for n, t in moments.items() if _is(n, "exp_avg")},
        exp_avg_sq={
            n.removeprefix("exp_avg_sq."): t for n, t in moments.items() if _is(n, "exp_avg_sq")
        },
        step=about.optimizer_step if about is not None else 0,
        loss_scale=about.loss_scale if about is not None else None,
    )


def _is(name: str, kind: str) -> bool:
    return name.startswith(kind + ".")


class CheckpointWriter:
    """Writes in the background, one after the other. Only rank 0 has one.

    With a lease, nothing is published, pointed to or removed once it is lost (LostLease).
    """

    def __init__(
        self, run_dir: Path, *, keep_last: int, keep_best: int, lease: Lease | None = None
    ) -> None:
        self.run_dir = run_dir
        self.lease = lease
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        for leftover in run_dir.glob("checkpoints/.step_*"):
            shutil.rmtree(leftover)

    def save(
        self, state: TrainableState, progress: Progress, identity: dict[str, Any], config: str
    ) -> None:
        """Start to write, or line up behind a write that goes on; `state` must not change any more.

        Raises what went wrong with a write before it. Waits only where MOST_PENDING snapshots
        already lie in memory, because the disk is slower than the training.
        """
        self._collect(MOST_PENDING - 1)
        about = {
            "format": FORMAT,
            "progress": asdict(progress),
            "optimizer_step": state.step,
            "loss_scale": state.loss_scale,
            "identity": identity,
        }
        best = [int(entry["step"]) for entry in progress.best[: self.keep_best]]
        self._pending.append(
            self._thread.submit(
                self._write, state, json.dumps(about, indent=1), config, progress.step, best
            )
        )

    def wait(self) -> None:
        """Until what was started is on disk; raises what went wrong with it."""
        self._collect(0)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _collect(self, left: int) -> None:
        while self._pending and (len(self._pending) > left or self._pending[0].done()):
            self._pending.pop(0).result()

    def _write(
        self, state: TrainableState, about: str, config: str, step: int, best: list[int]
    ) -> None:
        final = checkpoint_path(self.run_dir, step)
        if not (final / "COMPLETE").is_file():
            aside = final.with_name(f".{final.name}.{os.getpid()}")
            aside.mkdir(parents=True)
            save_file(state.weights, aside / "trainable.safetensors")
            moments = {f"exp_avg.{name}": tensor for name, tensor in state.exp_avg.items()}
            moments |= {f"exp_avg_sq.{name}": tensor for name, tensor in state.exp_avg_sq.items()}
            save_file(moments, aside / "optimizer.safetensors")
            (aside / "state.json").write_text(about, encoding="utf-8")
            (aside / "config.yaml").write_text(config, encoding="utf-8")
            (aside / "COMPLETE").touch()
            for file in aside.iterdir():
                _fsync(file)
            _fsync(aside)
            if self.lease is not None:
                self.lease.check()
            if final.exists():  # an incomplete one of the same name
                shutil.rmtree(final)
            # Before it is there: a kill in between leaves a link to nothing, which the run mends
            # as it goes on. The other way round the run could be over, and the link on an old one.
            self._point_to_best(best, step)
            aside.rename(final)
            _fsync(final.parent)
        self._point_to_best(best, step)
        self._forget(best)

    def _point_to_best(self, best: list[int], step: int) -> None:
        if best and (best[0] == step or checkpoint_path(self.run_dir, best[0]).is_dir()):
            aside = self.run_dir / ".best"
            aside.unlink(missing_ok=True)
            aside.symlink_to(Path("checkpoints") / checkpoint_path(self.run_dir, best[0]).name)
            aside.rename(self.run_dir / "best")

    def _forget(self, best: list[int]) -> None:
        complete = complete_checkpoints(self.run_dir)
        kept = set(complete[-self.keep_last :])
        kept |= {checkpoint_path(self.run_dir, step) for step in best}
        for path in complete:
            if path not in kept:
                # Renamed first: a kill in the middle must not leave half of a complete one.
                aside = path.with_name(f".{path.name}.old")
                path.rename(aside)
                shutil.rmtree(aside)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
