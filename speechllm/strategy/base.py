"""What the training loop needs of a strategy, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from speechllm.errors import CheckpointError
from speechllm.world import World


@dataclass
class TrainableState:
    """All that trains, free of strategy and world size: fp32 CPU tensors by parameter name."""

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: int  # optimizer steps taken
    loss_scale: float | None = None  # where it moves, with fp16

    def without_moments(self) -> TrainableState:
        """These weights, as an optimizer that has taken no step would have them."""
        zeros = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        return TrainableState(self.weights, zeros, zeros, step=0)

    def refuse_unless_fits(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError, with the whole difference, unless names and shapes agree."""
        have = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        want = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if have == want:
            return
        lines = [f"  {name}: in the checkpoint, not in this model" for name in have.keys() - want]
        lines += [f"  {name}: in this model, not in the checkpoint" for name in want.keys() - have]
        lines += [
            f"  {name}: {have[name]} in the checkpoint, {want[name]} in this model"
            for name in have.keys() & want
            if have[name] != want[name]
        ]
        raise CheckpointError(
            "the checkpoint's weights do not fit this model; set model.connector, model.encoder "
            "and model.llm as they were for that run, or begin with other weights (another "
            "run_dir, or train.init_from):\n" + "\n".join(sorted(lines))
        )


def agree_to_load(
    state: TrainableState | None, parameters: Mapping[str, Tensor], world: World
) -> tuple[int, float | None]:
    """Step and loss scale of rank 0's `state`, on every rank. A collective.

    Raises CheckpointError on all ranks unless it fits: one that raised alone would leave the
    others waiting for it.
    """
    about: dict[str, Any] | None = None
    if world.is_main:
        assert state is not None
        try:
            state.refuse_unless_fits(parameters)
            about = {"step": state.step, "loss_scale": state.loss_scale}
        except CheckpointError as error:
            about = {"refused": str(error)}
    agreed = world.from_main(about)
    if "refused" in agreed:
        raise CheckpointError(agreed["refused"])
    return agreed["step"], agreed["loss_scale"]


class Strategy(Protocol):
    """How the ranks share the work of a step."""

    model: nn.Module
    """Called as `model(batch, objective)`; gives the `LossSums` of that microbatch."""

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one microbatch; gradients are synchronised on the last."""

    def backward(self, loss: Tensor) -> None:
        """`loss` is this rank's share of the step's loss; the shares of all ranks add up."""

    def step(self, lr: float) -> Tensor | float:
        """Unscale, clip, update, zero. Returns the gradient norm before clipping, which may still
        be on the device; if that is not finite, nothing is updated (but the loss scale of fp16,
        which then falls)."""

    def full_state(self) -> TrainableState | None:
        """A copy of all that trains, on rank 0; None elsewhere. A collective."""

    def load_full_state(self, state: TrainableState | None) -> None:
        """Take over rank 0's `state`; other ranks may pass None. A collective."""
