"""Memory and speed of the layers of encoder and LLM: activation checkpointing, torch.compile.

Both work in place, so modules and parameters keep their names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable

from torch import nn

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from speechllm.errors import ConfigError, ModelError


def checkpoint_activations(model: PreTrainedModel) -> list[nn.Module]:
    """Keep only the inputs of each layer and run it again in the backward (Chen et al. 2016).

    Transformers does this only in layers whose own `training` is set, without a word otherwise.
    The caller sets that flag, on the returned layers and not on what they are made of: a frozen
    layer then computes what it does in eval mode.

    Raises:
        ModelError: the model cannot do it, or has dropout that the flag would turn on.
    """
    name = type(model).__name__
    layers = transformer_layers(model)
    if not layers or not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{name} does not support activation checkpointing; set "
            "train.activation_checkpointing=false."
        )
    for layer in layers:
        for key, value in vars(layer).items():
            if "drop" in key and isinstance(value, float) and value > 0:
                raise ModelError(
                    f"{name} has {key}={value} in its layers, which activation checkpointing would "
                    "turn on; set it to 0 in the model's config.json, or set "
                    "train.activation_checkpointing=false."
                )
    model.activation_checkpointing_enable({"use_reentrant": False})
    # Which also makes the embeddings of text require gradients; the non-reentrant kind needs none.
    model.disable_input_require_grads()
    return layers


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a Hugging Face transformer, in order; none in one that is built
    otherwise."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def compile_in_place(modules: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """torch.compile for inputs of any length; a module is compiled when it is first called.

    Layers of one class share their machine code: what counts is how many kinds of layer there are
    (and of calls: with or without a mask, one row or several), not how many layers. Where there
    are too many, torch says so and runs the rest uncompiled. Dropout draws other numbers than in
    uncompiled layers.

    Raises:
        ConfigError: there is no C++ compiler, without which nothing can be compiled.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile needs a C++ compiler, but {compiler} is not there; install g++, name "
            "another in the environment variable CXX, or set train.compile=false."
        )
    for module in modules:
        module.compile(dynamic=True, backend=backend)
