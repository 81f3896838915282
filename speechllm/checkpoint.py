"""Checkpoints that know neither strategy nor world size, written so that a kill leaves no half one.

RUN/checkpoints/step_00001000/
    trainable.safetensors   fp32 weights by parameter name
    optimizer.safetensors   fp32 Adam moments: exp_avg.NAME, exp_avg_sq.NAME
    state.json              where the run stands, and the identity of all that it was trained with
    config.yaml             the resolved configuration
    COMPLETE                written last

Here is what needs no tensors, and so no torch: which there are, and how far they are. Their weights
are read and written by snapshot.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechllm.errors import CheckpointError

FORMAT = 1


@dataclass
class Progress:
    """Where a run stands. (epoch, epoch_step) is the whole state of the data."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    epoch_step: int = 0  # the next step within the epoch
    bad_in_epoch: int = 0
    best: list[dict[str, float]] = field(default_factory=list)  # {"step", "score"}, best first
    evaluations_without_best: int = 0


@dataclass
class Checkpoint:
    path: Path
    progress: Progress
    optimizer_step: int  # less than progress.step where gradients were not finite
    loss_scale: float | None  # of fp16
    identity: dict[str, Any]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(marker.parent for marker in run_dir.glob("checkpoints/step_*/COMPLETE"))


def find_checkpoint(where: Path, *, prefer: str = "best") -> Path:
    """The checkpoint meant by a path: itself, or a run's best or newest one.

    Raises CheckpointError when there is none.
    """
    if (where / "COMPLETE").is_file():
        return where.resolve()  # `best` is another one tomorrow, and does not lie where it points
    complete = complete_checkpoints(where)
    if not complete:
        raise CheckpointError(
            f"{where}: no complete checkpoint there; give a run directory that has "
            "checkpoints/step_*/COMPLETE, or one such checkpoint directory"
        )
    best = where / "best"
    if prefer == "best" and (best / "COMPLETE").is_file():
        return best.resolve()
    return complete[-1]


def find_start(init_from: str) -> Path:
    """The checkpoint that `train.init_from` means. Raises CheckpointError, which names the key."""
    try:
        return find_checkpoint(Path(init_from))
    except CheckpointError as error:
        raise CheckpointError(f"train.init_from={error}") from None


def read_checkpoint(path: Path) -> Checkpoint:
    """The small part: progress and identity. Raises CheckpointError when it is not ours."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}"
            )
        return Checkpoint(
            path,
            Progress(**state["progress"]),
            state["optimizer_step"],
            state["loss_scale"],
            state["identity"],
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}/state.json: not readable as a checkpoint ({error}); remove that directory to "
            "go on from the checkpoint before it"
        ) from error


def refuse_other_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError that spells out every difference. Paths and names may differ; what
    counts is content, so only the `hash` of a part with one is compared."""
    lines = []
    for part in sorted(found.keys() | wanted.keys()):
        before, now = found.get(part), wanted.get(part)
        if _essence(before) != _essence(now):
            lines.append(f"  {part}: checkpoint {json.dumps(before)}, this run {json.dumps(now)}")
    if lines:
        raise CheckpointError(
            f"{path}: made by another run than this configuration describes; undo the change, or "
            "use another run_dir (with train.init_from to start from these weights):\n"
            + "\n".join(lines)
        )


def _essence(part: Any) -> Any:
    return part["hash"] if isinstance(part, dict) and "hash" in part else part
