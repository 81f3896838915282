"""A training run: its parts, put together in order, at its start or where it was left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechllm.checkpoint import (
    Checkpoint,
    Progress,
    complete_checkpoints,
    find_start,
    read_checkpoint,
    refuse_other_identity,
)
from speechllm.config.load import dump_config, dumped_values
from speechllm.config.schema import Config
from speechllm.data.loader import TrainLoader
from speechllm.data.plan import EpochPlan
from speechllm.errors import ConfigError
from speechllm.features import read_features
from speechllm.identity import run_identity
from speechllm.lease import lease_of_environment
from speechllm.log import close_logging, logger, set_up_logging
from speechllm.model.speech_llm import SpeechLLM
from speechllm.planner.workload import of_split
from speechllm.prepare import (
    Split,
    TextSide,
    open_split,
    prepare_model,
    prepare_text,
)
from speechllm.report.metrics import Metrics
from speechllm.report.progress import ProgressLine
from speechllm.report.status import RunStatus
from speechllm.settle import settle
from speechllm.snapshot import CheckpointWriter, read_trainable
from speechllm.strategy.base import Strategy
from speechllm.strategy.build import build_strategy
from speechllm.training_data import (
    ctc_advice,
    epoch_plans,
    in_words,
    open_training,
    train_loader,
    training_key,
)
from speechllm.world import World


@dataclass
class Run:
    """writer, metrics and status exist on rank 0 only."""

    config: Config
    world: World
    directory: Path
    text: TextSide
    model: SpeechLLM
    train: Split
    validation: Split | None
    plan_of: Callable[[int], EpochPlan]
    loader: TrainLoader
    strategy: Strategy
    identity: dict[str, Any]
    progress: Progress
    writer: CheckpointWriter | None
    metrics: Metrics | None
    status: RunStatus | None
    line: ProgressLine


def open_run(config: Config, world: World, stack: ExitStack) -> Run:
    """Everything up to the first step; what must be closed is left with `stack`. The run's
    configuration is a settled one, whatever `config` leaves to choose.

    Raises ConfigError, DataError, ModelError or CheckpointError.
    """
    directory = run_directory(config)
    set_up_logging(world.rank, file=directory / "train.log")
    stack.callback(close_logging)
    text = prepare_text(config)
    train, validation = _open_data(config, text)
    checkpoint = _newest(directory, world)
    config = settle(
        config,
        world.device,
        world,
        utterances=of_split(train, text),
        recorded=checkpoint.path / "config.yaml" if checkpoint is not None else None,
    )
    train = read_features(config, train, training_key(config))
    if validation is not None:
        validation = read_features(config, validation, "data.validation")
    plan_of = epoch_plans(config, train)
    about = run_identity(config, text, train)
    if checkpoint is not None:
        refuse_other_identity(checkpoint.identity, about, checkpoint.path)
    ctc = config.train.ctc_steps > 0
    model = prepare_model(
        config, world.device, prefix=text.prefix, ctc=ctc, sharded=True, training=True
    )
    strategy = build_strategy(config, model, world)
    _load(strategy, config, checkpoint, about, world)
    progress = _progress(config, checkpoint)
    if world.is_main:
        _write_config(config, directory)
    _say_what_runs(config, world, model, text, train, plan_of(progress.epoch), progress)
    loader = train_loader(config, train, text, plan_of, rank=world.rank, world=world.size)
    writer = metrics = status = None
    if world.is_main:
        lease = lease_of_environment()
        writer = CheckpointWriter(
            directory,
            keep_last=config.train.keep_last,
            keep_best=config.train.keep_best,
            lease=lease,
        )
        stack.callback(writer.close)
        metrics = Metrics(directory, from_step=progress.step)
        stack.callback(metrics.close)
        status = RunStatus(directory, steps=config.train.steps, world_size=world.size, lease=lease)
    line = ProgressLine(total=config.train.steps, done=progress.step, shown=world.is_main)
    stack.callback(line.close)
    return Run(
        config=config,
        world=world,
        directory=directory,
        text=text,
        model=model,
        train=train,
        validation=validation,
        plan_of=plan_of,
        loader=loader,
        strategy=strategy,
        identity=about,
        progress=progress,
        writer=writer,
        metrics=metrics,
        status=status,
        line=line,
    )


def run_directory(config: Config) -> Path:
    """`run_dir`, made where it is missing. Raises ConfigError."""
    if config.run_dir is None:
        raise ConfigError("run_dir is not set; say where to write the run: run_dir=exp/NAME")
    directory = Path(config.run_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={directory}: cannot be made ({error.strerror})") from error
    return directory


def _open_data(config: Config, text: TextSide) -> tuple[Split, Split | None]:
    budget = config.data.microbatch_tokens
    train = open_training(config, text)
    if not config.evaluation.every:
        return train, None
    if not config.data.validation:
        raise ConfigError(
            "data.validation is not set, but evaluation.every is "
            f"{config.evaluation.every}; give data.validation=DIR or evaluation.every=0"
        )
    validation = open_split(
        config, config.data.validation, text, key="data.validation", budget=budget
    )
    return train, validation


def _newest(directory: Path, world: World) -> Checkpoint | None:
    """Rank 0 chooses, so that no two ranks go on from different steps."""
    complete = complete_checkpoints(directory) if world.is_main else []
    chosen = world.from_main(str(complete[-1]) if complete else None)
    return None if chosen is None else read_checkpoint(Path(chosen))


def _load(
    strategy: Strategy,
    config: Config,
    checkpoint: Checkpoint | None,
    about: dict[str, Any],
    world: World,
) -> None:
    state = None
    if checkpoint is not None:
        state = read_trainable(checkpoint.path) if world.is_main else None
    elif config.train.init_from is not None:
        source = find_start(config.train.init_from)
        logger.info("starting from the weights of %s", source)
        _warn_of_other_models(read_checkpoint(source).identity, about, source)
        if world.is_main:
            state = read_trainable(source, weights_only=True).without_moments()
    else:
        return
    strategy.load_full_state(state)


def _warn_of_other_models(found: dict[str, Any], wanted: dict[str, Any], source: Path) -> None:
    for part in ("encoder", "llm"):
        if found[part]["hash"] != wanted[part]["hash"]:
            logger.warning(
                "train.init_from: %s was trained with another %s (%s, now %s)",
                source, part, found[part]["id"], wanted[part]["id"],
            )  # fmt: skip


def _progress(config: Config, checkpoint: Checkpoint | None) -> Progress:
    if checkpoint is None:
        return Progress()
    progress, metric = checkpoint.progress, config.evaluation.metric
    former = _values(checkpoint.path / "config.yaml").get("evaluation.metric", metric)
    if progress.best and former != metric:
        logger.warning(
            "the best so far is forgotten: its score is of evaluation.metric=%s and does not "
            "compare with %s", former, metric,
        )  # fmt: skip
        progress = replace(progress, best=[], evaluations_without_best=0)
    return progress


def _write_config(config: Config, directory: Path) -> None:
    path, text = directory / "config.yaml", dump_config(config)
    if path.is_file():
        for change in _changes(path, text):
            logger.warning("the configuration differs from this run's last start: %s", change)
    aside = path.with_name(".config.yaml.new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _changes(file: Path, text: str) -> list[str]:
    """What of the configuration in `file` the one in `text` changes, with dotted keys."""
    before, now = _values(file), dumped_values(text)
    if not before:
        return [f"{file} cannot be read"]
    return [
        f"{key} was {_shown(before, key)}, is {_shown(now, key)}"
        for key in dict.fromkeys([*before, *now])
        if _shown(before, key) != _shown(now, key)
    ]


def _values(file: Path) -> dict[str, Any]:
    """Of the configuration in `file`, by dotted key; nothing where it cannot be read."""
    try:
        return dumped_values(file.read_text(encoding="utf-8"))
    except (OSError, ConfigError, UnicodeDecodeError):
        return {}


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not there"
    value = values[key]
    plain = isinstance(value, str) and value.isprintable() and value
    return value if plain else json.dumps(value, ensure_ascii=False)


def _say_what_runs(
    config: Config,
    world: World,
    model: SpeechLLM,
    text: TextSide,
    train: Split,
    plan: EpochPlan,
    progress: Progress,
) -> None:
    # ZeRO-3 leaves a parameter empty and says elsewhere how large it is.
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    trained = sum(sizes[p] for p in model.trainable_parameters().values())
    frozen = sum(sizes.values()) - trained
    kept = train.selection.kept
    logger.info(
        "%d rank(s) on %s, %s; %.1f M parameters train, %.1f M are frozen",
        world.size, world.device.type, config.precision, trained / 1e6, frozen / 1e6,
    )  # fmt: skip
    if config.performance.preset == "plain":  # whose plan knows no lengths
        padding = f"{config.performance.plain_utterances} utterances in each"
    elif config.performance.packing == "on":
        padding = "without padding"
    else:
        planned = plan.padding_behind(len(model.shortcuts.prefix))
        padding = f"padding {100 * planned:.1f} %"
    logger.info(
        "%d utterances, %.2f h; an epoch is %d steps of %d microbatches, %s",
        len(kept), train.hours, plan.num_steps, config.data.microbatches_per_step, padding,
    )  # fmt: skip
    for line in in_words(train):
        logger.info("%s", line)
    for line in (*text.advice, *ctc_advice(config, train, text)):
        logger.warning("%s", line)
    waste = -config.data.microbatches_per_step % world.size
    if waste:
        logger.warning(
            "%d ranks do not divide data.microbatches_per_step=%d: %d microbatch(es) of each step "
            "are run twice, the second time at weight zero",
            world.size, config.data.microbatches_per_step, waste,
        )  # fmt: skip
    if progress.step:
        logger.info("resuming after step %d (epoch %d, step %d of it)",
                    progress.step, progress.epoch, progress.epoch_step)  # fmt: skip
