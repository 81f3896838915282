"""`speechllm plan`: from a configuration to the text that is printed."""

from __future__ import annotations

import argparse
import logging

from speechllm.config.schema import Config
from speechllm.errors import ModelError, UserError
from speechllm.log import logger
from speechllm.model.hub import VOCABULARY, resolve
from speechllm.planner.advice import LARGEST_BUDGET, machine_here, make_plan
from speechllm.planner.architecture import read_architecture
from speechllm.planner.options import write_json
from speechllm.planner.table import plan_text
from speechllm.planner.workload import Utterance, assumed, of_split
from speechllm.prepare import Split, TextSide, prepare_text
from speechllm.training_data import open_training

ASSUMED = "utterances of 2 to 30 s assumed"
TOKENIZERS = ("tokenizer.json", *VOCABULARY)


def plan_command(config: Config, options: argparse.Namespace) -> str:
    """`options`: as `speechllm.planner.options` has them.

    Raises UserError for sizes that mean nothing and models whose shape is not known.
    """
    nodes = 1 if options.nodes is None else options.nodes
    machine = machine_here(config, options.gpus, nodes, options.gpu_memory)
    utterances, source = utterances_of(config)
    plan = make_plan(config, read_architecture(config.model), machine, utterances)
    if options.json not in (None, "-"):
        write_json(options.json, plan_text(plan, source=source, as_json_text=True))
    return plan_text(plan, source=source, as_json_text=options.json == "-")


def utterances_of(config: Config) -> tuple[list[Utterance], str]:
    """The lengths of data.train where it and the tokenizer are on this machine, else assumed ones;
    and which of the two, in words. Looks at nothing but this machine."""
    split, text = training_here(config, budget=LARGEST_BUDGET)
    if split is not None and text is not None:
        return of_split(split, text), "utterances as in data.train"
    missing = "no tokenizer or no data.train on this machine"
    if not config.data.training_shards:
        missing = "data.train is not set"
    return assumed(config), f"{ASSUMED} ({missing})"


def training_here(
    config: Config, *, budget: int | None = None
) -> tuple[Split | None, TextSide | None]:
    """What the configuration trains on, as far as it and the tokenizer are on this machine.

    budget: in place of data.microbatch_tokens.
    """
    if not config.data.training_shards:
        return None, None
    level = logger.level
    logger.setLevel(logging.ERROR)  # which utterances training would drop is not the question here
    try:
        local = _without_hub(config)
        text = prepare_text(local)
        return open_training(local, text, budget=budget), text
    except UserError:
        return None, None
    finally:
        logger.setLevel(level)


def _without_hub(config: Config) -> Config:
    """The LLM as a directory, so that the hub is not asked whether it has something newer."""
    llm = config.model.llm
    directory = resolve(llm.id, llm.revision, download=False)
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"{directory} holds no tokenizer")
    here = llm.model_copy(update={"id": str(directory), "revision": None})
    return config.model_copy(update={"model": config.model.model_copy(update={"llm": here})})
