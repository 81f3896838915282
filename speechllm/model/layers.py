"""Memory and speed of the layers of encoder and LLM: activation checkpointing, torch.compile.

Both work in place, so modules and parameters keep their names.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from speechllm.errors import ConfigError, ModelError
from speechllm.model.prefix import ReadOnlyLayer

# Kinds of calls that may be compiled, of layers of the encoder and the LLM together, for torch
# counts all their forwards as one function: with and without a mask, a prefix, several rows.
RECOMPILE_LIMIT = 16


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
    (and of calls: with or without a mask or a prefix, one row or several), not how many layers.
    Where there are more than RECOMPILE_LIMIT, torch says so and runs the rest uncompiled. Dropout
    draws other numbers than in uncompiled layers.

    Raises:
        ConfigError: there is no C++ compiler, without which nothing can be compiled.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile needs a C++ compiler, but {compiler} is not there; install g++, name "
            "another in the environment variable CXX, or set train.compile=false."
        )
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for module in modules:
        number = getattr(getattr(module, "self_attn", None), "layer_idx", None)
        if number is None:
            module.compile(dynamic=True, backend=backend)
            continue
        # Whose keys an attention reads it says by its layer's number, which would be a constant of
        # the machine code: another code for each layer. So the forward is given its own keys.
        module.register_forward_pre_hook(partial(_with_own_keys, number), with_kwargs=True)
        module.forward = torch.compile(module.forward, dynamic=True, backend=backend)


def _with_own_keys(
    number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cache = kwargs.get("past_key_values")
    if cache is not None and isinstance(cache.layers[number], ReadOnlyLayer):
        kwargs = {**kwargs, "past_key_values": cache.layers[number]}
    return args, kwargs
