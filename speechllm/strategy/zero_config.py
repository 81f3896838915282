"""DeepSpeed's JSON files, of which only the ZeRO settings are taken: all else has an owner already.

Imports neither torch nor deepspeed, so that a wrong key is answered at once.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from speechllm.config.section import Section
from speechllm.errors import ConfigError

ZERO = "zero_optimization"
PRECISION, LOGGING = "precision", "train.log_every"
NEVER_SET = "nothing: it follows from data.microbatches_per_step and the number of ranks"
SUMMED = "nothing: gradients are summed over all ranks in fp32"
OPTIMIZER = "optim: AdamW of PyTorch, wherever its state is"
OWNERS = {  # DeepSpeed's key -> the key of our configuration that says the same
    "train_batch_size": "data.microbatches_per_step and data.microbatch_tokens",
    "train_micro_batch_size_per_gpu": "data.microbatch_tokens",
    "gradient_accumulation_steps": NEVER_SET,
    "managed_gradient_accumulation": NEVER_SET,
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim (lr, weight_decay, betas, eps)",
    "scheduler": "optim.schedule and optim.warmup_steps",
    "zero_allow_untested_optimizer": OPTIMIZER,
    "zero_force_ds_cpu_optimizer": OPTIMIZER,
    "fp16": PRECISION,
    "bf16": PRECISION,
    "bfloat16": PRECISION,
    "amp": PRECISION,
    "torch_autocast": PRECISION,
    "data_types": PRECISION,
    "communication_data_type": SUMMED,
    "seq_parallel_communication_data_type": SUMMED,
    "prescale_gradients": SUMMED,
    "gradient_predivide_factor": SUMMED,
    "gradient_allreduce_op": SUMMED,
    "sparse_gradients": SUMMED,
    "steps_per_print": LOGGING,
    "wall_clock_breakdown": LOGGING,
    "memory_breakdown": LOGGING,
    "dump_state": LOGGING,
    "log_level": LOGGING,
    "tensorboard": LOGGING,
    "wandb": LOGGING,
    "csv_monitor": LOGGING,
    "comet": LOGGING,
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "checkpoint": "train.checkpoint_every",
    "dataloader_drop_last": "data",
    "data_efficiency": "data",
    "curriculum_learning": "data",
}


class OptimizerOffload(Section):
    device: Literal["none", "cpu"]
    pin_memory: bool = True


class ParameterOffload(OptimizerOffload):
    buffer_count: int = Field(5, ge=0)
    buffer_size: int = Field(100_000_000, ge=0)
    max_in_cpu: int = Field(1_000_000_000, ge=0)


class ZeRO(Section):
    """The settings of `zero_optimization` that are served: those that change memory and traffic,
    and neither the numbers nor what must be compiled.

    Each was tried on two ranks. Not among them, with DeepSpeed 0.19.8: `round_robin_gradients` and
    `parameter_alignment` (weights come out in the places of others), and
    `stage3_module_granularity_threshold` (the backward fails).
    """

    stage: Literal[1, 2, 3]
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: int = Field(500_000_000, gt=0)
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: int = Field(500_000_000, ge=0)
    overlap_comm: bool | None = None
    offload_optimizer: OptimizerOffload | None = None
    offload_param: ParameterOffload | None = None
    sub_group_size: int = Field(1_000_000_000, ge=0)
    memory_efficient_linear: bool = True
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0)
    stage3_param_persistence_threshold: int = Field(100_000, ge=0)
    stage3_model_persistence_threshold: int = Field(2**63 - 1, ge=0)
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0)
    stage3_max_reuse_distance: int = Field(1_000_000_000, ge=0)
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    stage3_gather_16bit_weights_on_model_save: bool = False

    @property
    def param_on_cpu(self) -> bool:
        return self.offload_param is not None and self.offload_param.device == "cpu"

    @property
    def optimizer_on_cpu(self) -> bool:
        return self.offload_optimizer is not None and self.offload_optimizer.device == "cpu"


def read_zero_config(path: str) -> dict[str, Any]:
    """The content of a file as in ds_configs/, found right.

    Raises ConfigError that names the file, the key and the remedy.
    """
    content = _read(path)
    for key in content:
        if key in OWNERS:
            raise ConfigError(f"{path}: {key} belongs to {OWNERS[key]}; remove it from this file")
        if key != ZERO:
            near = difflib.get_close_matches(key, [ZERO, *OWNERS], n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(
                f"{path}: {key}: no such key{meant}; the file holds `{ZERO}` and nothing else"
            )
    if ZERO not in content:
        raise ConfigError(
            f'{path}: {ZERO} is missing; the least is {{"{ZERO}": {{"stage": 2}}}}, or take a file '
            "of ds_configs/"
        )
    settings = content[ZERO]
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: {ZERO}: expected a section of keys, got {settings!r}")
    if settings.get("stage", 0) == 0:
        raise ConfigError(
            f"{path}: {ZERO}.stage: 0 shards nothing and is not served (DeepSpeed then reports no "
            "gradient norm in fp32, and in bf16 begins with a step that is not one); "
            "strategy.kind=ddp is the same and right"
        )
    try:
        checked = ZeRO.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, error))) from None
    if checked.offload_param is not None and checked.stage != 3:
        raise ConfigError(
            f"{path}: {ZERO}.offload_param wants stage 3, where parameters are sharded; this is "
            f"stage {checked.stage}"
        )
    return content


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        folder = file.parent if file.parent.is_dir() else Path("ds_configs")
        there = ", ".join(str(other) for other in sorted(folder.glob("*.json")))
        found = f"; there are {there}" if there else ""
        raise ConfigError(f"strategy.config: {path}: no such file{found}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"strategy.config: {path}: cannot be read as text: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f'{path}: expected an object {{"{ZERO}": ...}} at the top level')
    return content


def _explain(path: str, error: ValidationError) -> list[str]:
    lines = []
    for details in error.errors(include_url=False):
        *sections, name = [str(part) for part in details["loc"]]
        key = ".".join([ZERO, *sections, name])
        if details["type"] == "extra_forbidden":
            cls = {"offload_optimizer": OptimizerOffload, "offload_param": ParameterOffload}
            valid = cls[sections[0]] if sections else ZeRO
            near = difflib.get_close_matches(name, valid.model_fields, n=1, cutoff=0.75)
            meant = (
                f"did you mean {near[0]}?" if near else f"known: {', '.join(valid.model_fields)}"
            )
            lines.append(f"{path}: {key}: not served; {meant}")
        elif details["input"] == "auto":
            lines.append(
                f"{path}: {key}: `auto` is a word of the Hugging Face Trainer; give a value, or "
                "leave the key out for DeepSpeed's own"
            )
        else:
            expected = details["msg"].removeprefix("Input should be ")
            lines.append(f"{path}: {key}: expected {expected}, got {details['input']!r}")
    return lines
