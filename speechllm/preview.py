"""Examples of the configured augmentation, to listen to before a run is started."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import soundfile

from speechllm.config.data import Augmentation
from speechllm.config.schema import Config
from speechllm.data.augment import is_on
from speechllm.data.augmenter import Augmenter
from speechllm.data.store import Store
from speechllm.errors import ConfigError
from speechllm.model.frontend import LogMel
from speechllm.model.specaugment import mask_features, mean_of_rows
from speechllm.types import SAMPLE_RATE, SpecMasks, Utterance

EXAMPLES = 4
EPOCHS = 3  # of which the index tells what is drawn
MELS = 80
INDEX = "index.json"
ORIGINAL, TOGETHER = "original", "together"


def write_preview(config: Config, store: Store, kept: np.ndarray, directory: Path) -> int:
    """Some training utterances as wav files: as they are, with each configured augmentation alone,
    and with all of them together; the masks of SpecAugment as pictures of the features.

    What is shown is drawn as for epoch 0, but happens for certain. DIRECTORY/index.json says what
    was drawn, and what each utterance really gets in the first epochs. Returns their number.

    Raises:
        ConfigError: no augmentation is on, or the directory is in use or cannot be made.
        DataError: an utterance, a noise or an impulse response cannot be read.
    """
    settings = config.data.augmentation
    if not is_on(settings):
        raise ConfigError(
            "--preview: data.augmentation is off; set a probability, as in "
            "data.augmentation.spec.probability=0.5"
        )
    _make_empty(directory)
    names = [n for n in type(settings).model_fields if getattr(settings, n).probability > 0]
    shown = {name: Augmenter(_only(settings, [name]), config.seed) for name in names}
    if len(names) > 1:
        shown[TOGETHER] = Augmenter(_only(settings, names), config.seed)
    real = Augmenter(settings, config.seed)
    chosen = kept[np.arange(min(EXAMPLES, len(kept))) * len(kept) // min(EXAMPLES, len(kept))]
    index = []
    for place, number in enumerate(chosen.tolist()):
        utterance = store.read(number)
        folder = directory / f"{place:02d}"
        folder.mkdir(parents=True)
        files: dict[str, Any] = {ORIGINAL: {"files": _write(folder, ORIGINAL, utterance, None)}}
        for name, augmenter in shown.items():
            augmented, masks = augmenter(utterance, 0)
            files[name] = {
                "files": _write(folder, name, augmented, masks),
                "drawn": augmenter.describe(augmenter.choice(utterance.key, 0)),
            }
            if masks is not None:
                files[name]["drawn"]["spec"] = {
                    "seconds": (masks.times_G2 / 100).tolist(),
                    "parts of the mel axis": masks.bands_H2.round(3).tolist(),
                }
        drawn = {epoch: real.describe(real.choice(utterance.key, epoch)) for epoch in range(EPOCHS)}
        about = {"folder": folder.name, "key": utterance.key, "text": utterance.text}
        index.append({**about, "examples": files, "epochs": drawn})
    text = json.dumps(index, ensure_ascii=False, indent=1)
    (directory / INDEX).write_text(text + "\n", encoding="utf-8")
    return len(index)


def _make_empty(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        in_use = any(directory.iterdir())
    except OSError as error:
        raise ConfigError(
            f"--preview {directory}: cannot be made ({error.strerror}); name a new directory"
        ) from error
    if in_use:
        raise ConfigError(f"--preview {directory}: is not empty; name a new directory")


def _only(settings: Augmentation, names: Sequence[str]) -> Augmentation:
    """These augmentations for certain, the others not at all."""
    return settings.model_copy(
        update={
            name: getattr(settings, name).model_copy(update={"probability": float(name in names)})
            for name in type(settings).model_fields
        }
    )


def _write(folder: Path, name: str, utterance: Utterance, masks: SpecMasks | None) -> list[str]:
    """NAME.wav, except for SpecAugment alone, which leaves it as it was; NAME.png of the features
    where there are masks and of the original. Returns the file names."""
    written = []
    if name != "spec":
        soundfile.write(folder / f"{name}.wav", utterance.samples, SAMPLE_RATE, subtype="PCM_16")
        written.append(f"{name}.wav")
    if masks is not None or name == ORIGINAL:
        (folder / f"{name}.png").write_bytes(_png(_picture(utterance.samples, masks)))
        written.append(f"{name}.png")
    return written


def _picture(samples: np.ndarray, masks: SpecMasks | None) -> np.ndarray:
    """uint8 [mel bins, mel frames]: the features that the encoder gets, low bins at the bottom."""
    audio_1N = torch.from_numpy(np.ascontiguousarray(samples))[None]
    mel_1FM, counts_1 = LogMel(MELS)(audio_1N, torch.tensor([len(samples)]))
    if masks is not None:
        batched = SpecMasks(*(torch.from_numpy(field)[None] for field in masks))
        mel_1FM = mask_features(mel_1FM, counts_1, batched, mean_of_rows(mel_1FM, counts_1))
    low, high = mel_1FM.min(), mel_1FM.max()
    shades_1FM = (mel_1FM - low) * (255 / (high - low).clamp(min=1e-6))
    return shades_1FM[0].flip(0).round().byte().numpy()


def _png(pixels_HW: np.ndarray) -> bytes:
    """A grey picture as PNG (ISO/IEC 15948)."""
    height, width = pixels_HW.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = np.pad(pixels_HW, ((0, 0), (1, 0)))  # each starts with the number of its filter: none
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
