"""`speechllm plan`: from a configuration to the text that is printed."""

from __future__ import annotations

import logging

from speechllm.config.schema import Config
from speechllm.errors import ModelError, UserError
from speechllm.log import logger
from speechllm.model.hub import VOCABULARY, resolve
from speechllm.planner.advice import LARGEST_BUDGET, machine_here, make_plan
from speechllm.planner.architecture import read_architecture
from speechllm.planner.table import plan_text
from speechllm.planner.workload import Utterance, assumed, of_split
from speechllm.prepare import Split, TextSide, prepare_text
from speechllm.training_data import open_training

ASSUMED = "utterances of 2 to 30 s assumed"
TOKENIZERS = ("tokenizer.json", *VOCABULARY)


def plan_command(
    config: Config, *, gpus: int | None, nodes: int, gpu_memory: str | None, as_json: bool
) -> str:
    """Raises UserError for sizes that mean nothing and models whose shape is not known."""
    machine = machine_here(config, gpus, nodes, gpu_memory)
    utterances, source = utterances_of(config)
    plan = make_plan(config, read_architecture(config.model), machine, utterances)
    return plan_text(plan, source=source, as_json_text=as_json)


def utterances_of(config: Config) -> tuple[list[Utterance], str]:
    """The lengths of data.train where it and the tokenizer are on this machine, else assumed ones;
    and which of the two, in words. Looks at nothing but this machine."""
    if not config.data.training_shards:
        return assumed(config), f"{ASSUMED} (data.train is not set)"
    level = logger.level
    logger.setLevel(logging.ERROR)  # which utterances training would drop is not the question here
    try:
        split, text = _train_split(config)
    except UserError:
        return assumed(config), f"{ASSUMED} (no tokenizer or no data.train on this machine)"
    finally:
        logger.setLevel(level)
    return of_split(config, split, text), "utterances as in data.train"


def _train_split(config: Config) -> tuple[Split, TextSide]:
    llm = config.model.llm
    directory = resolve(llm.id, llm.revision, download=False)
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"{directory} holds no tokenizer")
    here = llm.model_copy(update={"id": str(directory), "revision": None})
    local = config.model_copy(
        update={"model": config.model.model_copy(update={"llm": here})}
    )  # as a directory, so that the hub is not asked whether it has something newer
    text = prepare_text(local)
    return open_training(local, text, budget=LARGEST_BUDGET), text
