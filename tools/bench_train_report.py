"""From what the processes measured to the result, and to tables."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench_train_ways import FULL, PLAIN, Way
from rich.console import Console
from rich.table import Table

Found = Mapping[str, Any]


def machine() -> dict[str, Any]:
    """Processor, cores of this process, GPUs, versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    wide = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [name for name in wide if torch.cpu.get_capabilities().get(name)],
        "gpus": gpus,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def way_result(rounds: Sequence[Found], peaks: Sequence[Found]) -> dict[str, Any]:
    """Medians over the rounds. peaks: of the matrix products, measured in the same rounds."""
    speeds = [found["utterances"] / found["seconds"] for found in rounds]
    last = rounds[-1]
    # A process's peak never falls, and after the first round it has looked at the LLM alone.
    peak, predicted = rounds[0]["peak_rss_bytes"], rounds[0]["predicted_bytes"]
    needed, run = (_parts(last, kind) for kind in ("flops", "run"))

    def middle(value: Callable[[Found], float]) -> float:
        return median(value(found) for found in rounds)

    def used(peak: str) -> float:
        return median(
            sum(needed.values()) / found["seconds"] / gemm[peak]
            for found, gemm in zip(rounds, peaks, strict=False)
        )

    steps = last["steps"]
    return {
        "utterances_per_second": median(speeds),
        "rounds": speeds,
        "audio_seconds_per_second": middle(lambda f: f["audio_seconds"] / f["seconds"]),
        "target_tokens_per_second": middle(lambda f: f["target_tokens"] / f["seconds"]),
        "mfu": used("own") if peaks else None,
        "mfu_of_best_gemm": used("best") if peaks else None,
        "padding_fraction": 1 - last["positions_real"] / last["positions_run"],
        "data_wait_fraction": middle(lambda f: f["phases"]["load"] * steps / f["seconds"]),
        "peak_rss_bytes": peak,
        "load_peak_rss_bytes": last["load_peak_rss_bytes"],
        "peak_device_bytes": last["peak_device_bytes"],
        "predicted_bytes": predicted,
        "peak_over_predicted": peak / predicted,
        "phases": {n: middle(lambda f: f["phases"][n]) for n in last["phases"]},  # noqa: B023
        "details": {n: middle(lambda f: f["details"][n]) for n in last["details"]},  # noqa: B023
        "step_seconds": middle(lambda f: f["seconds"] / steps),
        "steps": steps,
        "utterances": last["utterances"],
        "llm_positions_per_step": _pair(last, "positions_run", "positions_useful"),
        "encoder_frames_per_step": _pair(last, "frames_run", "frames_real"),
        "flops_per_step": {name: value / steps for name, value in needed.items()},
        "flops_run_per_step": {name: value / steps for name, value in run.items()},
        "loss": last["loss"],
        "watts": last["watts"],
        "settings": last["settings"],
    }


def _parts(found: Found, kind: str) -> dict[str, float]:
    return {
        name.partition(".")[2]: value
        for name, value in found.items()
        if name.startswith(f"{kind}.")
    }


def _pair(found: Found, run: str, needed: str) -> dict[str, float]:
    steps = found["steps"]
    return {"run": found[run] / steps, "needed": found[needed] / steps}


def ablation(ways: Sequence[Way], rounds: Mapping[str, Sequence[Found]]) -> list[dict[str, Any]]:
    """ratio: to the first way; gain: to the way before; both within a round."""
    entries = []
    for number, way in enumerate(ways):
        speeds = [found["utterances"] / found["seconds"] for found in rounds[way.name]]
        entries.append(
            {
                "added": way.added,
                "utterances_per_second": median(speeds),
                "ratio": _ratio(rounds, way.name, ways[0].name),
                "gain": _ratio(rounds, way.name, ways[max(number - 1, 0)].name),
                "loss": rounds[way.name][-1]["loss"],
            }
        )
    return entries


def _ratio(rounds: Mapping[str, Sequence[Found]], way: str, other: str) -> float:
    pairs = zip(rounds[way], rounds[other], strict=True)
    return median(b["seconds"] / a["seconds"] for a, b in pairs)


def equal_loss(ways: Sequence[Way], rounds: Mapping[str, Sequence[Found]]) -> dict[str, float]:
    """Losses of the same utterances under the same weights, nats a token, and how far they lie
    apart in parts of themselves: plain and full, of which the one sees 30 s of audio and the other
    what there is; and all ways that see the same audio as full, which are to be equal."""
    losses = {way.name: rounds[way.name][-1]["loss"] for way in ways}
    contexts = {way.name: rounds[way.name][-1]["settings"]["context"] for way in ways}
    full = losses[ways[-1].name]
    same = [losses[name] for name in losses if contexts[name] == contexts[ways[-1].name]]
    return {
        "plain": losses[ways[0].name],
        "full": full,
        "difference": abs(losses[ways[0].name] - full) / abs(full),
        "difference_in_same_context": max(abs(loss - full) for loss in same) / abs(full),
    }


def show(result: dict[str, Any]) -> None:
    console = Console(stderr=True, width=110)
    title = f"mean of {result['speech']['mean']:.1f} s; median of {len(result['gemm'])} rounds"
    table = Table("added", "utterances/s", "of plain", "gain", "loss", title=title)
    for entry in result["ablation"]:
        table.add_row(
            entry["added"],
            f"{entry['utterances_per_second']:.3g}",
            f"{entry['ratio']:.2f}",
            f"{entry['gain']:.2f}",
            f"{entry['loss']:.5f}",
        )
    console.print(table)
    names = [name for name in (PLAIN, FULL) if name in result]
    table = Table("", *names, title="per step")
    for phase in result[names[-1]]["phases"]:
        table.add_row(f"{phase}, s", *(f"{result[n]['phases'][phase]:.3f}" for n in names))
    for label, value in _ROWS:
        table.add_row(label, *(value(result[name]) for name in names))
    console.print(table)
    for entry in result.get("llm", ()):
        console.print(
            f"LLM forward and backward, {entry['positions']} positions in {entry['shapes']}: "
            f"{entry['mfu']:.0%} of its products' peak, {entry['gemm_peak_flops'] / 1e9:.0f} "
            f"GFLOP/s; forward {entry['forward_seconds']:.2f} s, backward "
            f"{entry['backward_seconds']:.2f} s"
        )
    best = result["gemm_best_flops"]
    if best:
        console.print(f"the machine's best product: {best / 1e9:.0f} GFLOP/s")
    if "checkpoint" in result:
        stall = result["checkpoint"]["stall_steps"]
        console.print(f"a checkpoint stalls the loop for {stall:.2f} steps")
    for name, entry in result.get("precision", {}).items():
        console.print(f"{name}: {entry['utterances_per_second']:.3g} utterances/s (the shortest)")
    if result.get("strategies"):
        table = Table("strategy", "ranks", "utterances/s", "communication, s/step", "loss")
        for entry in result["strategies"]:
            table.add_row(
                entry["strategy"],
                str(entry["world"]),
                f"{entry['utterances_per_second']:.3g}",
                f"{entry['phases']['communication']:.3f}",
                f"{entry['loss']:.5f}",
            )
        console.print(table)


def _gflops(found: Found) -> str:
    run, needed = (sum(found[k].values()) for k in ("flops_run_per_step", "flops_per_step"))
    return f"{run / 1e9:.0f} / {needed / 1e9:.0f}"


def _percent(key: str) -> Callable[[Found], str]:
    return lambda found: "-" if found[key] is None else f"{found[key]:.1%}"


def _positions(key: str) -> Callable[[Found], str]:
    return lambda found: f"{found[key]['run']:.0f} / {found[key]['needed']:.0f}"


_ROWS: tuple[tuple[str, Callable[[Found], str]], ...] = (
    ("step, s", lambda found: f"{found['step_seconds']:.3f}"),
    ("of backward: the LLM's layers, s", lambda found: f"{found['details']['llm_backward']:.3f}"),
    ("GFLOP run / needed", _gflops),
    ("LLM positions run / needed", _positions("llm_positions_per_step")),
    ("encoder frames run / needed", _positions("encoder_frames_per_step")),
    ("audio s/s", lambda found: f"{found['audio_seconds_per_second']:.1f}"),
    ("target tokens/s", lambda found: f"{found['target_tokens_per_second']:.1f}"),
    ("of the products' peak", _percent("mfu")),
    ("of the machine's best product", _percent("mfu_of_best_gemm")),
    ("padding", _percent("padding_fraction")),
    ("wait for data", _percent("data_wait_fraction")),
    ("peak resident, MB", lambda found: f"{found['peak_rss_bytes'] / 1e6:.0f}"),
    ("of what the planner predicts", lambda found: f"{found['peak_over_predicted']:.2f}"),
)
