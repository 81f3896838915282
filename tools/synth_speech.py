"""Synthesise a small speech corpus: commands, numbers, names and dates in many voices.

Leaves DIR/{train,validation,test}.jsonl and DIR/audio/SPLIT/ID.flac (16 kHz, mono, 16 bits). No
sentence appears twice, so the splits share none, and no voice of the test split speaks in another
split. The corpus is a function of --count, --seed and --engines, to the byte.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import soundfile
import soxr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from speech_engines import program_speakers, speak
from speech_grammar import sentence
from speech_voices import Speech, Split, draw_speech, speakers

from speechllm.errors import UserError

FORMAT = 2  # raise it when the same arguments come to mean other samples
SETTINGS = "settings.json"
SAMPLE_RATE = 16_000
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SMALLEST = 10
# espeak-ng's state outlives an utterance, so each chunk has a process of its own.
CHUNK = 100
KEPT_SILENCE = 0.1  # seconds left before and after the speech
AUDIBLE = 0.01  # of the peak


@dataclass(frozen=True)
class Item:
    id: str
    split: Split
    text: str
    speech: Speech


def split_sizes(count: int) -> dict[Split, int]:
    """Utterances of each split: 150 to test, validation 3 % but 60 to 200, and neither more than a
    fifth and a tenth of a small corpus."""
    test = min(150, count // 5)
    validation = min(max(round(0.03 * count), 60), 200, count // 10)
    return {"train": count - validation - test, "validation": validation, "test": test}


def plan(count: int, seed: int, programs: tuple[str, ...] = ()) -> list[Item]:
    """What is said, and how: a function of the arguments alone.

    Raises:
        UserError: the grammar has not so many sentences, or the count is too small to split.
    """
    if count < SMALLEST:
        raise UserError(f"--count {count} is too small for three splits: use {SMALLEST} or more")
    draw = random.Random(f"sentences {seed}")
    texts: dict[str, None] = {}
    for _ in range(20 * count):
        texts.setdefault(sentence(draw))
        if len(texts) == count:
            break
    else:
        raise UserError(
            f"--count {count} is more than the grammar gives: it found {len(texts)} sentences"
        )
    # The common sentences are drawn first; without this the splits would differ in kind.
    order = list(texts)
    draw.shuffle(order)
    voices = random.Random(f"voices {seed}")
    items: list[Item] = []
    for split, size in split_sizes(count).items():
        names = speakers(split, programs)
        for index, text in enumerate(order[len(items) : len(items) + size]):
            items.append(Item(f"{split}-{index:06d}", split, text, draw_speech(names, voices)))
    return items


def settings(items: list[Item], count: int, seed: int, engines: str) -> dict[str, object]:
    """What makes two corpora the same."""
    digest = hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()
    return {"format": FORMAT, "count": count, "seed": seed, "engines": engines, "plan": digest}


def trim(samples: np.ndarray, rate: int) -> np.ndarray:
    """Cut leading and trailing silence down to 0.1 s, as far as there is any."""
    loud = np.flatnonzero(np.abs(samples) > AUDIBLE * np.abs(samples).max())
    margin = round(KEPT_SILENCE * rate)
    return samples[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def render(item: Item) -> np.ndarray:
    """int16 [N] at 16 kHz. The level is the voice's own; resampling overshoots are cut off."""
    samples, rate = speak(item.text, item.speech)
    if not samples.any():
        raise UserError(f"{item.speech.speaker} says nothing for {item.text!r}")
    resampled = soxr.resample(trim(samples / 2**15, rate), rate, SAMPLE_RATE)
    return np.clip(np.round(resampled * 2**15), -(2**15), 2**15 - 1).astype(np.int16)


def render_chunk(task: tuple[Path, list[Item]]) -> list[float]:
    """Write the audio of some items below a directory; returns their durations in seconds."""
    directory, items = task
    durations = []
    for item in items:
        samples = render(item)
        path = directory / audio_name(item)
        soundfile.write(path, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        durations.append(len(samples) / SAMPLE_RATE)
    return durations


def audio_name(item: Item) -> str:
    return f"audio/{item.split}/{item.id}.flac"


def render_all(items: list[Item], directory: Path, workers: int) -> Iterator[list[float]]:
    """Durations, chunk by chunk in the order of the items, whatever the number of workers."""
    chunks = [(directory, items[i : i + CHUNK]) for i in range(0, len(items), CHUNK)]
    # "forkserver": a fork of a small clean process, 20 ms against 0.5 s for "spawn".
    context = multiprocessing.get_context("forkserver")
    with context.Pool(min(workers, len(chunks)), maxtasksperchild=1) as pool:
        yield from pool.imap(render_chunk, chunks)


def write_corpus(items: list[Item], directory: Path, workers: int, console: Console) -> list[float]:
    """Audio and manifests into an empty `directory`; returns the durations."""
    for split in SPLITS:
        (directory / "audio" / split).mkdir(parents=True)
    columns = (TextColumn("synthesising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    durations: list[float] = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(items))
        for chunk in render_all(items, directory, workers):
            durations += chunk
            progress.update(bar, completed=len(durations))
    for split in SPLITS:
        lines = [
            json.dumps(manifest_line(item, duration)) + "\n"
            for item, duration in zip(items, durations, strict=True)
            if item.split == split
        ]
        (directory / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return durations


def manifest_line(item: Item, duration: float) -> dict[str, object]:
    return {
        "id": item.id,
        "audio": audio_name(item),
        "text": item.text,
        "speaker": item.speech.speaker,
        "lang": "en",
        "duration": round(duration, 4),
        "rate": item.speech.rate,
        "pitch": item.speech.pitch,
        "pitch_range": item.speech.pitch_range,
    }


def may_reuse(out: Path, wanted: dict[str, object], overwrite: bool) -> bool:
    """Whether `out` is the corpus already.

    Raises:
        UserError: it is something else, and --overwrite does not apply or was not given.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    file = out / SETTINGS
    if not file.is_file():
        raise UserError(f"{out} was not made by this tool: choose another --out")
    found = json.loads(file.read_text(encoding="utf-8"))
    if found == wanted:
        return True
    if not overwrite:
        shown = {key: found.get(key) for key in ("count", "seed", "engines", "format")}
        raise UserError(
            f"{out} holds a corpus of other settings ({shown}): choose another --out or add "
            "--overwrite"
        )
    return False


def synthesise(out: Path, items: list[Item], wanted: dict[str, object], workers: int) -> None:
    """Make the corpus beside `out` and rename it, so that `out` is whole or as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        write_corpus(items, aside / "new", workers, Console(stderr=True))
        (aside / "new" / SETTINGS).write_text(json.dumps(wanted, indent=2) + "\n")
        if out.exists():
            os.rename(out, aside / "old")
        os.rename(aside / "new", out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def summary(items: list[Item], out: Path | None) -> str:
    """A few lines about the corpus; with durations where the manifests are written."""
    lines = []
    for split in SPLITS:
        chosen = [item for item in items if item.split == split]
        voices = len({item.speech.speaker for item in chosen})
        line = f"{split:10} {len(chosen):6d} utterances {voices:4d} voices"
        if out is not None:
            manifest = (out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            seconds = sum(json.loads(entry)["duration"] for entry in manifest)
            line += f" {seconds / 3600:6.2f} h, {seconds / len(chosen):.2f} s each"
        lines.append(line)
    words = [word for item in items for word in item.text.split()]
    lines.append(
        f"vocabulary {len(set(words)):6d} words, {len(words) / len(items):.1f} words a sentence"
    )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python tools/synth_speech.py --out exp/speech --count 8000\n"
        "  python tools/synth_speech.py --out exp/speech --count 8000 --dry-run\n"
        "  python tools/synth_speech.py --out exp/more --count 20000 --seed 1 --num-workers 8",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, required=True, help="utterances of all three splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument(
        "--engines",
        choices=("library", "all"),
        default="library",
        help="library: espeak-ng from the package espeakng-loader, the same speech on every "
        "machine. all: the training split also gets the voices of flite and espeak-ng on the PATH",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a corpus of other settings"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, and stop")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        programs = program_speakers() if options.engines == "all" else ()
        items = plan(options.count, options.seed, programs)
        if options.dry_run:
            print(summary(items, None))
            for item in items[:: max(1, len(items) // 10)]:
                print(f"{item.split:10} {item.speech.speaker:24} {item.text}")
            return 0
        if options.num_workers < 1:
            raise UserError(f"--num-workers is {options.num_workers}, but must be 1 or more")
        out = options.out.absolute()
        wanted = settings(items, options.count, options.seed, options.engines)
        if may_reuse(out, wanted, options.overwrite):
            print(f"{out} is this corpus already", file=sys.stderr)
        else:
            synthesise(out, items, wanted, options.num_workers)
        print(summary(items, out))
    except UserError as error:
        print(f"synth_speech: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
