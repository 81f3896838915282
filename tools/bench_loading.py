"""Audio decoded per core: this loader, webdataset's and HF datasets' pipelines, soundfile alone."""

from __future__ import annotations

import functools
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import datasets

import soundfile
import webdataset
from bench_build import speech_like
from bench_planning import SETTINGS, audio_tokens, seconds_like_librispeech

from speechllm.config.model import LLM, Prompt
from speechllm.data.audio import encode_flac
from speechllm.data.flac import decoder_name
from speechllm.data.index import open_corpus
from speechllm.data.loader import read_batches
from speechllm.data.plan import PlanSettings, plan_epoch
from speechllm.data.prompt import Prompter
from speechllm.data.selection import populate
from speechllm.data.shards import Sample, write_shard
from speechllm.data.store import Store
from speechllm.model.pretrained import load_tokenizer
from speechllm.model.tiny import build_tiny_llm
from speechllm.types import SAMPLE_RATE

_SHARDS = 8
_VOICES = 60  # different recordings; each stands in the shards many times
_BATCH = 16  # of the pipelines that do not bucket: about as many as in a microbatch of 4,096
_BUFFER = 1000  # of their shuffling


def measure_loading(
    *, utterances: int = 1600, rounds: int = 5, num_workers: Sequence[int] = (0, 2)
) -> dict[str, Any]:
    """One epoch of the same shards by each contender, in turns, each time in a new process.

    Counts CPU seconds of the process and its workers, of eight shards less of the first alone, so
    that starting up does not count; the least of the rounds, which other work on the machine
    disturbed least. Everybody gives padded batches of waveforms and texts; this loader tokenises
    and prompts besides. soundfile alone, with as many processes, is the limit of each, but of this
    loader only where it decodes by libsndfile, too (`flac_by`).
    """
    with tempfile.TemporaryDirectory() as directory:
        tars = _write_shards(Path(directory) / "shards", utterances)
        contenders = _contenders(Path(directory), num_workers)
        least: dict[tuple[str, bool], dict[str, float]] = {}
        for part in (tars, tars[:1]):
            _audio_of(tuple(part))  # so that no contender's process has to
        for _ in range(rounds):
            for name, work in contenders.items():
                for whole in (False, True):
                    one = _in_a_process(functools.partial(work, tars if whole else tars[:1]))
                    best = least.setdefault((name, whole), one)
                    least[name, whole] = {key: min(one[key], best[key]) for key in one}
    results = {}
    for name in contenders:
        first, every = least[name, False], least[name, True]
        results[name] = {key: every[key] - first[key] for key in every}
    for name, found in results.items():
        limit = results["".join(["soundfile", *name.partition(",")[1:]])]
        found["audio_hours_per_core_hour"] = found["audio_seconds"] / found["cpu_seconds"]
        found["share_of_soundfile"] = limit["cpu_seconds"] / found["cpu_seconds"]
    about = {"utterances": utterances, "rounds": rounds, "flac_by": decoder_name()}
    return {**about, "contenders": results}


def _write_shards(directory: Path, utterances: int) -> list[str]:
    directory.mkdir()
    random = np.random.default_rng(3)
    seconds = seconds_like_librispeech(min(_VOICES, utterances // 4), 2)
    voices = [speech_like(length, random) for length in seconds]
    encoded = [encode_flac(voice) for voice in voices]
    per_shard = -(-utterances // _SHARDS)
    tars = []
    for shard in range(_SHARDS):
        samples = []
        for i in range(shard * per_shard, min(utterances, (shard + 1) * per_shard)):
            voice = int(random.integers(len(voices)))
            text = "word " * round(3 * seconds[voice])
            duration = len(voices[voice]) / SAMPLE_RATE
            fields = {"id": f"{i:06d}", "text": text.strip(), "speaker": f"s{i % 50}"}
            samples.append(
                Sample(f"{i:06d}", encoded[voice], "flac", fields, duration, SAMPLE_RATE)
            )
        tars.append(str(directory / f"train-{shard:06d}.tar"))
        write_shard(tars[-1], samples)
    return tars


def _contenders(
    directory: Path, num_workers: Sequence[int]
) -> dict[str, Callable[[Sequence[str]], float]]:
    """Each gives the seconds of audio that it has seen in the tars it is given."""
    tokenizer = load_tokenizer(LLM(id=str(build_tiny_llm(directory / "llm"))))
    prompter = Prompter(tokenizer, Prompt(), 0)
    pipelines: dict[str, Callable[[int, Sequence[str]], float]] = {
        "soundfile": _soundfile_alone,
        "speechllm": functools.partial(_ours, prompter),
        "webdataset float32": functools.partial(_webdataset, "float32"),
        "webdataset int16": functools.partial(_webdataset, "int16"),
        "datasets": _datasets,
    }
    contenders: dict[str, Callable[[Sequence[str]], float]] = {}
    for workers in num_workers:
        suffix = f", {workers} workers" if workers else ""
        for name, work in pipelines.items():
            contenders[name + suffix] = functools.partial(_with_workers, work, workers)
    return contenders


def _with_workers(
    work: Callable[[int, Sequence[str]], float], workers: int, tars: Sequence[str]
) -> float:
    return work(workers, tars)


def _soundfile_alone(workers: int, tars: Sequence[str]) -> float:
    """Every audio file is decoded from memory, and nothing else is done with it."""
    audio = _audio_of(tuple(tars))
    if not workers:
        return _decode_all(audio)
    parts = [audio[part::workers] for part in range(workers)]
    children = [_start(functools.partial(_decode_all, part)) for part in parts]
    return sum(_finish(child)[0] for child in children)


@functools.cache
def _audio_of(tars: tuple[str, ...]) -> list[bytes]:
    store = Store(open_corpus(tars))
    return [store.read_raw(store.corpus.location(i))[0] for i in range(len(store.corpus))]


def _decode_all(audio: Sequence[bytes]) -> float:
    return sum(len(soundfile.read(io.BytesIO(one), dtype="int16")[0]) for one in audio) / 16_000


def _ours(prompter: Prompter, workers: int, tars: Sequence[str]) -> float:
    corpus = open_corpus(tars)
    found = populate(corpus, audio_tokens, SETTINGS)
    settings = PlanSettings(1, SETTINGS.budget, 1, 20_000)
    plan = plan_epoch(
        corpus.shard_sizes, found.costs, found.selection.kept, settings, 0, found.table
    )
    microbatches = read_batches(
        Store(corpus),
        prompter,
        lambda samples: int(audio_tokens(np.array(samples))),
        0,
        [one for step in range(plan.num_steps) for one in plan.step(step)],
        with_target=True,
        pad_left=False,
        num_workers=workers,
        prefetch=4,
    )
    return sum(microbatch.audio_seconds for microbatch in microbatches)


def _webdataset(dtype: str, workers: int, tars: Sequence[str]) -> float:
    def decode(key: str, data: bytes) -> Any:
        if not key.endswith("flac"):
            return None
        return soundfile.read(io.BytesIO(data), dtype=dtype)[0]

    pipeline = (
        webdataset.WebDataset(list(tars), shardshuffle=len(tars), empty_check=False)
        .shuffle(_BUFFER)
        .decode(decode)
        .to_tuple("flac", "json")
        .batched(_BATCH, collation_fn=_collate)
    )
    loader = webdataset.WebLoader(
        pipeline, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    return sum(int(lengths.sum()) for _, lengths, _ in loader) / SAMPLE_RATE


def _datasets(workers: int, tars: Sequence[str]) -> float:
    text = datasets.Value("string")
    # As bytes: its own audio feature needs torchcodec, which needs FFmpeg.
    features = {
        "__key__": text,
        "__url__": text,
        "flac": datasets.Value("binary"),
        "json": {"id": text, "text": text, "speaker": text},
    }
    rows = datasets.load_dataset(
        "webdataset",
        data_files={"train": list(tars)},
        split="train",
        streaming=True,
        features=datasets.Features(features),
    ).shuffle(0, buffer_size=_BUFFER)

    def collate(batch: Iterable[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        return _collate(
            [
                (soundfile.read(io.BytesIO(row["flac"]), dtype="int16")[0], row["json"])
                for row in batch
            ]
        )

    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_size=_BATCH,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    return sum(int(lengths.sum()) for _, lengths, _ in loader) / SAMPLE_RATE


def _collate(
    samples: Sequence[tuple[np.ndarray, Any]],
) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Padded waveforms, their lengths, metadata."""
    waves = [torch.from_numpy(wave) for wave, _ in samples]
    lengths = torch.tensor([len(wave) for wave in waves])
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    return padded, lengths, [metadata for _, metadata in samples]


def _in_a_process(work: Callable[[], float]) -> dict[str, float]:
    """What it gives, wall and CPU seconds, those of the processes it started included."""
    began = time.perf_counter()
    seconds, cpu = _finish(_start(work))
    return {
        "audio_seconds": seconds,
        "wall_seconds": time.perf_counter() - began,
        "cpu_seconds": cpu,
    }


def _start(work: Callable[[], float]) -> tuple[int, int]:
    """A forked process that will write what `work` gives: its id, and where to read that."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        torch.set_num_threads(1)
        os.write(writer, repr(work()).encode())
        os._exit(0)
    os.close(writer)
    return pid, reader


def _finish(child: tuple[int, int]) -> tuple[float, float]:
    """What it gave, and its CPU seconds."""
    pid, reader = child
    with os.fdopen(reader) as file:
        text = file.read()
    _, status, used = os.wait4(pid, 0)
    if status or not text:
        raise SystemExit(f"a contender ended with status {os.waitstatus_to_exitcode(status)}")
    return float(text), used.ru_utime + used.ru_stime
