"""What a configuration lacks, and what it would do, without training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from speechllm.checkpoint import (
    complete_checkpoints,
    find_start,
    read_checkpoint,
    refuse_other_identity,
)
from speechllm.config.schema import Config
from speechllm.errors import CheckpointError, UserError
from speechllm.features import read_features
from speechllm.identity import run_identity
from speechllm.model.identity import missing
from speechllm.planner.advice import config_name, job_of, machine_here, worst_parts
from speechllm.planner.architecture import read_architecture
from speechllm.planner.command import utterances_of
from speechllm.planner.room import needs_checkpointing
from speechllm.prepare import Split, TextSide, open_split, prepare_text
from speechllm.preview import write_preview
from speechllm.settle import measured_in_training, settle
from speechllm.training_data import (
    ctc_advice,
    epoch_plans,
    in_words,
    open_training,
    training_key,
)

GIB = 2**30


@dataclass
class Findings:
    """`ready` is False as soon as one line says that something is missing."""

    lines: list[str] = field(default_factory=list)
    ready: bool = True

    def good(self, text: str) -> None:
        self.lines.append(f"  ok       {text}")

    def bad(self, text: str) -> None:
        self.lines.append(f"  MISSING  {text}")
        self.ready = False


def check(config: Config, *, preview: Path | None = None) -> Findings:
    """Looks at weights, shards, memory and the run directory; downloads and trains nothing.

    preview: write examples of the augmentation there.
    """
    findings = Findings()
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    absent = missing(config.model)
    for name in absent:
        findings.bad(name)
    if not absent:
        findings.good("weights of encoder and LLM, tokenizer")
        settled = settle(config, device)
        findings.lines += _choices(config, settled, device)
        _check_memory(settled, findings, chosen=config.train.activation_checkpointing == "auto")
        about = _check_data(settled, findings, preview)
    else:
        about = None
        findings.lines.append("  -        shards: not looked at, their cost needs the tokenizer")
    _check_run_dir(config, about, findings)
    findings.lines.append("ready to train" if findings.ready else "not ready to train")
    return findings


def _choices(asked: Config, settled: Config, device: torch.device) -> list[str]:
    """What stands for each `auto` that a run settles at its start."""
    measured = measured_in_training(asked, device)
    found = []
    for key, value, choice in (
        ("precision", asked.precision, settled.precision),
        ("model.llm.attention", asked.model.llm.attention, settled.model.llm.attention),
        ("performance.packing", asked.performance.packing, settled.performance.packing),
    ):
        if value == "auto":
            how = "training measures at its start; by rule here" if key in measured else "here"
            found.append(f"           {key}: auto; {how}: {choice}")
    return found


def _check_data(config: Config, findings: Findings, preview: Path | None) -> dict[str, Any] | None:
    """What a run's checkpoints would belong to, where that can be said."""
    try:
        text = prepare_text(config)
    except UserError as error:
        findings.bad(f"prompt: {error}")
        return None
    findings.lines += [f"  advice   {line}" for line in text.advice]
    key = training_key(config)
    train = _opened(key, lambda: open_training(config, text), findings)
    if train is not None:
        findings.lines += [f"           {line}" for line in in_words(train)]
        findings.lines += [f"  advice   {line}" for line in ctc_advice(config, train, text)]
        plan = epoch_plans(config, train)(0)
        packed = config.performance.packing == "on"
        padding = 0.0 if packed else plan.padding_behind(_cached(config, text))
        findings.good(
            f"an epoch is {plan.num_steps} steps of "
            f"{config.data.microbatches_per_step} microbatches, padding "
            f"{100 * padding:.1f} %; {config.train.steps} steps are "
            f"{config.train.steps / plan.num_steps:.1f} epochs"
        )
        _check_features(config, train, key, findings)
    if config.evaluation.every:
        validation = _opened("data.validation", lambda: _validation(config, text), findings)
        if validation is not None:
            _check_features(config, validation, "data.validation", findings)
    if train is None:
        return None
    if preview is not None:
        _write_preview(config, train, preview, findings)
    return run_identity(config, text, train)


def _cached(config: Config, text: TextSide) -> int:
    """Positions of a row that the LLM does not run."""
    machine = machine_here(config, gpus=None, nodes=1, gpu_memory=None)
    return (
        len(text.prefix) if job_of(config, read_architecture(config.model), machine).cached else 0
    )


def _check_features(config: Config, split: Split, key: str, findings: Findings) -> None:
    if config.performance.encoder_cache == "off":
        return
    try:
        read_features(config, split, key)
    except UserError as error:
        findings.bad(str(error))
    else:
        findings.good(f"{key}: {config.performance.encoder_cache} outputs of the encoder")


def _validation(config: Config, text: TextSide) -> Split:
    budget = config.data.microbatch_tokens
    return open_split(config, config.data.validation, text, key="data.validation", budget=budget)


def _opened(key: str, open_it: Callable[[], Split], findings: Findings) -> Split | None:
    try:
        split = open_it()
        kept = split.selection.kept
        # Indexes are read whole: only this shows a server that serves no byte ranges.
        split.store.read_raw(split.corpus.location(int(kept[0])))
    except UserError as error:
        findings.bad(f"{key}: {error}")
        return None
    findings.good(
        f"{key}: {len(split.corpus.shards)} shards, {len(kept)} utterances, {split.hours:.2f} h"
    )
    for reason, numbers in split.selection.dropped.items():
        if len(numbers):
            findings.lines.append(f"           {len(numbers)} dropped: {reason}")
    return split


def _write_preview(config: Config, train: Split, directory: Path, findings: Findings) -> None:
    try:
        count = write_preview(config, train.store, train.selection.kept, directory)
    except UserError as error:
        findings.bad(str(error))
    else:
        findings.good(f"{count} utterances with their augmentation, see {directory}/index.json")


def _check_memory(config: Config, findings: Findings, *, chosen: bool) -> None:
    """What `speechllm plan` predicts for the configured strategy on this machine. chosen: a run
    turns activation checkpointing on where it needs it."""
    machine = machine_here(config, gpus=None, nodes=1, gpu_memory=None)
    about = read_architecture(config.model)
    utterances, _ = utterances_of(config)
    if chosen and needs_checkpointing(config, machine, utterances):
        train = config.train.model_copy(update={"activation_checkpointing": True})
        config = config.model_copy(update={"train": train})
        findings.lines.append("           train.activation_checkpointing: auto; here: true")
    job, strategy = job_of(config, about, machine), config_name(config)
    need = sum(
        worst_parts(config, job, utterances, config.data.microbatch_tokens, strategy).values()
    )
    text = (
        f"memory: {about.frozen_parameters / 1e6:.1f} M frozen and "
        f"{about.trained_parameters / 1e6:.1f} M trained parameters; {strategy} on "
        f"{machine.ranks} rank(s) is predicted to take up to {need / GIB:.2f} GiB a rank of the "
        f"{machine.usable / GIB:.1f} GiB that can be used here"
    )
    if need < machine.usable:
        findings.good(text)
    else:
        findings.bad(f"{text}; `speechllm plan` says what fits")


def _check_run_dir(config: Config, about: dict[str, Any] | None, findings: Findings) -> None:
    if config.run_dir is None:
        findings.bad("run_dir is not set; say where to write the run: run_dir=exp/NAME")
        return
    complete = complete_checkpoints(Path(config.run_dir))
    if not complete:
        findings.good(f"run_dir {config.run_dir}: would start anew")
        _check_init_from(config, findings)
        return
    try:
        found = read_checkpoint(complete[-1])
        if about is not None:
            refuse_other_identity(found.identity, about, found.path)
    except CheckpointError as error:
        findings.bad(f"run_dir {error}")
    else:
        findings.good(f"run_dir {config.run_dir}: would resume after step {found.progress.step}")


def _check_init_from(config: Config, findings: Findings) -> None:
    if config.train.init_from is None:
        return
    try:
        source = find_start(config.train.init_from)
    except CheckpointError as error:
        findings.bad(str(error))
    else:
        findings.good(f"train.init_from: would start from {source}")
