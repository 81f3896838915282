"""Choosing by what was measured on this machine, and remembering it.

One JSON file for each thing that was measured, below the user's cache directory, so that two runs
on one machine choose alike. The files can be removed at any time: what they hold is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import transformers

from speechllm.log import logger

MARGIN = 0.10  # what another choice must be faster by: less is noise


def preferred(usual: str, seconds: Mapping[str, float]) -> str:
    """The fastest where it beats the usual choice by MARGIN, else the usual one."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] * (1 + MARGIN) <= seconds[usual] else usual


def remembered_seconds(
    about: Mapping[str, Any], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """What `measure` gives, or what it gave before for the same `about` (JSON-able)."""
    text = json.dumps(about, sort_keys=True)
    file = speed_directory() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    try:
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return found
    except (OSError, ValueError, KeyError, TypeError):
        seconds = measure()
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(
            json.dumps({"about": json.loads(text), "seconds": seconds}, indent=1), encoding="utf-8"
        )
        aside.replace(file)
    except OSError as error:
        logger.info("what was measured cannot be remembered: %s", error)
    return seconds


def speed_directory() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "speechllm" / "speed"


def machine_name(device: torch.device) -> dict[str, str]:
    """What a measured time holds for: device, threads, versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    """As the kernel calls it, with torch's own word for its vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
