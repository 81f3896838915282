"""What trains besides the connector: LoRA on the LLM, the last layers of the Whisper.

Both are fp32 and whole on the model's device whatever the strategy has done with the frozen weights
(left on meta, partitioned over the ranks), and their first values are the same under every one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transformers import PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.pytorch_utils import Conv1D

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.weights import WeightFiles

ALL_LINEAR = "all-linear"
ADAPTER = "default"  # peft's own name for the only adapter of a model


def add_lora(llm: PreTrainedModel, cfg: schema.LoRA, device: torch.device) -> None:
    """Low-rank updates (Hu et al. 2021, arXiv:2106.09685) beside linear layers of a frozen LLM.

    The layers become peft's: `NAME.weight` turns into `NAME.base_layer.weight`, beside it stand
    `NAME.lora_A.default.weight` [rank, in] and `NAME.lora_B.default.weight` [out, rank]. A is drawn
    from torch's random state as in the paper's code, B is zero, so at first the LLM is unchanged.

    Raises:
        ModelError: peft is not installed, or a target is no linear layer of this LLM.
    """
    refuse_unknown_targets(llm, cfg.targets)
    about = lora_config(cfg, ALL_LINEAR if takes_all(cfg) else list(cfg.targets))
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(about, llm, ADAPTER, low_cpu_mem_usage=True)
    for layer in llm.modules():
        if isinstance(layer, LoraLayer):
            # Autocast casts input and weight; peft would widen the input to fp32 before that.
            layer.cast_input_dtype_enabled = False
            for matrices in (layer.lora_A, layer.lora_B):
                matrix = matrices[ADAPTER]
                assert isinstance(matrix, nn.Linear)
                weight = torch.zeros(matrix.out_features, matrix.in_features)
                if matrices is layer.lora_A:
                    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                matrix.weight = nn.Parameter(weight.to(device))


def lora_config(cfg: schema.LoRA, targets: str | list[str]) -> Any:
    """peft's `LoraConfig`. Raises ModelError where peft is not installed."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelError(
            f"model.lora.rank is {cfg.rank}, but peft cannot be imported ({error}); "
            'pip install "speechllm[lora]", or set model.lora.rank=0.'
        ) from error
    alpha: Any = cfg.alpha  # any number will do, whatever peft's hint says
    return LoraConfig(
        r=cfg.rank, lora_alpha=alpha, lora_dropout=cfg.dropout, target_modules=targets
    )


def takes_all(cfg: schema.LoRA) -> bool:
    return cfg.targets == (ALL_LINEAR,)


def lora_dropouts(llm: nn.Module) -> list[nn.Module]:
    """The only parts of an LLM with LoRA that behave differently in training."""
    return [module for name, module in llm.named_modules() if name.endswith(".lora_dropout")]


def unfreeze_last_layers(
    encoder: WhisperEncoder, count: int, files: WeightFiles, device: torch.device
) -> None:
    """Let the last `count` layers of a frozen Whisper, and the norm after them, train.

    They are read again in fp32: what the frozen model holds may be rounded, or not be there.
    Convolutions, positions and the other layers stay frozen, and as nothing before the first
    unfrozen layer needs a gradient, autograd keeps no activations of it. Whisper's own dropout
    (zero in all released models) stays off.

    Raises:
        ModelError: there are fewer layers, or a weight is not in the files.
    """
    layers = encoder.layers
    refuse_too_many_layers(count, len(layers), files.directory)
    first = len(layers) - count
    tops = {f"layers.{number}": layers[number] for number in range(first, len(layers))}
    tops["layer_norm"] = encoder.layer_norm
    for top, module in tops.items():
        for name, _ in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = files.read(f"{top}.{name}").to(device, torch.float32)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(value))


def refuse_too_many_layers(count: int, there: int, model: Path | str) -> None:
    """Raise ModelError where `model.unfreeze_encoder_layers` is more than there are."""
    if count > there:
        raise ModelError(
            f"model.unfreeze_encoder_layers is {count}, but {model} has only {there} encoder "
            f"layers; set {there} or less."
        )


def refuse_unknown_targets(llm: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Raise ModelError, with the names there are, unless each is one of a linear layer."""
    if targets == (ALL_LINEAR,):
        return
    linear = [n for n, module in llm.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    unknown = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in linear)]
    if unknown:
        there = sorted({name.rpartition(".")[2] for name in linear})
        raise ModelError(
            f"model.lora.targets: no linear layer of {type(llm).__name__} is called "
            f"{', '.join(unknown)}; there are {', '.join(there)}, and all-linear takes all but the "
            "output matrix."
        )
