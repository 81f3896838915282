"""Where runs stand, from the files that they leave."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from speechllm.checkpoint import complete_checkpoints, read_checkpoint
from speechllm.errors import UserError
from speechllm.report.lines import read_lines, to_json


def summarise(run: Path) -> dict[str, Any]:
    """{"step", "epoch", "loss", "utterances_per_second", "checkpoint", "best": {"step", "score"},
    "evaluation": {...}}, None where there is nothing yet. Raises UserError when it is no run."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run directory (no config.yaml in it)")
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
    last = metrics[-1] if metrics else {}
    checkpoints = complete_checkpoints(run)
    best = read_checkpoint(checkpoints[-1]).progress.best if checkpoints else []
    return {
        "step": last.get("step"),
        "epoch": last.get("epoch"),
        "loss": last.get("loss"),
        "utterances_per_second": last.get("utterances_per_second"),
        "checkpoint": checkpoints[-1].name if checkpoints else None,
        "best": best[0] if best else None,
        "evaluation": evaluations[-1] if evaluations else None,
    }


def report_command(runs: Sequence[Path], as_json: bool) -> str:
    """What `speechllm report` prints."""
    found = {str(run): summarise(run) for run in runs}
    if as_json:
        return to_json(found)
    table = Table("run", "step", "loss", "utt/s", "checkpoint", "best step", "best", "validation")
    for run, about in found.items():
        best, evaluation = about["best"] or {}, about["evaluation"] or {}
        shown = {k: v for k, v in evaluation.items() if k in ("loss", "token_accuracy", "wer")}
        table.add_row(
            run,
            _cell(about["step"]),
            _cell(about["loss"]),
            _cell(about["utterances_per_second"]),
            _cell(about["checkpoint"]),
            _cell(best.get("step")),
            _cell(best.get("score")),
            ", ".join(f"{name} {_cell(value)}" for name, value in shown.items()) or "-",
        )
    out = io.StringIO()
    Console(file=out, width=160).print(table)
    return out.getvalue().rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
