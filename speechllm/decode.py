"""Decoding of whole splits: shared by all ranks, resumable, written by id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rich.console import Console
from rich.progress import track

from speechllm.checkpoint import find_checkpoint
from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.loader import read_batches
from speechllm.data.plan import plan_in_order, rank_share
from speechllm.errors import UserError
from speechllm.generate import generate
from speechllm.log import logger
from speechllm.model.speech_llm import SpeechLLM
from speechllm.prepare import (
    Split,
    TextSide,
    open_split,
    prepare_model,
    prepare_text,
)
from speechllm.report.lines import read_lines
from speechllm.settle import settle
from speechllm.snapshot import read_trainable
from speechllm.strategy.build import build_strategy, frozen_weights
from speechllm.world import World


@dataclass(frozen=True)
class Prediction:
    """number: the utterance's place in the corpus. duration: seconds."""

    number: int
    id: str
    ref: str
    hyp: str
    duration: float


@dataclass(frozen=True)
class Slice:
    """Part `number` of `count` of a split, for tasks that know nothing of each other: microbatches
    number - 1, number - 1 + count, ... of the whole split's."""

    number: int
    count: int

    def label(self, split: str) -> str:
        return f"{split}.slice{self.number}of{self.count}"


def decode(
    model: SpeechLLM,
    split: Split,
    text: TextSide,
    config: Config,
    device: torch.device,
    microbatches: Sequence[np.ndarray],
) -> Iterator[list[Prediction]]:
    """The predictions of each microbatch; one that could not be read at all gives an empty list."""
    batches = read_batches(
        split.store,
        text.prompter,
        text.audio_tokens,
        text.pad_id,
        microbatches,
        with_target=False,
        pad_left=True,
        num_workers=config.data.num_workers,
        prefetch=config.data.prefetch,
    )
    for microbatch in batches:
        for bad in microbatch.bad:
            logger.warning("not decoded: %s in %s: %s", bad.key, bad.shard, bad.reason)
        rows = generate(
            model,
            microbatch.batch.to(device),
            max_new_tokens=config.generation.max_new_tokens,
            num_beams=config.generation.num_beams,
            length_penalty=config.generation.length_penalty,
            end_token_ids=(text.prompter.end_token_id,),
            pad_id=text.pad_id,
        )
        if microbatch.weight == 0:
            rows = []  # silence in place of what could not be read
        hypotheses = text.tokenizer.batch_decode(rows, skip_special_tokens=True)
        yield [
            Prediction(
                about.number, about.id, about.text, hypothesis.strip(), round(about.duration, 3)
            )
            for about, hypothesis in zip(microbatch.references, hypotheses, strict=True)
        ]


def load_trained(
    run: Path, overrides: Sequence[str], *, prefer: str, world: World
) -> tuple[Config, SpeechLLM, TextSide, Path]:
    """A run's model with its trained weights: the best checkpoint, the newest, or the one that
    `run` itself is. Several ranks of a run that shards frozen weights share them here too.

    Raises CheckpointError when there is none or it does not fit.
    """
    checkpoint = find_checkpoint(run, prefer=prefer)
    config = load_config(str(checkpoint / "config.yaml"), overrides)
    config = settle(config, world.device)
    text = prepare_text(config)
    if world.size > 1 and frozen_weights(config) != "whole":
        model = prepare_model(config, world.device, prefix=text.prefix, sharded=True)
        state = read_trainable(checkpoint, weights_only=True).without_moments()
        build_strategy(config, model, world).load_full_state(state)
    else:
        model = prepare_model(config, world.device, prefix=text.prefix)
        load_weights(model, checkpoint)
    return config, model.eval(), text, checkpoint


def load_weights(model: SpeechLLM, checkpoint: Path) -> None:
    """Copy a checkpoint's trained weights into the model; CheckpointError where they do not fit."""
    state = read_trainable(checkpoint, weights_only=True)
    parameters = model.trainable_parameters()
    state.refuse_unless_fits(parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.weights[name])


def generate_run(
    run: Path,
    splits: dict[str, str],
    overrides: Sequence[str],
    world: World,
    *,
    prefer: str = "best",
    part: Slice | None = None,
) -> dict[str, Path]:
    """Decode each split {name: shards} into RUN/predictions/NAME.jsonl and test_predictions.json.

    A decoding that was cut short goes on where it stopped, on any number of ranks; predictions made
    by another checkpoint or other settings are made anew. Returns the file of each split.

    part: decode no more than that, into a hidden file for `merge_slices`.
    """
    config, model, text, checkpoint = load_trained(run, overrides, prefer=prefer, world=world)
    run_dir = checkpoint.parents[1] if (run / "COMPLETE").is_file() else run
    with (checkpoint / "trainable.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    written = {}
    for name, patterns in splits.items():
        split = open_split(
            config,
            [patterns],
            text,
            key=f"--split {name}",
            budget=config.generation.microbatch_tokens,
        )
        maker = {
            "checkpoint": checkpoint.name,
            "weights": weights,
            "generation": config.generation.model_dump(mode="json"),
            "precision": config.precision,
            "encoder": config.model.encoder.model_dump(mode="json"),
            "llm": [config.model.llm.id, config.model.llm.revision],
            "prompt": config.model.prompt.model_dump(mode="json"),
            "seconds": [config.data.min_seconds, config.data.max_seconds],
            "data": split.corpus.fingerprint,
        }
        label = part.label(name) if part else name
        final = run_dir / "predictions" / (f".{label}.jsonl" if part else f"{name}.jsonl")
        _decode_split(final, label, part, maker, model, split, text, config, world)
        written[name] = final
        if world.is_main and part is None:
            _write_test_predictions(run_dir)
        world.barrier()
    return written


def merge_slices(run_dir: Path, names: Sequence[str], count: int) -> dict[str, Path]:
    """RUN/predictions/NAME.jsonl and test_predictions.json from `count` slices of each split.

    The same lines as one process writes. The slices stay, so that it may be done again.

    Raises UserError where a slice is missing, or where two are of different checkpoints, settings
    or data.
    """
    directory = run_dir / "predictions"
    written = {}
    for name in names:
        labels = [Slice(number, count).label(name) for number in range(1, count + 1)]
        missing = [label for label in labels if not (directory / f".{label}.jsonl").is_file()]
        if missing:
            raise UserError(
                f"{directory}: not decoded yet: {', '.join(missing)}; start these tasks again"
            )
        makers = [(directory / f".{label}.json").read_text(encoding="utf-8") for label in labels]
        for label, maker in zip(labels, makers, strict=True):
            if maker != makers[0]:
                raise UserError(
                    f"{directory}: {label} is of another checkpoint, other settings or other data "
                    f"than {labels[0]}: {maker}, {makers[0]}; decode all slices again"
                )
        rows = [row for label in labels for row in read_lines(directory / f".{label}.jsonl")]
        final = directory / f"{name}.jsonl"
        _write_final(final, rows)
        _write_whole(directory / f".{name}.json", makers[0])
        written[name] = final
        logger.info("%s: %d utterances in %d slices, %s", name, len(rows), count, final)
    _write_test_predictions(run_dir)
    return written


def _decode_split(
    final: Path,
    name: str,
    part: Slice | None,
    maker: dict[str, Any],
    model: SpeechLLM,
    split: Split,
    text: TextSide,
    config: Config,
    world: World,
) -> None:
    directory = final.parent
    done_file = directory / f".{name}.done.jsonl"
    found = None
    if world.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        _collect_done(directory, name, maker, final, done_file)
        found = [final.is_file(), [line["number"] for line in read_lines(done_file)]]
    # Told, not looked for: what another host sees of these files may be a minute old, and ranks
    # that disagree skip utterances or wait for each other.
    is_finished, done = world.from_main(found)
    if is_finished:
        logger.info("%s: already decoded, see %s", name, final)
        return
    if done:
        logger.info("%s: going on after %d decoded utterances", name, len(done))
    kept = _numbers_of(split, part, config)
    left = kept[~np.isin(kept, np.array(done, dtype=np.int64))]
    cut = decoded_together(config, split.costs, left)
    share = rank_share(len(cut), world.rank, world.size)
    if not model.sharded:  # else all ranks run as many, or the collectives would not match
        share = [(number, is_repeat) for number, is_repeat in share if not is_repeat]
    mine = [cut[number] for number, _ in share]
    rows = track(
        zip(share, decode(model, split, text, config, world.device, mine), strict=True),
        description=f"decoding {name}",
        total=len(mine),
        console=Console(stderr=True),
        disable=not world.is_main,
    )
    with (directory / f".{name}.part{world.rank}.jsonl").open("a", encoding="utf-8") as file:
        for (_, is_repeat), predictions in rows:
            if not is_repeat:
                file.writelines(_line(asdict(prediction)) for prediction in predictions)
                file.flush()
    world.barrier()
    if world.is_main:
        _collect_done(directory, name, maker, final, done_file)
        lines = read_lines(done_file)
        if part is None:
            _write_final(final, lines)
        else:
            _write_whole(final, "".join(map(_line, lines)))
        done_file.unlink(missing_ok=True)
        logger.info("%s: %d of %d utterances decoded, %s", name, len(lines), len(kept), final)


def decoded_together(config: Config, costs: np.ndarray, numbers: np.ndarray) -> list[np.ndarray]:
    """Microbatches of utterances of like length, longest first; under `preset: plain` of so many
    utterances as they come."""
    if config.performance.preset == "plain":
        size = config.performance.plain_utterances
        return [numbers[first : first + size] for first in range(0, len(numbers), size)]
    return plan_in_order(costs, numbers, config.generation.microbatch_tokens)


def _numbers_of(split: Split, part: Slice | None, config: Config) -> np.ndarray:
    """Utterances of the split that can be decoded, or those of a part of it."""
    kept = split.selection.kept
    if part is None:
        return kept
    own = decoded_together(config, split.costs, kept)[part.number - 1 :: part.count]
    return np.concatenate([kept[:0], *own])


def _write_final(final: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Predictions in the order of the corpus, without their numbers."""
    ordered = sorted(rows, key=lambda row: row["number"])
    lines = [{key: value for key, value in row.items() if key != "number"} for row in ordered]
    _write_whole(final, "".join(map(_line, lines)))


def _collect_done(
    directory: Path, name: str, maker: dict[str, Any], final: Path, done_file: Path
) -> None:
    """Merge what the ranks of an interrupted decoding left into one file, or, where another
    checkpoint or other settings made it, remove it."""
    about = directory / f".{name}.json"
    parts = list(directory.glob(f".{name}.part*.jsonl"))
    if about.is_file() and json.loads(about.read_text(encoding="utf-8")) == maker:
        lines = {line["number"]: line for file in [done_file, *parts] for line in read_lines(file)}
        if lines:
            _write_whole(done_file, "".join(map(_line, lines.values())))
    else:
        done_file.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
        _write_whole(about, json.dumps(maker))
    for part in parts:
        part.unlink()


def _write_test_predictions(run_dir: Path) -> None:
    """RUN/test_predictions.json: every decoded split in the columns that scoring scripts expect."""
    splits = {}
    for file in sorted((run_dir / "predictions").glob("[!.]*.jsonl")):
        lines = read_lines(file)
        splits[file.stem] = {
            "ids": [line["id"] for line in lines],
            "labels": [line["ref"] for line in lines],
            "predictions": [line["hyp"] for line in lines],
        }
    _write_whole(
        run_dir / "test_predictions.json", json.dumps(splits, ensure_ascii=False, indent=1)
    )


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
