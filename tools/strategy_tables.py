"""What the planner says of two models on 1, 8 and 64 GPUs: the tables of docs/strategies.md."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from speechllm.config import model as schema
from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.planner.advice import GIB, Machine, Plan, make_plan
from speechllm.planner.architecture import Architecture, read_architecture
from speechllm.planner.command import ASSUMED
from speechllm.planner.memory import STRATEGIES
from speechllm.planner.table import as_json, as_text
from speechllm.planner.workload import assumed

CONFIG = Path(__file__).parent.parent / "configs" / "whisper-large-v3_olmo2-1b_pre_norm.yaml"
STEP = "data.microbatches_per_step=64"
LLAMA = "model.llm.id=meta-llama/Llama-3.1-8B-Instruct"
CASES = {
    "OLMo-2 1B": [STEP],
    "Llama-3.1 8B": [STEP, LLAMA],
    "Llama-3.1 8B, checkpointing": [STEP, LLAMA, "train.activation_checkpointing=true"],
}
GPUS, MEMORIES = (1, 8, 64), (24, 40, 80)


@lru_cache
def _architecture(model: schema.Model) -> Architecture:
    return read_architecture(model)


def _plan(config: Config, gpus: int, memory: int) -> Plan:
    machine = Machine(gpus, memory * GIB, on_cpu=False)
    return make_plan(config, _architecture(config.model), machine, assumed(config))


def tables() -> str:
    """Two compact tables out of the planner's JSON, and one whole table as it prints it."""
    sizes = [f"| Whisper large-v3 + | GPUs | {' | '.join(STRATEGIES)} |", "|---|--:|" + "--:|" * 6]
    advice = ["| Whisper large-v3 + | GPUs | 24 GB | 40 GB | 80 GB |", "|---|--:|---|---|---|"]
    for name, overrides in CASES.items():
        config = load_config(str(CONFIG), overrides)
        for gpus in GPUS:
            found = {memory: as_json(_plan(config, gpus, memory)) for memory in MEMORIES}
            entries = found[24]["strategies"].items()
            sizes.append(f"| {name} | {gpus} | {' | '.join(_size(e) for _, e in entries)} |")
            cells = " | ".join(_advice(found[memory]) for memory in MEMORIES)
            advice.append(f"| {name} | {gpus} | {cells} |")
    whole = as_text(_plan(load_config(str(CONFIG), CASES["Llama-3.1 8B"]), 8, 80), source=ASSUMED)
    return (
        "Predicted GiB of tensors a rank / GB that a rank sends in a step:\n\n"
        + "\n".join(sizes)
        + "\n\nRecommended, and the largest `data.microbatch_tokens` under it:\n\n"
        + "\n".join(advice)
        + f"\n\nThe whole output for Llama-3.1 8B on 8 GPUs of 80 GB:\n\n```\n{whole}\n```\n"
    )


def _size(entry: dict[str, Any]) -> str:
    return f"{entry['bytes_per_rank'] / GIB:.1f} / {entry['bytes_on_wire_per_step'] / 1e9:.1f}"


def _advice(found: dict[str, Any]) -> str:
    name = found["recommended"]
    if name is None:
        return "nothing fits"
    lowered = "" if found["strategies"][name]["fits"] else " (lower than set)"
    return f"{name}, {found['max_batch_tokens']}{lowered}"
