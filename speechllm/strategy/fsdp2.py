"""FSDP2: every weight, gradient and moment is cut by rows over the ranks (Zhao et al. 2023,
arXiv:2304.11277), and each rank reads only its own rows of the frozen weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_

from speechllm.config.schema import Config
from speechllm.config.schema import FSDP2Strategy as Settings
from speechllm.model.layers import transformer_layers
from speechllm.model.speech_llm import SpeechLLM
from speechllm.model.weights import FrozenWeights
from speechllm.optim import build_adamw, update, updates_made
from speechllm.strategy.base import TrainableState, agree_to_load
from speechllm.strategy.loss_scale import LossScale
from speechllm.world import World


class FSDP2Strategy:
    """See `speechllm.strategy.base.Strategy`. Never run with CUDA, though nothing is left out.

    Takes the model with its frozen weights on meta. Mixed precision is the model's own autocast.
    """

    def __init__(self, model: SpeechLLM, config: Config, world: World) -> None:
        assert isinstance(config.strategy, Settings)
        self.world = world
        self.mesh = init_device_mesh(world.device.type, (world.size,))
        self.keeps_gathered = not config.strategy.reshard_after_forward
        _shard(model, self.mesh, keep_gathered=self.keeps_gathered)
        _read_frozen_rows(model, FrozenWeights(config.model), world)
        model.sharded = world.size > 1
        self.model: Any = model
        self.parameters = model.trainable_parameters()
        self.optimizer = build_adamw(self.parameters, config.optim)
        self.max_grad_norm = config.optim.max_grad_norm
        self.loss_scale = LossScale(config.precision)

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(last)
        # What is still gathered after a backward need not be gathered for the next forward: the
        # root's weights, or all of them where the layers keep theirs.
        self.model.set_reshard_after_backward(last, recurse=self.keeps_gathered)
        yield

    def backward(self, loss: Tensor) -> None:
        # FSDP2 averages over ranks; the shares must be added.
        (loss * (self.world.size * self.loss_scale.value)).backward()

    def step(self, lr: float) -> Tensor | float:
        if self.loss_scale.moves:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(self.loss_scale.value)
        norm = _whole(clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        update(self.optimizer, lr=lr, norm=norm)
        if self.loss_scale.moves:
            self.loss_scale.update(finite=bool(norm.isfinite()), updates=self.updates)
        self.optimizer.zero_grad()
        return norm

    @property
    def updates(self) -> int:
        return updates_made(self.optimizer)

    def full_state(self) -> TrainableState | None:
        copies: dict[str, list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            whole = [_whole(part) for part in (parameter.detach(), *self._moments(parameter))]
            if self.world.is_main:
                copies[name] = [tensor.to("cpu", torch.float32, copy=True) for tensor in whole]
        if not self.world.is_main:
            return None
        weights, first, second = ({n: parts[i] for n, parts in copies.items()} for i in range(3))
        return TrainableState(weights, first, second, self.updates, self.loss_scale.saved())

    @torch.no_grad()
    def load_full_state(self, state: TrainableState | None) -> None:
        updates, scale = agree_to_load(state, self.parameters, self.world)
        self.loss_scale.load(scale)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # gathered weights would be the old ones
        for name, parameter in self.parameters.items():
            whole = [torch.empty(parameter.shape)] * 3
            if state is not None:
                whole = [state.weights[name], state.exp_avg[name], state.exp_avg_sq[name]]
            weight, exp_avg, exp_avg_sq = (
                distribute_tensor(tensor.to(self.world.device), self.mesh, [Shard(0)])
                for tensor in whole  # rank 0's; each rank gets its rows of it
            )
            parameter.copy_(weight)
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=self.world.device),
                "exp_avg": exp_avg,
                "exp_avg_sq": exp_avg_sq,
            }

    def _moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        state = self.optimizer.state.get(parameter)
        if not state:
            return torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"]


def _shard(model: SpeechLLM, mesh: DeviceMesh, *, keep_gathered: bool) -> None:
    """Each layer of encoder and LLM is gathered by itself. The rest is gathered from the forward to
    the end of the backward: the embeddings, which `SpeechLLM` calls outside of the LLM's forward,
    the output matrix, which may be the same tensor, and the connector, which is small."""
    for part in (model.encoder, model.llm):
        for layer in transformer_layers(part):
            fully_shard(layer, mesh=mesh, reshard_after_forward=not keep_gathered)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "generate")
    _fetch_nothing_below(_layers_with_backward(model)[:1])


def _layers_with_backward(model: SpeechLLM) -> list[nn.Module]:
    """In the order of the forward: those of the encoder that train, all of the LLM."""
    trained = [
        layer
        for layer in transformer_layers(model.encoder)
        if any(parameter.requires_grad for parameter in layer.parameters())
    ]
    return [*trained, *transformer_layers(model.llm)]


def _fetch_nothing_below(layers: Sequence[nn.Module]) -> None:
    """In its backward a layer has the one gathered that ran before it: here one of the frozen
    encoder, which has no backward. What is named in its place is gathered already."""
    for layer in layers:
        assert isinstance(layer, FSDPModule)
        layer.set_modules_to_backward_prefetch([layer])


def _read_frozen_rows(model: SpeechLLM, files: FrozenWeights, world: World) -> None:
    names = defaultdict(list)  # several where it is tied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            names[parameter].append(name)
    cut: dict[str, nn.Parameter] = {}
    for parameter, aliases in names.items():
        assert isinstance(parameter, DTensor)
        rows_a_rank = -(-len(parameter) // world.size)
        start = min(world.rank * rows_a_rank, len(parameter))
        rows = files.read(aliases, start, start + rows_a_rank)
        own = DTensor.from_local(
            rows.to(world.device, parameter.dtype),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        cut |= dict.fromkeys(aliases, nn.Parameter(own, requires_grad=False))
    model.load_state_dict(cut, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def _whole(tensor: Tensor) -> Tensor:
    """A collective where the tensor is spread over the ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
