"""What every rank of the matrix runs: all strategies on the same steps, and one process alone.

`run_matrix` gives, on rank 0, the curve of every case by name; weights are left in files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from safetensors.torch import save_file

from runs import ROOT, tiny_config

from speechllm.config.schema import Config
from speechllm.data.loader import TrainLoader
from speechllm.decode import decode
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim import learning_rate
from speechllm.prepare import open_split, prepare_model, prepare_text
from speechllm.step import StepTotals, agree, run_step
from speechllm.strategy.base import Strategy, TrainableState
from speechllm.strategy.build import build_strategy
from speechllm.strategy.ddp import DDPStrategy
from speechllm.training_data import epoch_plans
from speechllm.types import StepData
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
STEPS, CUT, CONTINUED = 12, 6, 2  # of a case; the step a pair goes on from; how far
ADAPTED_STEPS = 3
MAX_GRAD_NORM = 0.02  # below the norm of every step
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PLAIN = ("performance.prefix_cache=off", "performance.label_logits=false")
ADAPTED = ("model.lora.rank=4", "model.unfreeze_encoder_layers=1")


@dataclass
class Curve:
    """Loss and gradient norm of each step."""

    losses: list[float]
    norms: list[float]


Totals = Callable[[StepTotals, StepData, World], StepTotals]


def settings(strategy: str, shards: Path, precision: str, per_rank: int, *more: str) -> Config:
    chosen = [f"strategy.kind={strategy}"]
    if strategy.startswith("zero"):
        file = ROOT / "ds_configs" / f"{strategy}.json"
        chosen = ["strategy.kind=deepspeed", f"strategy.config={file}"]
    return tiny_config(
        shards / "unused", shards, *chosen, f"precision={precision}",
        f"data.microbatches_per_step={2 * per_rank}", "data.microbatch_tokens=120",
        f"optim.max_grad_norm={MAX_GRAD_NORM}", "optim.lr=2e-3", "train.steps=100", *more,
    )  # fmt: skip


class Data:
    """The first steps of a rank, read once for each number of microbatches."""

    def __init__(self, shards: Path) -> None:
        self.shards = shards
        self._steps: dict[tuple[int, int, int], list[StepData]] = {}
        config = settings("ddp", shards, "fp32", 1)
        self.text = prepare_text(config)
        self.split = open_split(config, config.data.train, self.text, key="data.train", budget=120)

    def steps(self, config: Config, world: World) -> list[StepData]:
        key = (config.data.microbatches_per_step, world.rank, world.size)
        if key not in self._steps:
            loader = TrainLoader(
                self.split.store, self.text.prompter, self.text.audio_tokens, self.text.pad_id,
                epoch_plans(config, self.split), rank=world.rank, world=world.size,
                num_workers=0, prefetch=1,
            )  # fmt: skip
            with closing(loader.steps(0, 0)) as steps:
                self._steps[key] = list(itertools.islice(steps, STEPS))
        return self._steps[key]


def as_it_is(totals: StepTotals, data: StepData, world: World) -> StepTotals:
    return totals


def train(
    strategy: Strategy,
    config: Config,
    world: World,
    steps: Sequence[StepData],
    first: int = 0,
    *,
    totals_of: Totals = as_it_is,
) -> Curve:
    """As the training loop does; `first` counts from 0."""
    curve = Curve([], [])
    for number, data in enumerate(steps, first):
        totals = agree(data, world, stop=False)
        result = run_step(
            strategy, data, totals_of(totals, data, world), objective="lm",
            lr=learning_rate(number, config.optim, config.train.steps), seed=config.seed,
            step=number, device=world.device,
        )  # fmt: skip
        (loss,) = world.sum([float(result.loss)])
        curve.losses.append(loss / totals.target_tokens)
        curve.norms.append(float(result.grad_norm))
    return curve


def mean_of_means(totals: StepTotals, data: StepData, world: World) -> StepTotals:
    """The fault of averaging over ranks what each has averaged over its own tokens."""
    mine = sum(m.batch.num_target_tokens for m in data.microbatches if m.weight > 0)
    return replace(totals, target_tokens=mine * world.size)


class SkippedSync(DDPStrategy):
    """The fault of one step whose gradients are not summed over the ranks."""

    skipped = 4

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        assert isinstance(self.model, DistributedDataParallel)
        with super().microbatch(last=last and self.updates != self.skipped):
            yield


class PhantomStep(DDPStrategy):
    """The fault of an optimizer that has counted a step, of nothing, before the first."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()


class Matrix:
    def __init__(self, world: World, shards: Path, directory: Path) -> None:
        self.world = world
        self.data = Data(shards)
        self.directory = directory
        self.results: dict[str, Any] = {}

    def build(self, config: Config, world: World) -> tuple[SpeechLLM, Strategy]:
        prefix = self.data.text.prefix
        assert prefix  # so that its keys and values are shared under every strategy
        model = prepare_model(config, world.device, prefix=prefix, sharded=True)
        return model, build_strategy(config, model, world)

    def settings(self, strategy: str, precision: str, per_rank: int, *more: str) -> Config:
        return settings(strategy, self.data.shards, precision, per_rank, *more)

    def keep(self, name: str, curve: Curve, state: TrainableState | None) -> None:
        if self.world.is_main:
            assert state is not None
            self.results[name] = asdict(curve)
            save_file(state.weights, self.directory / f"{name.replace('/', '_')}.safetensors")

    def alone(self, name: str, *more: str, per_rank: int, cuts: Sequence[int]) -> None:
        """One process, fp32, without shortcuts, which all the others wait for; its weights after
        each of `cuts`."""
        if not self.world.is_main:
            return
        config = self.settings("ddp", "fp32", per_rank, *PLAIN, *more)
        _, strategy = self.build(config, ALONE)
        steps, curve, done = self.data.steps(config, ALONE), Curve([], []), 0
        for cut in cuts:
            part = train(strategy, config, ALONE, steps[done:cut], done)
            curve = Curve(curve.losses + part.losses, curve.norms + part.norms)
            self.keep(f"{name}/{cut}", curve, strategy.full_state())
            done = cut

    def case(self, name: str, config: Config, count: int = STEPS) -> None:
        _, strategy = self.build(config, self.world)
        steps = self.data.steps(config, self.world)[:count]
        self.keep(name, train(strategy, config, self.world, steps), strategy.full_state())

    def faults(self) -> None:
        config = self.settings("ddp", "fp32", 3)
        steps = self.data.steps(config, self.world)
        for name, kind, totals_of in (
            ("mean_of_means", DDPStrategy, mean_of_means),
            ("skipped_sync", SkippedSync, as_it_is),
            ("phantom_step", PhantomStep, as_it_is),
        ):
            strategy = kind(prepare_model(config, self.world.device), config, self.world)
            curve = train(strategy, config, self.world, steps, totals_of=totals_of)
            self.keep(f"fault/{name}", curve, strategy.full_state())

    def pairs(self) -> None:
        """Every strategy goes on from the state of every other, and decodes from that of ddp."""
        engines, states = {}, {}
        for kind in STRATEGIES:
            config = self.settings(kind, "fp32", 1)
            steps = self.data.steps(config, self.world)
            model, strategy = self.build(config, self.world)
            curve = train(strategy, config, self.world, steps[:CUT])
            states[kind] = strategy.full_state()
            rest = train(strategy, config, self.world, steps[CUT:], CUT)
            curve = Curve(curve.losses + rest.losses, curve.norms + rest.norms)
            self.keep(f"{kind}/fp32/1", curve, strategy.full_state())
            engines[kind] = (config, model, strategy)
        for (before, state), (kind, (config, model, strategy)) in itertools.product(
            states.items(), engines.items()
        ):
            strategy.load_full_state(state)
            if before == "ddp":
                self.generate(kind, config, model)
            steps = self.data.steps(config, self.world)[CUT : CUT + CONTINUED]
            curve = train(strategy, config, self.world, steps, CUT)
            self.keep(f"{before}-{kind}", curve, strategy.full_state())

    def generate(self, kind: str, config: Config, model: SpeechLLM) -> None:
        """Rank 1 decodes longer outputs than rank 0."""
        limit = {"max_new_tokens": 5 + 7 * self.world.rank}
        config = config.model_copy(
            update={"generation": config.generation.model_copy(update=limit)}
        )
        mine = [np.arange(3) + 10 * self.world.rank, np.arange(5, 7) + 10 * self.world.rank]
        model.eval()
        rows = decode(model, self.data.split, self.data.text, config, self.world.device, mine)
        texts = [[row.number, row.hyp] for part in rows for row in part]
        model.train()
        self.results[f"generate/{kind}"] = self.world.gather(texts)

    def target_tokens(self) -> list[int]:
        """Of this rank's microbatch in each step."""
        config = self.settings("ddp", "fp32", 1)
        steps = self.data.steps(config, self.world)
        return [data.microbatches[0].batch.num_target_tokens for data in steps]


def run_matrix(world: World, shards: Path, directory: Path) -> dict[str, Any]:
    """{case: {losses, norms}}: `STRATEGY/PRECISION/MICROBATCHES_PER_RANK`, `adapted/...` likewise,
    `alone/MICROBATCHES_PER_RANK/STEPS`, `fault/NAME`, `BEFORE-AFTER` from step CUT on, and
    {generate/STRATEGY: by rank, [utterance, text]}. Weights are in DIRECTORY/CASE.safetensors."""
    matrix = Matrix(world, shards, directory)
    matrix.alone("alone/1", per_rank=1, cuts=(CUT + CONTINUED, STEPS))
    matrix.alone("alone/3", per_rank=3, cuts=(STEPS,))
    matrix.alone("adapted/alone/1", *ADAPTED, per_rank=1, cuts=(ADAPTED_STEPS,))
    matrix.pairs()
    matrix.faults()
    for kind in STRATEGIES:
        for precision, per_rank in (("fp32", 3), ("bf16", 1), ("bf16", 3)):
            config = matrix.settings(kind, precision, per_rank)
            matrix.case(f"{kind}/{precision}/{per_rank}", config)
        for precision in ("fp32", "bf16"):
            config = matrix.settings(kind, precision, 1, *ADAPTED)
            matrix.case(f"adapted/{kind}/{precision}/1", config, ADAPTED_STEPS)
    matrix.results["target_tokens"] = world.gather(matrix.target_tokens())
    return matrix.results
