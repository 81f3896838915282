"""One optimizer step, the same on every strategy, world size and cut into microbatches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speechllm.errors import DataError
from speechllm.model.positions import Positions
from speechllm.strategy.base import Strategy
from speechllm.transfer import Transfer
from speechllm.types import Batch, Objective, StepData
from speechllm.world import World


@dataclass(frozen=True)
class StepTotals:
    """Sums over all microbatches of the step and all ranks, known before the forward."""

    target_tokens: int
    utterances: int
    audio_seconds: float
    positions: int  # that the model runs, repeats included
    used_positions: int  # of these, not padding and not repeated
    bad: int
    stop: bool

    @property
    def padding_fraction(self) -> float:
        return 1.0 - self.used_positions / max(self.positions, 1)


@dataclass(frozen=True)
class StepResult:
    """This rank's sums and the norm of the gradient of all ranks, which may all still be on the
    device: to read one waits for it."""

    loss: Tensor
    correct: Tensor
    grad_norm: Tensor | float


def whole_rows(batch: Batch) -> Positions:
    """Of rows that are run as they are collated."""
    return Positions(len(batch.lengths) * max(batch.lengths), sum(batch.lengths))


def agree(
    data: StepData,
    world: World,
    *,
    stop: bool,
    positions_of: Callable[[Batch], Positions] = whole_rows,
) -> StepTotals:
    """What the step holds and whether any rank wants to stop, in one collective.

    positions_of: what the model runs of a batch, see `speechllm.model.positions.positions_of`.
    """
    counted = [m for m in data.microbatches if m.weight > 0]
    positions = [positions_of(m.batch) for m in data.microbatches]
    sums = world.sum(
        [
            sum(m.batch.num_target_tokens for m in counted),
            sum(m.utterances for m in counted),
            sum(m.audio_seconds for m in counted),
            sum(found.run for found in positions),
            sum(
                found.used
                for found, m in zip(positions, data.microbatches, strict=True)
                if m.weight > 0
            ),
            sum(len(m.bad) for m in data.microbatches),
            float(stop),
        ]
    )
    return StepTotals(
        target_tokens=int(sums[0]),
        utterances=int(sums[1]),
        audio_seconds=sums[2],
        positions=int(sums[3]),
        used_positions=int(sums[4]),
        bad=int(sums[5]),
        stop=sums[6] > 0,
    )


def run_step(
    strategy: Strategy,
    data: StepData,
    totals: StepTotals,
    *,
    objective: Objective,
    lr: float,
    seed: int,
    step: int,
    device: torch.device,
    transfer: Callable[[Batch], Batch] | None = None,
) -> StepResult:
    """Forward and backward of this rank's microbatches, then one update.

    The loss is the sum of cross entropies over the target tokens of the whole step, so it does not
    depend on how they fall into microbatches or ranks. Nothing here waits for the device.

    transfer: brings a batch to the device; without one it is copied in line.
    """
    to_device = transfer or Transfer(device)
    loss_sum = torch.zeros((), device=device)
    correct = torch.zeros((), device=device)
    for number, microbatch in enumerate(data.microbatches):
        torch.manual_seed(dropout_seed(seed, step, microbatch.index))
        with strategy.microbatch(last=number == len(data.microbatches) - 1):
            sums = strategy.model(to_device(microbatch.batch), objective)
            strategy.backward(sums.loss * (microbatch.weight / max(totals.target_tokens, 1)))
        loss_sum += sums.loss.detach() * microbatch.weight
        correct += sums.correct.detach() * microbatch.weight
    return StepResult(loss_sum, correct, strategy.step(lr))


def dropout_seed(seed: int, step: int, microbatch: int) -> int:
    """A pure function, so that dropout depends neither on ranks nor on where a run was resumed."""
    digest = hashlib.blake2b(f"{seed}/{step}/{microbatch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes up to 2**63 - 1


def refuse_too_many_bad(
    data: StepData, world: World, *, bad: int, epoch_utterances: int, fraction: float
) -> None:
    """Raise DataError on every rank, with examples, once more than `fraction` of the epoch's
    utterances could not be read. Every rank must call it with the same `bad`."""
    if bad <= fraction * epoch_utterances:
        return
    mine = [[b.key, b.shard, b.reason] for m in data.microbatches for b in m.bad]
    shown = [row for rows in world.gather(mine) for row in rows][:20]
    raise DataError(
        f"{bad} of {epoch_utterances} utterances of this epoch could not be used, more than "
        f"data.max_bad_fraction={fraction:g} allows; mend or rebuild the shards, or raise the "
        "limit. The last of them (all are in train.log):\n"
        + "\n".join(f"  {key} in {shard}: {reason}" for key, shard, reason in shown)
    )
