"""Where the time of a training step goes, and what each shortcut gains over the plain path.

Utterances are joined to a wanted mean duration, and every way to train goes through the same ones:
the plain path (`performance.preset: plain`), then with one shortcut after the other, up to the
configuration as it is. The ways take turns, each in a process of its own; ratios are those within
a turn. Every turn measures the matrix products of the LLM, too, against which utilisation is
counted. JSON goes to standard output, tables and progress to standard error.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bench_speech import MARKER, speech_shards
from bench_train_process import Failed, Process
from bench_train_report import ablation, equal_loss, machine, show, way_result
from bench_train_ways import FULL, PLAIN, Sizes, Way, cached, sizes, ways
from parity import strategy_overrides
from shard_console import run

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.errors import UserError

TOKENS = (768, 2048)  # positions at which the LLM is looked at alone
UTTERANCES = 1000  # so many that buckets are about as tight as in a real corpus
FEW = 2  # utterances by which precisions are compared
EXAMPLES = """\
examples (the first as it stands after `make demo`):
  python tools/bench_train.py configs/demo.yaml --json exp/bench_train.json
  python tools/bench_train.py configs/demo.yaml --mean-seconds 11 --rounds 5 --json exp/11.json
  python tools/bench_train.py configs/demo.yaml model.prompt.kind=chat \\
      'model.prompt.texts=["Transcribe the speech to text: {audio}"]' --json exp/chat.json
  python tools/bench_train.py configs/demo.yaml --ends --trace exp/trace.json --json exp/ends.json
  python tools/bench_train.py configs/demo.yaml --ends --strategies ddp,fsdp2,zero2 --world 1,2 \\
      --json exp/strategies.json
"""


class Bench:
    """The processes of all ways, and what they have measured, by the name of the way."""

    def __init__(self, options: argparse.Namespace, threads: int) -> None:
        self.options = options
        self.threads = threads
        self.rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.gemm: list[dict[str, float]] = []
        self.llm: list[list[dict[str, Any]]] = []
        self._processes: dict[str, Process] = {}

    def round(self, ways: Sequence[Way]) -> None:
        """Each way once. Then, of the last one, the LLM alone, and the products' peaks for it."""
        number = len(self.gemm)
        for way in ways if number % 2 == 0 else reversed(ways):
            found = self._process(way).ask("round", synthetic=self.options.synthetic)
            self.rounds[way.name].append(found)
            speed = found["utterances"] / found["seconds"]
            say(f"round {number + 1}: {way.added}: {speed:.3g} utterances/s")
        shapes = self.rounds[ways[-1].name][-1]["llm_shapes"]
        mean = round(sum(rows * columns for rows, columns in shapes) / len(shapes))
        alone = [self._process(ways[-1]).ask("llm", tokens=tokens) for tokens in TOKENS]
        wanted = [mean, *(entry["positions"] for entry in alone)]
        gemm = Way("gemm", "", ways[-1].overrides)
        rates = self._process(gemm).ask("gemm", rows=wanted)
        for entry in alone:
            entry["gemm_peak_flops"] = rates["shapes"][str(entry["positions"])]
            entry["mfu"] = entry["flops_per_second"] / entry["gemm_peak_flops"]
        self.llm.append(alone)
        self.gemm.append({"own": rates["shapes"][str(mean)], "best": rates["best"], "rows": mean})
        say(f"round {number + 1}: products {self.gemm[-1]['own'] / 1e9:.0f} GFLOP/s")

    def ask(self, way: Way, what: str, **arguments: Any) -> dict[str, Any]:
        return self._process(way).ask(what, **arguments)

    def close(self) -> None:
        for process in self._processes.values():
            process.close()
        self._processes = {}

    def _process(self, way: Way) -> Process:
        if way.name not in self._processes:
            self._processes[way.name] = Process(
                self.options.config,
                way.overrides,
                steps=self.options.steps,
                world=1,
                threads=self.threads,
            )
        return self._processes[way.name]


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    for name in options.strategies:
        strategy_overrides(name)  # a wrong one is found before the rounds, which take minutes
    here = machine()
    speech = speech_shards(
        options.mean_seconds,
        options.utterances,
        source=_source(options, config),
        cache=options.speech_cache,
    )
    data = [f"data.train={speech}", "data.mixture={}", "data.validation=[]"]
    common = (*options.overrides, *data)
    sized = sizes(load_config(options.config, common))
    say(f"{options.utterances} utterances of {sized.mean_cost:.0f} LLM positions on average")
    try:
        result = measure(options, config, common, sized, here)
    except Failed as error:
        raise UserError(f"{error}; what it said is above") from error
    about = json.loads((speech / MARKER).read_text(encoding="utf-8"))
    result = {"mean_seconds": options.mean_seconds, **result, "speech": about, "machine": here}
    result["command"] = shlex.join(["python", "tools/bench_train.py", *arguments])
    show(result)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return 0


def measure(
    options: argparse.Namespace,
    config: Config,
    common: tuple[str, ...],
    sized: Sizes,
    here: dict[str, Any],
) -> dict[str, Any]:
    chain = [
        Way(way.name, way.added, (*common, *sized.overrides(options.batch, 1), *way.overrides))
        for way in ways(config, options.batch)
    ]
    full = chain[-1]
    if options.ends:
        chain = [chain[0], Way(FULL, "all shortcuts", full.overrides)]
    with_cache = None if options.ends else cached(options.config, config, full)
    every = [*chain[:-1], with_cache, full] if with_cache else chain
    with closing(Bench(options, here["cores"])) as bench:
        for _ in range(options.rounds):
            bench.round(every)
        extra: dict[str, Any] = {"checkpoint": bench.ask(full, "checkpoint")}
        if options.trace:
            extra["trace"] = bench.ask(full, "trace", file=str(options.trace.absolute()))
        if options.memory_snapshot:
            file = str(options.memory_snapshot.absolute())
            extra["memory_snapshot"] = bench.ask(full, "memory", file=file)
    results = {way.name: way_result(bench.rounds[way.name], bench.gemm) for way in chain}
    entries = ablation([*chain, *([with_cache] if with_cache else [])], bench.rounds)
    if not options.ends:
        extra["precision"] = precisions(options, full, here)
    if options.strategies or options.world != [1]:
        extra["strategies"] = strategies(options, common, sized, here)
    llm = [_middle([found[i] for found in bench.llm]) for i in range(len(TOKENS))]
    return {
        "plain": results[PLAIN],
        "full": results[FULL],
        "speedup": entries[len(chain) - 1]["ratio"],
        "operations_ratio": _operations(results[PLAIN]) / _operations(results[FULL]),
        "ablation": entries,
        "gemm_peak_flops": _middle_of([gemm["own"] for gemm in bench.gemm]),
        "gemm_best_flops": _middle_of([gemm["best"] for gemm in bench.gemm]),
        "gemm": bench.gemm,
        "llm": llm,
        "equal_loss": equal_loss(chain, bench.rounds),
        **extra,
    }


def precisions(
    options: argparse.Namespace, full: Way, here: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Few and short utterances: where bf16 has no instructions, a round would take an hour."""
    found = {}
    for precision in ("fp32", "bf16"):
        overrides = (*full.overrides, f"precision={precision}")
        with closing(
            Process(options.config, overrides, steps=1, world=1, threads=here["cores"])
        ) as process:
            found[precision] = process.ask("shortest", count=FEW)
        say(f"{precision}: {found[precision]['utterances_per_second']:.3g} utterances/s")
    return found


def strategies(
    options: argparse.Namespace, common: tuple[str, ...], sized: Sizes, here: dict[str, Any]
) -> list[dict[str, Any]]:
    """All shortcuts, by strategy and number of ranks, which share the cores; the step stays."""
    found = []
    for world in options.world:
        for name in options.strategies or ["ddp"]:
            overrides = (*common, *sized.overrides(options.batch, world), *strategy_overrides(name))
            threads = max(1, here["cores"] // world)
            with closing(
                Process(
                    options.config,
                    overrides,
                    steps=options.steps,
                    world=world,
                    threads=threads,
                )
            ) as process:
                rounds = [
                    process.ask("round", synthetic=options.synthetic) for _ in range(options.rounds)
                ]
                profiled = process.ask("trace", file=None)
            entry = {"strategy": name, "world": world, **way_result(rounds, [])}
            entry["phases"]["communication"] += profiled["communication"]
            found.append(entry)
            say(f"{name}, {world} ranks: {entry['utterances_per_second']:.3g} utterances/s")
    return found


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="overrides")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument(
        "--mean-seconds", type=float, default=6.5, help="of the utterances (default: 6.5)"
    )
    parser.add_argument(
        "--utterances", type=int, default=UTTERANCES,
        help=f"of the corpus, of which a round takes a few steps (default: {UTTERANCES})",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="utterances a step (default: 8)")
    parser.add_argument("--steps", type=int, default=4, help="of each round (default: 4)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way (default: 2)")
    parser.add_argument("--ends", action="store_true", help="plain path and full one alone")
    parser.add_argument(
        "--synthetic", action="store_true", help="read everything before the clock starts"
    )
    parser.add_argument(
        "--strategies", type=lambda text: text.split(","), default=[], metavar="A,B",
        help="also by strategy: ddp, fsdp2, or the names of files in ds_configs/",
    )  # fmt: skip
    parser.add_argument(
        "--world", type=lambda text: [int(n) for n in text.split(",")], default=[1], metavar="1,2",
        help="numbers of ranks for that (default: 1)",
    )  # fmt: skip
    parser.add_argument("--trace", type=Path, metavar="FILE", help="chrome trace of a full step")
    parser.add_argument(
        "--memory-snapshot", type=Path, metavar="FILE", help="of a full step (CUDA only)"
    )
    parser.add_argument(
        "--source", action="append", default=[], metavar="SHARDS",
        help="speech to join (default: data.train, or else it is synthesised)",
    )  # fmt: skip
    parser.add_argument("--speech-cache", type=Path, metavar="DIR", help="where it is kept")
    options = parser.parse_intermixed_args(arguments)
    if min(options.batch, options.steps, options.rounds, *options.world) < 1:
        parser.error("--batch, --steps, --rounds and --world are 1 or more")
    return options


def _source(options: argparse.Namespace, config: Config) -> list[str]:
    if options.source:
        return list(options.source)
    return [pattern for pattern in config.data.train if Path(pattern).exists()]


def _operations(result: dict[str, Any]) -> float:
    """Run for an utterance, needed or not."""
    step: float = sum(result["flops_run_per_step"].values())
    return step * result["steps"] / result["utterances"]


def _middle(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """That of the rounds whose utilisation is the middle one."""
    return sorted(found, key=lambda entry: entry["mfu"])[(len(found) - 1) // 2]


def _middle_of(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
