"""Text from audio files of any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from speechllm.config.schema import Config
from speechllm.data.audio import load_audio
from speechllm.data.collate import collate
from speechllm.decode import load_trained
from speechllm.errors import AudioError
from speechllm.generate import generate
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prepare import TextSide
from speechllm.types import SAMPLE_RATE, Utterance
from speechllm.world import World

LONGEST = 30 * SAMPLE_RATE
SEARCHED = 10 * SAMPLE_RATE  # the last part of a piece, in which a pause is looked for
FRAME = SAMPLE_RATE // 10


@dataclass(frozen=True)
class Transcript:
    """duration: seconds."""

    audio: str
    text: str
    duration: float


def load_files(files: Sequence[str]) -> dict[str, np.ndarray]:
    """Samples of each file, 16 kHz mono int16. Raises AudioError naming the file."""
    audio = {}
    for file in files:
        try:
            audio[file] = load_audio(file)
        except AudioError as error:
            raise AudioError(f"{file}: {error}") from error
    return audio


def transcribe(
    run: Path, audio: Mapping[str, np.ndarray], overrides: Sequence[str], world: World
) -> list[Transcript]:
    """audio: see load_files. Raises CheckpointError where the run has none."""
    config, model, text, _ = load_trained(run, overrides, prefer="best", world=world)
    return [
        Transcript(
            file, _decode(samples, model, text, config, world.device), len(samples) / SAMPLE_RATE
        )
        for file, samples in audio.items()
    ]


def _decode(
    samples_N: np.ndarray, model: SpeechLLM, text: TextSide, config: Config, device: torch.device
) -> str:
    said = []
    for piece in cut_at_pauses(samples_N):
        example = text.prompter.example(Utterance("audio", piece, ""), 0, with_target=False)
        batch = collate([example], text.audio_tokens, pad_id=text.pad_id, pad_left=True)
        rows = generate(
            model,
            batch.to(device),
            max_new_tokens=config.generation.max_new_tokens,
            num_beams=config.generation.num_beams,
            length_penalty=config.generation.length_penalty,
            end_token_ids=(text.prompter.end_token_id,),
            pad_id=text.pad_id,
        )
        said += text.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return " ".join(part.strip() for part in said).strip()


def cut_at_pauses(samples_N: np.ndarray) -> list[np.ndarray]:
    """Pieces of at most 30 s that join to the whole, each cut in the quietest 0.1 s of the last
    10 s that it may have."""
    pieces = []
    while len(samples_N) > LONGEST:
        searched = samples_N[LONGEST - SEARCHED : LONGEST].astype(np.float32)
        loudness = np.square(searched.reshape(-1, FRAME)).mean(axis=1)
        cut = LONGEST - SEARCHED + int(loudness.argmin()) * FRAME + FRAME // 2
        pieces.append(samples_N[:cut])
        samples_N = samples_N[cut:]
    return [*pieces, samples_N]
