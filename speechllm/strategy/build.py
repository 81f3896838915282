"""From the tag in the configuration to the strategy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from speechllm.config.schema import Config
from speechllm.model.speech_llm import SpeechLLM
from speechllm.strategy.base import Strategy
from speechllm.strategy.ddp import DDPStrategy
from speechllm.world import World


def build_strategy(config: Config, model: SpeechLLM, world: World) -> Strategy:
    match config.strategy.kind:
        case "ddp":
            return DDPStrategy(model, config, world)
        case "fsdp2":
            from speechllm.strategy.fsdp2 import FSDP2Strategy

            return FSDP2Strategy(model, config, world)
        case "deepspeed":
            from speechllm.strategy.deepspeed import DeepSpeedStrategy

            return DeepSpeedStrategy(model, config, world)


def frozen_weights(config: Config) -> Literal["whole", "meta", "partitioned"]:
    """Where the model's frozen weights are when the strategy gets it: on every rank, nowhere yet
    (fsdp2 reads each rank's share), or partitioned over the ranks while they were loaded (ZeRO-3).
    """
    match config.strategy.kind:
        case "ddp":
            return "whole"
        case "fsdp2":
            return "meta"
        case "deepspeed":
            from speechllm.strategy.zero_config import read_zero_config

            stage = read_zero_config(config.strategy.config)["zero_optimization"]["stage"]
            return "partitioned" if stage == 3 else "whole"


def loading(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """Around the building of a model whose weights the strategy partitions while they load."""
    if frozen_weights(config) != "partitioned":
        return nullcontext()
    from speechllm.strategy.deepspeed import partitioned_loading

    return partitioned_loading(config, device)
