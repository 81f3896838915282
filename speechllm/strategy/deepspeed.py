"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2) and weights (3) sharded over the ranks.

Rajbhandari et al. 2020, arXiv:1910.02054. DeepSpeed sees an fp32 model: mixed precision is the
model's own autocast and the loss scale is ours, so all strategies compute the same numbers.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speechllm.config.schema import Config
from speechllm.config.schema import DeepSpeedStrategy as Settings
from speechllm.errors import ConfigError
from speechllm.model.build import frozen_type
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim import build_adamw
from speechllm.strategy.base import TrainableState, agree_to_load
from speechllm.strategy.loss_scale import LossScale
from speechllm.strategy.zero_config import read_zero_config
from speechllm.world import World, read_environment

NO_COMPILER = "TORCHDYNAMO_DISABLE"


class DeepSpeedStrategy:
    """See `speechllm.strategy.base.Strategy`. Never run with CUDA, though nothing is left out."""

    def __init__(self, model: SpeechLLM, config: Config, world: World) -> None:
        deepspeed = _import_deepspeed(config)
        settings = _engine_settings(config)
        self.deepspeed = deepspeed
        self.stage: int = settings["zero_optimization"]["stage"]
        self.world = world
        self.parameters = model.trainable_parameters()
        self.shapes = {name: _without_storage(p) for name, p in self.parameters.items()}
        self.adamw = build_adamw(self.parameters, config.optim)
        self.loss_scale = LossScale(config.precision)
        self.updates = 0
        model.sharded = self.stage == 3 and world.size > 1
        with _without_compiler():
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=model if self.stage == 3 else _Trained(model),
                optimizer=self.adamw,
                config=settings,
                dist_init_required=False,
            )
        # DeepSpeed makes a group of its own, which would wait for as long as PyTorch likes.
        dist.distributed_c10d._set_pg_timeout(
            timedelta(seconds=config.collective_timeout), self.engine.data_parallel_group
        )
        self.model: nn.Module = self.engine
        self._make_moments()
        self._scale_losses()

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the shares must be added.
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.engine.step()  # unscales, and clips by a norm that it finds in the same way as PyTorch
        norm = float(self.engine.get_global_grad_norm())
        finite = math.isfinite(norm)
        assert finite != self.zero.overflow, "an update with a gradient that is not finite"
        self.updates += finite
        self.loss_scale.update(finite=finite, updates=self.updates)
        self._scale_losses()
        return norm

    def full_state(self) -> TrainableState | None:
        get_weight = self.deepspeed.utils.safe_get_full_fp32_param
        get_moment = self.deepspeed.utils.safe_get_full_optimizer_state
        state = TrainableState({}, {}, {}, self.updates, self.loss_scale.saved())
        for name, parameter in self.parameters.items():  # one at a time is whole on the device
            self._keep(state.weights, name, get_weight(parameter))
            self._keep(state.exp_avg, name, get_moment(parameter, "exp_avg"))
            self._keep(state.exp_avg_sq, name, get_moment(parameter, "exp_avg_sq"))
        return state if self.world.is_main else None

    @torch.no_grad()
    def load_full_state(self, state: TrainableState | None) -> None:
        self.updates, scale = agree_to_load(state, self.shapes, self.world)
        self.loss_scale.load(scale)
        self._scale_losses()
        for flat in self._flat_masters():
            self.adamw.state[flat]["step"].fill_(float(self.updates))
        set_weight = self.deepspeed.utils.safe_set_full_fp32_param
        set_moment = self.deepspeed.utils.safe_set_full_optimizer_state
        given = state if state is not None else TrainableState({}, {}, {}, self.updates)
        for name, parameter in self.parameters.items():
            weight = self._from_main(name, given.weights)
            set_weight(parameter, weight)
            # The master is not what the forward reads.
            with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(weight)
            set_moment(parameter, self._from_main(name, given.exp_avg), "exp_avg")
            set_moment(parameter, self._from_main(name, given.exp_avg_sq), "exp_avg_sq")

    def _scale_losses(self) -> None:
        if self.loss_scale.moves:
            self.zero.override_loss_scale(self.loss_scale.value)

    def _flat_masters(self) -> list[Tensor]:
        """This rank's shares of the fp32 weights: what AdamW has as its parameters."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        return list(self.zero.single_partition_of_fp32_groups)

    def _make_moments(self) -> None:
        """As AdamW's first update would. DeepSpeed links the moments to the parameters after its
        first update of the first group, when those of a second group do not exist yet."""
        for flat in self._flat_masters():
            self.adamw.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _keep(self, tensors: dict[str, Tensor], name: str, whole: Tensor) -> None:
        if self.world.is_main:
            tensors[name] = whole.detach().to("cpu", torch.float32, copy=True)

    def _from_main(self, name: str, tensors: dict[str, Tensor]) -> Tensor:
        whole = torch.empty_like(self.shapes[name], device=self.world.device)
        if self.world.is_main:
            whole.copy_(tensors[name])
        if self.world.size > 1:
            dist.broadcast(whole, src=0)
        return whole


class _Trained(nn.Module):
    """The model with nothing but what trains for its parameters. Stages 1 and 2 leave frozen
    weights alone, but DeepSpeed would send every parameter it sees from rank 0 to all others, and
    so make each rank own a copy of what they may share."""

    def __init__(self, model: SpeechLLM) -> None:
        super().__init__()
        for name, parameter in model.trainable_parameters().items():
            self.register_parameter(name.replace(".", "/"), parameter)
        self.run = model.__call__  # no submodule

    def forward(self, *arguments: Any) -> Any:
        return self.run(*arguments)


@contextmanager
def _without_compiler() -> Iterator[None]:
    """torch.compile leaves within as it is what it is given. DeepSpeed compiles an optimizer of its
    own, to see that ours is another, and brings in all of torch's compiler for it: 4 s of CPU."""
    before = os.environ.get(NO_COMPILER)
    os.environ[NO_COMPILER] = "1"
    try:
        yield
    finally:
        del os.environ[NO_COMPILER]
        if before is not None:
            os.environ[NO_COMPILER] = before


@contextmanager
def partitioned_loading(config: Config, device: torch.device) -> Iterator[None]:
    """Pretrained models that are loaded within are partitioned over the ranks as they come in:
    stage 3. What is built by other means is whole, the same on every rank and with any strategy.

    Raises ConfigError where deepspeed or accelerate is not installed.
    """
    _import_deepspeed(config)
    try:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        settings = _engine_settings(config)
        assert config.precision != "auto", "settle comes first"
        if frozen_type(config.model, config.precision, device) == torch.bfloat16:
            settings["bf16"] = {"enabled": True}  # the type that weights are stored in
        alive = HfDeepSpeedConfig(settings)
    except ImportError as error:
        raise _not_installed(error) from error
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


def _import_deepspeed(config: Config) -> Any:
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read once, at the import
    local_rank = read_environment()[2] if on_cpu else torch.cuda.current_device()
    os.environ["LOCAL_RANK"] = str(local_rank)  # where it looks for its device
    try:
        import deepspeed
    except ImportError as error:
        raise _not_installed(error) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Of PyTorch, several a step, about collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+_tensor", FutureWarning)
    if on_cpu:
        # Nothing it could compile is wanted: its collectives through shared memory take 40 s, and
        # fail where there is no compiler. To look what could be runs the compiler too.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _not_installed(error: ImportError) -> ConfigError:
    return ConfigError(
        f'strategy.kind=deepspeed: {error}; pip install "speechllm[deepspeed]", or take '
        "strategy.kind=fsdp2"
    )


def _engine_settings(config: Config) -> dict[str, Any]:
    assert isinstance(config.strategy, Settings)
    return {
        **read_zero_config(config.strategy.config),
        "train_micro_batch_size_per_gpu": 1,  # it wants one, and does nothing with it
        "gradient_accumulation_steps": 1,  # as `microbatch` says
        "gradient_clipping": config.optim.max_grad_norm,
        # With state on the CPU it asks for its own Adam, which is compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
    }


def _without_storage(parameter: nn.Parameter) -> Tensor:
    """Of the same shape, which a sharded parameter no longer has."""
    return torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
