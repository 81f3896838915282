"""Tars of audio without texts, as banks of noises and impulse responses are."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

import soundfile


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_banks(directory: Path) -> Path:
    """DIRECTORY/noise.tar with five noises and DIRECTORY/rooms.tar with three responses."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    noises = [random.normal(0, 2_000, 4_000 + 3_000 * i).astype(np.int16) for i in range(5)]
    rooms = [np.exp(-np.arange(800) / (50 + 50 * i)) * 20_000 for i in range(3)]
    write_tar(directory / "noise.tar", {f"{i}.wav": wav(n) for i, n in enumerate(noises)})
    write_tar(
        directory / "rooms.tar", {f"{i}.wav": wav(r.astype(np.int16)) for i, r in enumerate(rooms)}
    )
    return directory
