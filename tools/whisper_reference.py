"""What a whole Whisper (encoder and decoder) hears in shards, as a reference beside a speech LLM.

python tools/whisper_reference.py openai/whisper-tiny.en exp/demo_data/shards/test
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from rich.console import Console
from rich.progress import track

from speechllm.data.index import open_corpus
from speechllm.data.store import Store
from speechllm.model.hub import resolve
from speechllm.types import SAMPLE_RATE

BATCH = 16


@torch.inference_mode()
def transcribe_shards(model_id: str, shards: Path) -> dict[str, str]:
    """Greedy transcripts by utterance id."""
    logging.set_verbosity_error()  # of its own generation settings, transformers warns each call
    directory = resolve(model_id)
    processor = WhisperProcessor.from_pretrained(directory)
    model = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    corpus = open_corpus([str(shards)])
    store = Store(corpus)
    heard: dict[str, str] = {}
    starts = range(0, len(corpus), BATCH)
    for start in track(starts, description="whisper alone", console=Console(stderr=True)):
        utterances = [store.read(i) for i in range(start, min(start + BATCH, len(corpus)))]
        features = processor(
            [u.samples.astype(np.float32) / 32768 for u in utterances],
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
        ).input_features
        rows = model.generate(features, max_new_tokens=30, do_sample=False, num_beams=1)
        texts = processor.batch_decode(rows, skip_special_tokens=True)
        for utterance, text in zip(utterances, texts, strict=True):
            heard[str(utterance.fields.get("id", utterance.key))] = text.strip()
    return heard


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="hub id or directory of a Whisper model")
    parser.add_argument("shards", type=Path)
    options = parser.parse_args()
    for key, text in transcribe_shards(options.model, options.shards).items():
        print(json.dumps({"id": key, "hyp": text}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
