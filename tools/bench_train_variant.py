"""One way to train, built from its configuration by the package's own functions, and timed."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from bench_train_count import Work
from bench_train_device import communication_seconds, memory_snapshot, peak_resident, power
from bench_train_sample import Sample
from bench_train_timing import DETAILS, PHASES, Counts, TimedStrategy, Timeline, instrumented

from speechllm.checkpoint import Progress, find_checkpoint
from speechllm.config.load import dump_config
from speechllm.config.schema import Config
from speechllm.data.plan import EpochPlan
from speechllm.garbage import CollectedBySteps
from speechllm.planner.advice import config_name
from speechllm.planner.workload import of_split
from speechllm.prepare import prepare_model, prepare_text
from speechllm.settle import settle
from speechllm.snapshot import CheckpointWriter, read_trainable
from speechllm.step import agree, run_step
from speechllm.strategy.build import build_strategy
from speechllm.training_data import open_training, train_loader
from speechllm.transfer import Transfer
from speechllm.types import StepData
from speechllm.world import World

PASSES = 3  # of the LLM alone: its products, which it is compared with, are the best of three, too


class Variant:
    """The parts of a training run, without its directory. All ranks make one and ask the same.

    As in a run, reader processes are forked once, and a whole step is done before anything is
    timed: after a fork, each page that this process writes is copied first. With a fork for each
    round of four steps, that was 7 % of its CPU time.

    steps: of a round, see `Sample`.
    """

    def __init__(self, config: Config, world: World, steps: int) -> None:
        self.world = world
        self.text = prepare_text(config)
        self.split = open_training(config, self.text)
        lengths = of_split(self.split, self.text)
        config = settle(config, world.device, world, utterances=lengths)
        self.sample = Sample.of(config, self.split, steps)
        self.model = prepare_model(
            config, world.device, prefix=self.text.prefix, sharded=True, training=True
        )
        strategy = build_strategy(config, self.model, world)
        if config.train.init_from is not None:
            path = find_checkpoint(Path(config.train.init_from))
            state = read_trainable(path, weights_only=True).without_moments()
            strategy.load_full_state(state if world.is_main else None)
        self.config = config
        self.loader = train_loader(
            config,
            self.split,
            self.text,
            lambda _: cast(EpochPlan, self.sample),
            rank=world.rank,
            world=world.size,
        )
        self.timeline = Timeline(world.device)
        self.strategy = TimedStrategy(strategy, self.timeline)
        frozen = not any(p.requires_grad for p in self.model.llm.parameters())
        prefix = len(self.text.prefix) if frozen else 0
        self.work = Work(config, world, self.text.audio_tokens, prefix)
        self.transfer = Transfer(world.device)
        self.load_peak = peak_resident()
        self._source = self.loader.steps(0, 0)
        self._data = next(self._source)  # always the one that comes next
        self._step(self._data, 0)
        self.timeline.read()
        gc.collect()

    def settings(self) -> dict[str, Any]:
        """What decides the speed, after `auto` was settled."""
        config = self.config
        return {
            "precision": config.precision,
            "attention": config.model.llm.attention,
            "context": getattr(config.model.encoder, "context", None),
            **config.performance.model_dump(mode="json"),
            "strategy": config_name(config),
            "world": self.world.size,
            "threads": torch.get_num_threads(),
            "microbatch_tokens": config.data.microbatch_tokens,
            "microbatches_per_step": config.data.microbatches_per_step,
        }

    def round(self, *, synthetic: bool) -> dict[str, Any]:
        """The sample at learning rate 0, so that the sum of its losses is the same for any cut into
        microbatches. Its first step is read before the clock starts, and `data.prefetch` may have
        more ready; while it runs, as many steps are read as it has. synthetic: all of them before,
        and again and again the same."""
        counts, steps = Counts(), self.sample.num_steps
        losses, step_seconds = [], []
        data, done = self._data, []
        source: Iterator[StepData] = self._source
        if synthetic:
            others = [next(self._source) for _ in range(steps - 1)]
            source, self._data = cycle([*others, data]), next(self._source)
        with (
            instrumented(self.model, self.timeline, counts),
            power(self.world.device) as watts,
            CollectedBySteps() as garbage,
        ):
            self.world.barrier()
            self.timeline.read()
            begun = lap = time.perf_counter()
            for number in range(steps):
                losses.append(self._step(data, number))
                garbage.collect(everything=False)
                done.append(data)
                with self.timeline.phase("load"):
                    data = next(source)
                now = time.perf_counter()
                step_seconds.append(now - lap)
                lap = now
            spent = self.timeline.read()
            seconds = time.perf_counter() - begun
        if not synthetic:
            self._data = data
        found = self._result(done, counts, spent, seconds, step_seconds, losses)
        return {**found, "watts": sum(watts) / len(watts) if watts else None}

    def _result(
        self,
        done: list[StepData],
        counts: Counts,
        spent: dict[str, float],
        seconds: float,
        step_seconds: list[float],
        losses: list[torch.Tensor],
    ) -> dict[str, Any]:
        steps = len(step_seconds)
        mine = self.work.sums(done, counts) | {"loss": float(sum(losses))}
        sums = dict(zip(mine, self.world.sum(list(mine.values())), strict=True))
        sums["loss"] /= max(sums["target_tokens"], 1)
        on_cuda = self.world.device.type == "cuda"
        return {
            **sums,
            "seconds": seconds,
            "steps": steps,
            "step_seconds": step_seconds,
            "phases": {name: spent.get(name, 0.0) / steps for name in PHASES},
            "details": {name: spent.get(name, 0.0) / steps for name in DETAILS},
            "llm_shapes": counts.llm_shapes,
            "peak_rss_bytes": peak_resident(),
            "load_peak_rss_bytes": self.load_peak,
            "peak_device_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
            "predicted_bytes": self.work.predicted_bytes(done),
            "settings": self.settings(),
        }

    def llm(self, tokens: int) -> dict[str, Any]:
        """Forward and backward of the LLM's layers alone, on utterances of middle length that give
        it about so many positions: seconds of the best of PASSES, and the operations needed."""
        kept = self.split.selection.kept
        ordered = kept[self.split.costs[kept].argsort(kind="stable")]
        middle = len(ordered) // 2
        batch = self.loader.read(0, ordered[middle : middle + 1]).batch
        columns = batch.lengths[0] - self.work.left_out
        rows = min(len(ordered), max(1, round(tokens / columns)))
        first = middle - rows // 2
        microbatch = self.loader.read(0, ordered[first : first + rows])
        counts = Counts()
        with instrumented(self.model, self.timeline, counts):
            self._step(StepData(0, 0, [microbatch]), 0)
            self.timeline.read()
            shapes = list(counts.llm_shapes)
            passes = []
            for _ in range(PASSES):
                self._step(StepData(0, 0, [microbatch]), 0)
                spent = self.timeline.read()
                passes.append((spent["llm_forward"], spent["llm_backward"]))
        forward, backward = min(passes, key=sum)
        needed = self.work.sums([StepData(0, 0, [microbatch])], counts)
        return {
            "tokens": tokens,
            "shapes": shapes,
            "positions": int(needed["positions_useful"]),
            "forward_seconds": forward,
            "backward_seconds": backward,
            "flops": needed["flops.llm"],
            "flops_per_second": needed["flops.llm"] / (forward + backward),
        }

    def checkpoint(self) -> dict[str, float]:
        """How long the loop stands while a checkpoint is taken, and how much longer the step beside
        the writing takes, in steps."""
        before = self._seconds_of_step(self._data)
        with tempfile.TemporaryDirectory(prefix="bench-train-") as directory:
            begun = time.perf_counter()
            state = self.strategy.full_state()
            writer = None
            if self.world.is_main:
                assert state is not None
                writer = CheckpointWriter(Path(directory), keep_last=1, keep_best=0)
                writer.save(state, Progress(step=1), {}, dump_config(self.config))
            stalled = time.perf_counter() - begun
            beside = self._seconds_of_step(self._data)
            if writer is not None:
                writer.close()
        return {
            "stall_steps": stalled / before,
            "slowdown_steps": max(0.0, beside / before - 1),
            "stall_seconds": stalled,
        }

    def trace(self, file: str | None) -> dict[str, float]:
        """One step under torch's profiler, written as a chrome trace; seconds of it that went into
        communication, which may lie beside computation."""
        activities = [ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            seconds = self._seconds_of_step(self._data)
        if file is not None and self.world.is_main:
            profiler.export_chrome_trace(file)
        return {"communication": communication_seconds(profiler), "seconds": seconds}

    def memory(self, file: str) -> dict[str, str]:
        """The history of a GPU's memory in one step."""
        memory_snapshot(lambda: self._seconds_of_step(self._data), file)
        return {"file": file}

    def shortest(self, count: int) -> dict[str, Any]:
        """The better of two steps with the shortest utterances alone, where a whole round would
        take too long."""
        kept = self.split.selection.kept
        chosen = kept[self.split.costs[kept].argsort(kind="stable")[:count]]
        data = StepData(0, 0, [self.loader.read(0, chosen)])
        seconds = min(self._seconds_of_step(data) for _ in range(2))
        return {"utterances_per_second": len(chosen) / seconds, "settings": self.settings()}

    def _seconds_of_step(self, data: StepData) -> float:
        self.world.barrier()
        begun = time.perf_counter()
        self._step(data, 0)
        self.timeline.read()
        return time.perf_counter() - begun

    def _step(self, data: StepData, number: int) -> torch.Tensor:
        with self.timeline.phase("communication"):
            totals = agree(data, self.world, stop=False)
        result = run_step(
            self.strategy, data, totals, objective="lm", lr=0.0, seed=self.config.seed,
            step=number, device=self.world.device, transfer=self.transfer,
        )  # fmt: skip
        return result.loss
