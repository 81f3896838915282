"""What the checkpoints of a run belong to: a run resumes only where all of it is the same."""

from __future__ import annotations

from typing import Any

from speechllm.config.schema import Config
from speechllm.model.identity import identity
from speechllm.prepare import Split, TextSide
from speechllm.training_data import data_identity


def run_identity(config: Config, text: TextSide, train: Split) -> dict[str, Any]:
    """Models, data and the settings that give the weights their meaning, by name.

    Raises ModelError where a model cannot be found or read.
    """
    return identity(config.model, text.tokenizer) | _meaning(config) | data_identity(config, train)


def _meaning(config: Config) -> dict[str, Any]:
    """Settings under which the same weights would mean something else, though they fit.

    None is what a checkpoint without the key means.
    """
    model = config.model.model_dump(mode="json")
    lora = model["lora"]
    return {
        "model.connector": {k: v for k, v in model["connector"].items() if k != "dropout"},
        "model.encoder.context": model["encoder"].get("context"),
        "model.prompt": model["prompt"],
        "model.lora": {k: v for k, v in lora.items() if k != "dropout"} if lora["rank"] else None,
        "model.unfreeze_encoder_layers": config.model.unfreeze_encoder_layers or None,
    }
