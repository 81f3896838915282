"""From the tag in the configuration to the strategy."""

from __future__ import annotations

from speechllm.config.schema import Config
from speechllm.model.speech_llm import SpeechLLM
from speechllm.strategy.base import Strategy
from speechllm.strategy.ddp import DDPStrategy
from speechllm.world import World


def build_strategy(config: Config, model: SpeechLLM, world: World) -> Strategy:
    match config.strategy.kind:
        case "ddp":
            return DDPStrategy(model, config.optim, world)
