"""A plan as a table for people, and as JSON."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from speechllm.planner.activations import Setting
from speechllm.planner.advice import CONTEXT, GIB, USABLE, Plan

COLUMNS = {  # heading -> parts
    "frozen": ("frozen_llm", "frozen_encoder", "ctc_head", "prefix"),
    "trained": ("trainable",),
    "gradients": ("gradients", "buckets"),
    "optimizer": ("optimizer",),
    "activations": ("activations", "batch"),
    "logits": ("logits",),
    "gathered": ("gathered",),
}
WIDTH = 112


def as_json(plan: Plan) -> dict[str, Any]:
    """Sizes in bytes; `recommended` is None and `max_batch_tokens` 0 where nothing fits.
    `max_plain_utterances` is there under `preset: plain`."""
    plain = {}
    if plan.max_plain_utterances is not None:
        plain = {"max_plain_utterances": plan.max_plain_utterances}
    return {
        "strategies": {
            name: {
                "fits": entry.fits,
                "bytes_per_rank": entry.bytes_per_rank,
                "bytes_on_wire_per_step": entry.bytes_on_wire_per_step,
                "parts": entry.parts,
            }
            for name, entry in plan.strategies.items()
        },
        "recommended": plan.recommended,
        "max_batch_tokens": plan.max_batch_tokens,
        **plain,
    }


def as_text(plan: Plan, *, source: str) -> str:
    """`source`: where the lengths of the utterances come from."""
    out = StringIO()
    console = Console(file=out, width=WIDTH, highlight=False, markup=False)
    console.print(_headline(plan))
    console.print(f"microbatches of {_size(plan)}, {source}")
    console.print(_table(plan), markup=True)
    console.print(_advice(plan))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def how_to_take(strategy: str) -> str:
    """The setting of the configuration."""
    if strategy in ("ddp", "fsdp2"):
        return f"strategy.kind={strategy}"
    return f"strategy.kind=deepspeed strategy.config=ds_configs/{strategy}.json"


def _headline(plan: Plan) -> str:
    about, setting = plan.job.architecture, plan.job.setting
    where = "CPU" if plan.machine.on_cpu else "GPU"
    return (
        f"{about.frozen_parameters / 1e6:.1f} M frozen and "
        f"{about.trained_parameters / 1e6:.2f} M trained parameters, {_numbers(setting)}\n"
        f"{plan.machine.ranks} rank(s) of {plan.machine.memory / GIB:.1f} GiB ({where}), "
        f"{plan.job.microbatches} microbatch(es) a step each"
    )


def _size(plan: Plan) -> str:
    if plan.plain_utterances is not None:
        return f"{plan.plain_utterances} utterances, padded to 30 s"
    prefix = ", a prefix of the prompt computed once" if plan.job.cached else ""
    return f"{plan.budget} positions{prefix}"


def _numbers(setting: Setting) -> str:
    stored = f"stored in {8 * setting.frozen} bits, computed in {8 * setting.compute}"
    checkpointed = ", activation checkpointing" if setting.checkpointing else ""
    return f"{stored}, {setting.attention} attention{checkpointed}"


def _table(plan: Plan) -> Table:
    table = Table(
        title="predicted GiB of tensors a rank at the highest moment of a step", box=None,
        title_justify="left", pad_edge=False,
    )  # fmt: skip
    table.add_column("strategy")
    table.add_column("fits")
    for heading in ("total", *COLUMNS, "wire GB/step"):
        table.add_column(heading, justify="right")
    for name, entry in plan.strategies.items():
        sums = [gib(sum(entry.parts[part] for part in parts)) for parts in COLUMNS.values()]
        table.add_row(
            name,
            "yes" if entry.fits else "no",
            gib(entry.bytes_per_rank),
            *sums,
            f"{entry.bytes_on_wire_per_step / 1e9:.2f}",
        )
    return table


def _advice(plan: Plan) -> str:
    context = "" if plan.machine.on_cpu else f" less {CONTEXT / GIB:.0f} GiB for CUDA's context"
    room = (
        f"fits: total is within {gib(plan.machine.usable)} GiB, {USABLE:.0%} of the memory{context}"
    )
    if plan.recommended is None:
        return (
            f"{room}\nnothing fits, not even the shortest utterance alone: take more or larger "
            "GPUs, a smaller LLM, or train.activation_checkpointing=true"
        )
    smaller, key, size = "", "data.microbatch_tokens", plan.budget
    most: int | None = plan.max_batch_tokens
    if plan.plain_utterances is not None:
        key, size = "performance.plain_utterances", plan.plain_utterances
        most = plan.max_plain_utterances
    if not plan.strategies[plan.recommended].fits:
        smaller = (
            f"{key}={size} fits under no strategy; lower it, or set "
            "train.activation_checkpointing=true\n"
        )
    elif "offload" in plan.recommended:
        smaller = (
            "offloading fetches weights over PCIe for each microbatch, which is slow: first try a "
            f"lower {key}, or train.activation_checkpointing=true\n"
        )
    return (
        f"{room}\n{smaller}recommended: {plan.recommended} ({how_to_take(plan.recommended)}), "
        f"with {key} up to {most}"
    )


def plan_text(plan: Plan, *, source: str, as_json_text: bool) -> str:
    return json.dumps(as_json(plan), indent=1) if as_json_text else as_text(plan, source=source)
