"""Decoding speed: the plain path and each shortcut, against batch size and beam.

Every way to decode hears the same utterances, in turns within one process. The plain path pads to
30 s, takes utterances eight at a time as they come and uses transformers' own `generate`
(`performance.preset: plain`); then come, one after the other, the encoder as configured, batches by
length, the decoding loop of this package, and the prompt's keys and values once a run. JSON goes to
standard output, tables and progress to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench_speech import MARKER, speech_shards
from bench_train_report import machine
from rich.console import Console
from rich.table import Table
from shard_console import run

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.loader import read_batches
from speechllm.decode import decoded_together, load_trained
from speechllm.generate import generate
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prepare import Split, TextSide, open_split, prepare_model, prepare_text
from speechllm.settle import settle
from speechllm.types import Microbatch
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
PLAIN, TRANSFORMERS, FULL = "plain", "batches by length", "full"
Texts = dict[int, list[int]]  # number of an utterance -> token ids
EXAMPLES = """\
examples (as they stand after `make demo`):
  python tools/bench_decode.py exp/demo --mean-seconds 2 --source exp/demo_data/shards/test
  python tools/bench_decode.py configs/demo.yaml --mean-seconds 6.5 --json exp/bench_decode.json
  python tools/bench_decode.py configs/demo.yaml model.prompt.kind=chat \\
      'model.prompt.texts=["Transcribe the speech to text: {audio}"]' --beams 1 --batches 1,8,32

A run's directory is decoded with its trained weights, until it says an end token. A configuration
has no trained weights: a batch is decoded until the longest of its texts would have been said.
"""


@dataclass(frozen=True)
class Way:
    """added: by what it differs from the one before."""

    name: str
    added: str
    model: SpeechLLM
    config: Config
    microbatches: list[np.ndarray]
    plain: bool


class Bench:
    """What all ways decode, and how long their outputs are."""

    def __init__(self, split: Split, text: TextSide, longest: int, *, trained: bool) -> None:
        self.split, self.text, self.longest, self.trained = split, text, longest, trained
        numbers = split.selection.kept
        self.seconds = float(split.corpus.durations[numbers].sum())
        self.lengths = {
            int(number): len(
                text.tokenizer(
                    split.store.read(int(number)).text, add_special_tokens=False
                ).input_ids
            )
            for number in numbers
        }

    def decode(self, way: Way, num_beams: int) -> tuple[float, Texts]:
        """Seconds, with reading, and what was said; a first microbatch is decoded uncounted."""
        self._rows(way, num_beams, way.microbatches[:1])
        begun = time.perf_counter()
        said = self._rows(way, num_beams, way.microbatches)
        return time.perf_counter() - begun, said

    def _rows(self, way: Way, num_beams: int, microbatches: Sequence[np.ndarray]) -> Texts:
        said: Texts = {}
        batches = read_batches(
            self.split.store, self.text.prompter, self.text.audio_tokens, self.text.pad_id,
            microbatches, with_target=False, pad_left=True,
            num_workers=way.config.data.num_workers, prefetch=way.config.data.prefetch,
        )  # fmt: skip
        for numbers, microbatch in zip(microbatches, batches, strict=True):
            rows = self._generate(way, num_beams, numbers, microbatch)
            said |= dict(zip(numbers.tolist(), rows, strict=True))
        return said

    def _generate(
        self, way: Way, num_beams: int, numbers: np.ndarray, microbatch: Microbatch
    ) -> list[list[int]]:
        longest, end = self.longest, self.text.prompter.end_token_id
        if not self.trained:
            longest = 1 + max(self.lengths[number] for number in numbers.tolist())
            end = way.model.llm.config.vocab_size  # no token, so nothing ends before
        return generate(
            way.model,
            microbatch.batch.to(ALONE.device),
            max_new_tokens=longest,
            num_beams=num_beams,
            length_penalty=way.config.generation.length_penalty,
            end_token_ids=(end,),
            pad_id=self.text.pad_id,
            plain=way.plain,
        )

    def tokens(self, said: Texts) -> int:
        """With the end of each utterance."""
        if self.trained:
            return sum(len(row) + 1 for row in said.values())
        return sum(self.lengths[number] + 1 for number in said)

    def result(self, seconds: float, said: Texts) -> dict[str, float]:
        return {
            "utterances_per_second": len(said) / seconds,
            "tokens_per_second": self.tokens(said) / seconds,
            "real_time_factor": seconds / self.seconds,
            "tokens": self.tokens(said),
        }


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    trained = Path(options.subject).is_dir()
    common = ["data.num_workers=0", *options.overrides]
    config, model, text = load(options.subject, common)
    sources = options.source or [p for p in config.data.train if Path(p).exists()]
    speech = speech_shards(
        options.mean_seconds, options.count, source=sources, cache=options.speech_cache
    )
    budget = config.generation.microbatch_tokens
    split = open_split(config, [str(speech)], text, key="the speech", budget=budget)
    bench = Bench(split, text, config.generation.max_new_tokens, trained=trained)
    every = ways(options.subject, common, config, model, split)
    found = [compare(bench, every, beams, options.rounds) for beams in options.beams]
    sizes = [
        {"num_beams": beams, **size}
        for beams in options.beams
        for size in by_batch_size(bench, every[-1], options.batches, beams)
    ]
    result = {
        "mean_seconds": options.mean_seconds,
        **found[0],
        "beams": found,
        "batches": sizes,
        "lengths": "as said" if trained else "of the longest text of a batch",
        "precision": config.precision,
        "speech": json.loads((speech / MARKER).read_text(encoding="utf-8")),
        "machine": machine(),
        "command": " ".join(["python tools/bench_decode.py", *arguments]),
    }
    show(result)
    written = json.dumps(result, indent=1)
    print(written)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(written + "\n", encoding="utf-8")
    return 0


def load(subject: str, overrides: Sequence[str]) -> tuple[Config, SpeechLLM, TextSide]:
    """A run's directory with its trained weights, or a configuration with the first ones."""
    if Path(subject).is_dir():
        config, model, text, _ = load_trained(Path(subject), overrides, prefer="best", world=ALONE)
        return config, model, text
    config = settle(load_config(subject, overrides), ALONE.device)
    text = prepare_text(config)
    return config, prepare_model(config, ALONE.device, prefix=text.prefix).eval(), text


def ways(
    subject: str, common: Sequence[str], config: Config, model: SpeechLLM, split: Split
) -> list[Way]:
    """From the plain path to `config`, which is that of `model`."""
    plain_config, plain, _ = load(subject, [*common, "performance.preset=plain"])
    numbers = split.selection.kept
    few = decoded_together(plain_config, split.costs, numbers)
    by_length = decoded_together(config, split.costs, numbers)
    chain = [
        Way(PLAIN, "plain path", plain, plain_config, few, plain=True),
        Way("encoder", "the encoder as configured", model, config, few, plain=True),
        Way(TRANSFORMERS, "batches by length", model, config, by_length, plain=True),
    ]
    if len(prepare_text(config).prefix) and config.performance.prefix_cache != "off":
        without_config, without, _ = load(subject, [*common, "performance.prefix_cache=off"])
        chain += [
            Way("loop", "own loop", without, without_config, by_length, plain=False),
            Way(FULL, "prefix once a run", model, config, by_length, plain=False),
        ]
    else:
        chain.append(Way(FULL, "own loop", model, config, by_length, plain=False))
    return chain


def compare(bench: Bench, every: Sequence[Way], num_beams: int, rounds: int) -> dict[str, Any]:
    """Every way in turn, `rounds` times; ratios are those within a round."""
    seconds: dict[str, list[float]] = {way.name: [] for way in every}
    said: dict[str, Texts] = {}
    for number in range(rounds):
        for way in every if number % 2 == 0 else reversed(every):
            spent, said[way.name] = bench.decode(way, num_beams)
            seconds[way.name].append(spent)
            speed = len(said[way.name]) / spent
            say(f"{num_beams} beams, round {number + 1}: {way.added}: {speed:.3g} utterances/s")
    entries = []
    for before, way in zip([every[0], *every], every, strict=False):
        pairs = zip(seconds[before.name], seconds[way.name], strict=True)
        speed = len(said[way.name]) / median(seconds[way.name])
        ratio = median(slow / fast for slow, fast in pairs)
        entries.append({"added": way.added, "utterances_per_second": speed, "ratio": ratio})
    ends = zip(seconds[PLAIN], seconds[FULL], strict=True)
    results = {n: bench.result(median(seconds[n]), said[n]) for n in (PLAIN, TRANSFORMERS, FULL)}
    return {
        "num_beams": num_beams,
        "plain": results[PLAIN],
        "full": results[FULL],
        "speedup": median(slow / fast for slow, fast in ends),
        "ablation": entries,
        # The same model and batches; the plain path hears 30 s and may understand otherwise.
        "equal_text": equal(said[FULL], said[TRANSFORMERS]),
        "equal_text_to_plain": equal(said[FULL], said[PLAIN]) if bench.trained else None,
    }


def equal(one: Texts, other: Texts) -> float:
    """The part of the utterances of which both say the same."""
    return sum(one[number] == other[number] for number in one) / len(one)


def by_batch_size(
    bench: Bench, way: Way, sizes: Sequence[int], num_beams: int
) -> list[dict[str, Any]]:
    """So many utterances of like length at a time."""
    numbers = np.concatenate(way.microbatches)
    found = []
    for size in sizes:
        cut = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        of_size = Way(way.name, way.added, way.model, way.config, cut, plain=way.plain)
        seconds, said = bench.decode(of_size, num_beams)
        found.append({"batch": size, **bench.result(seconds, said)})
        say(f"{num_beams} beams, {size} at a time: {found[-1]['tokens_per_second']:.3g} tokens/s")
    return found


def show(result: dict[str, Any]) -> None:
    console = Console(stderr=True)
    for found in result["beams"]:
        title = f"{found['num_beams']} beams, {result['mean_seconds']:g} s on average"
        table = Table("", "utterances/s", "ratio", title=title)
        for entry in found["ablation"]:
            speed = f"{entry['utterances_per_second']:.3g}"
            table.add_row(entry["added"], speed, f"{entry['ratio']:.2f}")
        table.add_row("all of it", "", f"{found['speedup']:.2f}")
        console.print(table)
        console.print(f"text equal to transformers': {100 * found['equal_text']:.1f} %")
    table = Table("beams", "batch", "utterances/s", "tokens/s", "seconds per second of audio")
    for size in result["batches"]:
        table.add_row(
            str(size["num_beams"]),
            str(size["batch"]),
            f"{size['utterances_per_second']:.3g}",
            f"{size['tokens_per_second']:.3g}",
            f"{size['real_time_factor']:.3g}",
        )
    console.print(table)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", metavar="CONFIG|RUN", help="YAML file, or a run's directory")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="overrides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument(
        "--mean-seconds", type=float, default=6.5, help="of the utterances (default: 6.5)"
    )
    parser.add_argument("--count", type=int, default=48, help="utterances (default: 48)")
    parser.add_argument("--beams", type=numbers, default=[1, 3], help="default: 1,3")
    parser.add_argument(
        "--batches", type=numbers, default=[1, 8, 32], metavar="N,N", help="default: 1,8,32"
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way (default: 2)")
    parser.add_argument(
        "--source", action="append", default=[], metavar="SHARDS",
        help="speech to join (default: data.train, or else it is synthesised)",
    )  # fmt: skip
    parser.add_argument("--speech-cache", type=Path, metavar="DIR", help="where it is kept")
    options = parser.parse_intermixed_args(arguments)
    if min(options.count, options.rounds, *options.beams, *options.batches) < 1:
        parser.error("--count, --rounds, --beams and --batches are 1 or more")
    return options


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
