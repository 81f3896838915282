"""One process, or DistributedDataParallel over several: every rank holds everything."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from speechllm.config.schema import Config
from speechllm.model.speech_llm import SpeechLLM
from speechllm.optim import build_adamw, update, updates_made
from speechllm.strategy.base import TrainableState, agree_to_load
from speechllm.strategy.loss_scale import LossScale
from speechllm.world import World


class DDPStrategy:
    """See `speechllm.strategy.base.Strategy`."""

    def __init__(self, model: SpeechLLM, config: Config, world: World) -> None:
        self.parameters = model.trainable_parameters()
        self.optimizer = build_adamw(self.parameters, config.optim)
        self.max_grad_norm = config.optim.max_grad_norm
        self.loss_scale = LossScale(config.precision)
        self.world = world
        self.model: nn.Module = model
        if world.size > 1:
            # init_sync would broadcast the frozen LLM too; every rank has read the same files, and
            # what trains is drawn from the seed, but is sent once to be certain of it.
            self._broadcast(self.parameters.values())
            with warnings.catch_warnings():
                # Newer torch deprecates the only name that older torch knows.
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                self.model = DistributedDataParallel(
                    model, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        if last or not isinstance(self.model, DistributedDataParallel):
            yield
        else:
            with self.model.no_sync():
                yield

    def backward(self, loss: Tensor) -> None:
        # DDP averages over ranks; the shares must be added.
        (loss * (self.world.size * self.loss_scale.value)).backward()

    def step(self, lr: float) -> Tensor | float:
        if self.loss_scale.moves:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            torch._foreach_div_(gradients, self.loss_scale.value)
        norm = clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        update(self.optimizer, lr=lr, norm=norm)
        if self.loss_scale.moves:
            self.loss_scale.update(finite=bool(norm.isfinite()), updates=self.updates)
        self.optimizer.zero_grad()
        return norm

    @property
    def updates(self) -> int:
        return updates_made(self.optimizer)

    def full_state(self) -> TrainableState | None:
        if not self.world.is_main:
            return None
        moments = {name: self._moments(p) for name, p in self.parameters.items()}
        return TrainableState(
            weights={name: _copy(p) for name, p in self.parameters.items()},
            exp_avg={name: _copy(first) for name, (first, _) in moments.items()},
            exp_avg_sq={name: _copy(second) for name, (_, second) in moments.items()},
            step=self.updates,
            loss_scale=self.loss_scale.saved(),
        )

    @torch.no_grad()
    def load_full_state(self, state: TrainableState | None) -> None:
        updates, scale = agree_to_load(state, self.parameters, self.world)
        self.loss_scale.load(scale)
        for name, parameter in self.parameters.items():
            moments = [torch.zeros_like(parameter), torch.zeros_like(parameter)]
            if state is not None:
                parameter.copy_(state.weights[name])
                moments[0].copy_(state.exp_avg[name])
                moments[1].copy_(state.exp_avg_sq[name])
            self._broadcast([parameter, *moments])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates), device=self.world.device),
                "exp_avg": moments[0],
                "exp_avg_sq": moments[1],
            }

    def _moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        state = self.optimizer.state.get(parameter)
        if not state:
            return torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"]

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        if self.world.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
