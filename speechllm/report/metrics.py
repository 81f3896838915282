"""metrics.jsonl, evaluations.jsonl and TensorBoard, each cut back to where a resumed run starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from speechllm.report.lines import read_lines


class Metrics:
    """Only rank 0 has one.

    A run that was killed may have logged steps after its last checkpoint; it will take them again,
    so they are removed first: each step stands in the files once.
    """

    def __init__(self, run_dir: Path, *, from_step: int) -> None:
        self.run_dir = run_dir
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            _cut(run_dir / name, from_step)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=from_step + 1)

    def training(self, values: dict[str, Any]) -> None:
        """One logged step; `values` holds at least `step`."""
        self._write("metrics.jsonl", "train", values)

    def evaluation(self, values: dict[str, Any]) -> None:
        self._write("evaluations.jsonl", "validation", values)

    def close(self) -> None:
        self._board.close()

    def _write(self, name: str, group: str, values: dict[str, Any]) -> None:
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for key, value in values.items():
            if key != "step" and not isinstance(value, str):
                self._board.add_scalar(f"{group}/{key}", value, values["step"])


def _cut(path: Path, from_step: int) -> None:
    if path.is_file():
        kept = [line for line in read_lines(path) if line["step"] <= from_step]
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        aside.replace(path)
