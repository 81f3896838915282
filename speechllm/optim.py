"""The learning rate as a pure function of the step, and AdamW over what trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import AdamW

from speechllm.config.schema import Optim, Train
from speechllm.types import Objective


class Phase(NamedTuple):
    """A stretch of steps with one objective; `step` of `steps` within it."""

    objective: Objective
    step: int
    steps: int
    lr_scale: float


def phase_of(step: int, train: Train) -> Phase:
    """The phase that optimizer step `step` (from 0) of the run belongs to."""
    if step < train.ctc_steps:
        return Phase("ctc", step, min(train.ctc_steps, train.steps), train.ctc_lr_scale)
    return Phase("lm", step - train.ctc_steps, train.steps - train.ctc_steps, 1.0)


def learning_rate(step: int, optim: Optim, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of the `total_steps` of a phase.

    Linear warm-up that reaches the peak at step `warmup_steps - 1`, then constant, or cosine or
    linear down towards `min_lr_fraction` of the peak, which step `total_steps` would have: the last
    step of a run still moves.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    decaying = max(total_steps - optim.warmup_steps, 1)
    done = min((step - optim.warmup_steps) / decaying, 1.0)
    floor = optim.min_lr_fraction
    match optim.schedule:
        case "constant":
            fraction = 1.0
        case "cosine":
            fraction = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            fraction = floor + (1 - floor) * (1 - done)
    return optim.lr * fraction


def build_adamw(parameters: Mapping[str, nn.Parameter], optim: Optim) -> AdamW:
    """AdamW (Loshchilov and Hutter, 2019); biases and norm weights are not decayed.

    `fused` runs on CPU and CUDA alike and updates all parameters in one pass.
    """
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    plain = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def update(optimizer: AdamW, *, lr: float, norm: Tensor) -> None:
    """One step at this rate, and none where the gradient's norm is not finite. The fused kernel
    looks at that itself, on the device: the host does not wait to know."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = 1 - norm.isfinite().float()  # type: ignore[attr-defined]
    optimizer.step()


def updates_made(optimizer: AdamW) -> int:
    """How many times `update` has changed something. Waits for the device."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)
