"""The time of a step on 1 to 1,024 GPUs, from what one of them needs. Imports no torch.

A step of M microbatches on W ranks runs ceil(M / W) rounds; its compute is that of the costliest
rank, and what no compute hides of its collectives comes on top:

    step = compute + update + sum over collectives of max(0, seconds - what it may run beside)

Nothing else is in it: no stragglers, no contention between jobs, no waiting for data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from speechllm.errors import UserError
from speechllm.planner.links import Kind, Network, collective_seconds, sent_bytes


class Sent(Protocol):
    """`speechllm.planner.messages.Message`."""

    @property
    def kind(self) -> Kind: ...
    @property
    def size(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def beside(self) -> str | None: ...
    @property
    def microbatches(self) -> int: ...


@dataclass(frozen=True)
class Compute:
    """Of one device. microbatch: seconds of forward and backward of a mean one. update: seconds of
    the optimizer, once a step. utterances: of a mean microbatch."""

    microbatch: float
    utterances: float
    update: float = 0.0


@dataclass(frozen=True)
class Overlap:
    """Parts of a microbatch's compute, from 0 to 1, that its collectives may run beside: the
    reduction of gradients (of the last microbatch, or of each where each reduces), the gathering
    of weights.

    Nothing by default. The gradients of a connector come at the end of the backward, so that
    little is left to run beside; gathering ahead hides much on a GPU, which has not been measured.
    """

    gradients: float = 0.0
    weights: float = 0.0


@dataclass(frozen=True)
class Layout:
    """How a step's work lies on the ranks.

    rounds: microbatches of a rank, repeats included. busiest: cost of the costliest rank in mean
    microbatches; `rounds` where all cost the same.
    """

    ranks: int
    microbatches: int
    rounds: int
    busiest: float

    @property
    def waste(self) -> float:
        """Part of the rank-rounds that repeat a microbatch at weight zero."""
        return 1 - self.microbatches / (self.ranks * self.rounds)

    @property
    def imbalance(self) -> float:
        """Cost of the costliest rank over that of as many mean microbatches."""
        return self.busiest / self.rounds


@dataclass(frozen=True)
class Step:
    """Seconds. communication: of all collectives, one after the other. exposed: what of it lies
    outside of compute. sent: bytes that a rank sends."""

    layout: Layout
    compute: float
    communication: float
    exposed: float
    sent: float
    utterances: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def utterances_per_second(self) -> float:
        return self.utterances / self.seconds


def layout_of(ranks: int, microbatches: int, costs_KM: np.ndarray | None = None) -> Layout:
    """costs_KM: of the microbatches of K steps, in any unit; None: all the same."""
    rounds = -(-microbatches // ranks)
    if costs_KM is None:
        return Layout(ranks, microbatches, rounds, float(rounds))
    assert costs_KM.shape[1] == microbatches
    busiest = float(busiest_costs(costs_KM, ranks).mean() / costs_KM.mean())
    return Layout(ranks, microbatches, rounds, busiest)


def busiest_costs(costs_KM: np.ndarray, ranks: int) -> np.ndarray:
    """float64 [K]: the cost of the costliest rank in each step, where ranks take microbatches as
    `speechllm.data.plan.rank_share` says."""
    steps, microbatches = costs_KM.shape
    rounds = -(-microbatches // ranks)
    share_KRW = np.zeros((steps, rounds, ranks))
    if rounds == 1:
        share_KRW[:, 0] = costs_KM[:, np.arange(ranks) % microbatches]
    else:
        full = (rounds - 1) * ranks
        share_KRW[:, :-1] = costs_KM[:, :full].reshape(steps, rounds - 1, ranks)
        share_KRW[:, -1] = share_KRW[:, -2]  # who has no more repeats the last one
        share_KRW[:, -1, : microbatches - full] = costs_KM[:, full:]
    return share_KRW.sum(axis=1).max(axis=1)


def predict_step(
    compute: Compute,
    layout: Layout,
    messages: Sequence[Sent],
    network: Network,
    gpus_per_node: int,
    overlap: Overlap,
) -> Step:
    """`messages`: of a step of `layout.rounds` rounds on `layout.ranks` ranks."""
    parts = {"backward": overlap.gradients, "compute": overlap.weights, None: 0.0}
    total = exposed = sent = 0.0
    for message in messages:
        if not message.count:
            continue
        size = message.size / message.count
        each = collective_seconds(message.kind, size, layout.ranks, network, gpus_per_node)
        seconds = message.count * each
        beside = parts[message.beside] * message.microbatches * compute.microbatch
        total += seconds
        exposed += max(0.0, seconds - beside)
        sent += sent_bytes(message.kind, message.size, layout.ranks)
    return Step(
        layout,
        compute=layout.busiest * compute.microbatch + compute.update,
        communication=total,
        exposed=exposed,
        sent=sent,
        utterances=layout.microbatches * compute.utterances,
    )


def efficiency(step: Step, one: Step) -> float:
    """Utterances of a GPU and second over those of one GPU alone; for a fixed step (strong
    scaling) that is T(1) / (W T(W)), for one that grows with the ranks (weak) T(1) / T(W)."""
    return step.utterances_per_second / (step.layout.ranks * one.utterances_per_second)


def parse_worlds(text: str) -> tuple[int, ...]:
    """`1,2,8,64`. Raises UserError."""
    try:
        worlds = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        worlds = ()
    if not worlds or worlds[0] < 1:
        raise UserError(f"--scale {text!r}: write numbers of GPUs, as in 1,8,64,1024")
    return worlds


def parse_overlap(text: str) -> Overlap:
    """`gradients=0.2,weights=0.8`, or either. Raises UserError."""
    overlap = Overlap()
    for part in text.split(","):
        key, _, value = (side.strip() for side in part.partition("="))
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if key not in ("gradients", "weights") or not 0 <= share <= 1:
            raise UserError(
                f"--overlap {part!r}: write gradients=0.2,weights=0.8, each a part of compute from "
                "0 to 1"
            )
        overlap = replace(overlap, **{key: share})
    return overlap
