"""Predictions of a step on more GPUs as tables for people, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from speechllm.planner.links import Network
from speechllm.planner.scaling import Compute, Overlap, Step

WIDTH = 112
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """hidden_seconds: of the step if all that may run beside compute did. balance_known: from the
    data; else all microbatches are taken to cost the same."""

    step: Step
    hidden_seconds: float
    efficiency: float
    nodes: int
    bytes_per_rank: int
    balance_known: bool


@dataclass(frozen=True)
class Scaling:
    """measured: where `compute` is from, in words. utterances: where their lengths are from.
    usable: bytes that tensors may take on a GPU, where that was said. one: the step on one GPU.
    strong: rows of each strategy for the same step; weak: for one that grows with the GPUs."""

    strategy: str
    one: Step
    compute: Compute
    measured: str
    network: Network
    overlap: Overlap
    overlap_given: bool
    gpus_per_node: int
    utterances: str
    usable: int | None
    strong: Mapping[str, Sequence[Row]]
    weak: Mapping[str, Sequence[Row]]


def as_json(scaling: Scaling) -> dict[str, Any]:
    """Seconds and bytes."""
    network = scaling.network
    link = "given" if network.given else "preset, not measured"
    return {
        "strategy": scaling.strategy,
        "compute": asdict(scaling.compute),
        "network": {
            "name": network.name,
            "intra": asdict(network.intra),
            "inter": asdict(network.inter),
            "gpus_per_node": scaling.gpus_per_node,
        },
        "overlap": asdict(scaling.overlap),
        "sources": {
            "compute": scaling.measured,
            "network": link,
            "overlap": "given" if scaling.overlap_given else "assumed",
            "utterances": scaling.utterances,
        },
        "strategies": {
            name: {
                "strong": [_entry(row, scaling.usable) for row in scaling.strong[name]],
                "weak": [_entry(row, scaling.usable) for row in scaling.weak[name]],
            }
            for name in scaling.strong
        },
    }


def _entry(row: Row, usable: int | None) -> dict[str, Any]:
    step = row.step
    return {
        "gpus": step.layout.ranks,
        "nodes": row.nodes,
        "microbatches_per_step": step.layout.microbatches,
        "microbatches_per_rank": step.layout.rounds,
        "step_seconds": step.seconds,
        "compute_seconds": step.compute,
        "communication_seconds": step.communication,
        "exposed_communication_seconds": step.exposed,
        "step_seconds_if_hidden": row.hidden_seconds,
        "efficiency": row.efficiency,
        "utterances_per_second": step.utterances_per_second,
        "bytes_sent_per_rank": step.sent,
        "waste": step.layout.waste,
        "imbalance": step.layout.imbalance,
        "balance": "data" if row.balance_known else "assumed even",
        "bytes_per_rank": row.bytes_per_rank,
        "fits": None if usable is None else row.bytes_per_rank <= usable,
    }


def as_text(scaling: Scaling) -> str:
    out = StringIO()
    console = Console(file=out, width=WIDTH, highlight=False, markup=False)
    console.print("\n".join(_head(scaling)), soft_wrap=True)
    own = scaling.one.layout.microbatches
    console.print(
        _table(f"strong scaling: {own} microbatch(es) a step on all GPUs together", scaling.strong,
               scaling),
        markup=True,
    )  # fmt: skip
    console.print(
        _table(f"weak scaling: {own} microbatch(es) a step for each GPU", scaling.weak, scaling),
        markup=True,
    )
    console.print(_comparison(scaling), markup=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _head(scaling: Scaling) -> list[str]:
    compute, network, overlap = scaling.compute, scaling.network, scaling.overlap
    link = "given" if network.given else "preset, not measured"
    hidden = "given" if scaling.overlap_given else "assumed"
    known = [row.balance_known for rows in (scaling.strong, scaling.weak)
             for row in rows[scaling.strategy]]  # fmt: skip
    balance = "of the epoch's plan" if all(known) else "assumed even"
    if any(known) and not all(known):
        balance = "of the epoch's plan where it fills a step, else assumed even"
    return [
        f"predicted steps under {scaling.strategy}, from",
        f"  compute: {_seconds(compute.microbatch)} s a microbatch of {compute.utterances:.1f} "
        f"utterances and {_seconds(compute.update)} s an update, {scaling.measured}",
        f"  network: {network.text}, {scaling.gpus_per_node} GPUs a node; {link}",
        f"  hidden behind a microbatch's compute: {overlap.gradients:.0%} of it for gradients, "
        f"{overlap.weights:.0%} for weights; {hidden}",
        f"  {scaling.utterances}; balance of the ranks {balance}",
        "not in it: slow nodes, other jobs on the network, waiting for data",
    ]


def _table(title: str, rows: Mapping[str, Sequence[Row]], scaling: Scaling) -> Table:
    table = Table(title=title, box=None, title_justify="left", pad_edge=False)
    headings = ["GPUs", "nodes", "microb./GPU", "step s", "compute", "exposed comm.", "all hidden",
                "efficiency", "idle", "utt./s", "GiB/GPU"]  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    if scaling.usable is not None:
        table.add_column("fits")
    for row in rows[scaling.strategy]:
        step = row.step
        busy = step.layout.microbatches / (step.layout.ranks * step.layout.busiest)
        cells = [
            str(step.layout.ranks),
            str(row.nodes),
            str(step.layout.rounds),
            _seconds(step.seconds),
            _seconds(step.compute),
            _seconds(step.exposed),
            _seconds(row.hidden_seconds),
            f"{row.efficiency:.1%}",
            f"{1 - busy:.1%}",
            f"{step.utterances_per_second:.4g}",
            f"{row.bytes_per_rank / GIB:.2f}",
        ]
        if scaling.usable is not None:
            cells.append("yes" if row.bytes_per_rank <= scaling.usable else "no")
        table.add_row(*cells)
    return table


def _comparison(scaling: Scaling) -> Table:
    table = Table(
        title="efficiency under each strategy, strong / weak", box=None, title_justify="left",
        pad_edge=False,
    )  # fmt: skip
    table.add_column("GPUs", justify="right")
    for name in scaling.strong:
        table.add_column(name, justify="right")
    for number, row in enumerate(scaling.strong[scaling.strategy]):
        cells = [
            f"{100 * scaling.strong[name][number].efficiency:.0f} / "
            f"{100 * scaling.weak[name][number].efficiency:.0f}"
            for name in scaling.strong
        ]
        table.add_row(str(row.step.layout.ranks), *cells)
    return table


def _seconds(value: float) -> str:
    return f"{value:.4g}" if value >= 1e-4 or not value else f"{value:.1e}"
