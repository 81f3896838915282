"""Where the time of a training step goes: timers at the boundaries of modules.

On CUDA the times are those of events on the stream, read after the step, so that nothing waits for
the device in between; on a CPU those of the clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from speechllm.model.layers import transformer_layers
from speechllm.model.speech_llm import SpeechLLM
from speechllm.strategy.base import Strategy, TrainableState

PHASES = (
    "load", "mel", "encoder", "connector", "llm_forward", "head", "backward", "optimizer",
    "communication",
)  # fmt: skip
# Parts of others: of the backward that of the LLM's layers alone; all that is in no phase.
DETAILS = ("llm_backward", "other")


class Timeline:
    """Seconds of each phase. Phases nest; a moment belongs to the innermost one."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._open: list[str] = []
        self._marks: list[tuple[Any, str]] = []  # a moment, and the phase that ends there
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._begun: dict[str, Any] = {}

    @property
    def current(self) -> str:
        return self._open[-1] if self._open else "other"

    def enter(self, phase: str) -> None:
        self._mark()
        self._open.append(phase)

    def become(self, phase: str) -> None:
        """The innermost phase ends and another one begins in its place."""
        self._mark()
        self._open[-1] = phase

    def leave(self) -> None:
        self._mark()
        self._open.pop()

    def begin_span(self, name: str) -> None:
        """Of something that lies within phases; the last beginning before its end counts."""
        self._begun[name] = self._now()

    def end_span(self, name: str) -> None:
        if name in self._begun:
            self._spans[name].append((self._begun.pop(name), self._now()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def read(self) -> dict[str, float]:
        """Seconds by phase and span since the last reading, outside of all phases. Waits for the
        device."""
        assert not self._open, self._open
        if self._on_cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for (before, _), (after, phase) in zip(self._marks, self._marks[1:], strict=False):
            spent[phase] += self._seconds(before, after)
        for name, pairs in self._spans.items():
            spent[name] += sum(self._seconds(*pair) for pair in pairs)
        self._marks, self._spans, self._begun = [], defaultdict(list), {}
        return dict(spent)

    def _mark(self) -> None:
        self._marks.append((self._now(), self.current))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, before: Any, after: Any) -> float:
        if self._on_cuda:
            return float(before.elapsed_time(after)) / 1000
        return float(after - before)


@dataclass
class Counts:
    """What encoder and LLM were run on, as their first layers saw it: rows, columns."""

    encoder_shapes: list[tuple[int, int]] = field(default_factory=list)
    llm_shapes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def encoder_frames(self) -> int:
        return sum(rows * frames for rows, frames in self.encoder_shapes)

    @property
    def llm_positions(self) -> int:
        return sum(rows * columns for rows, columns in self.llm_shapes)


class TimedStrategy:
    """A strategy whose forward, backward and update are phases of a timeline."""

    def __init__(self, strategy: Strategy, timeline: Timeline) -> None:
        self._strategy = strategy
        self._timeline = timeline
        self.model = strategy.model

    def microbatch(self, *, last: bool) -> AbstractContextManager[None]:
        return self._strategy.microbatch(last=last)

    def backward(self, loss: Tensor) -> None:
        with self._timeline.phase("backward"):
            self._strategy.backward(loss)

    def step(self, lr: float) -> Tensor | float:
        with self._timeline.phase("optimizer"):
            return self._strategy.step(lr)

    def full_state(self) -> TrainableState | None:
        return self._strategy.full_state()

    def load_full_state(self, state: TrainableState | None) -> None:
        self._strategy.load_full_state(state)


@contextmanager
def instrumented(model: SpeechLLM, timeline: Timeline, counts: Counts) -> Iterator[None]:
    """Hooks for the length of the block. The forward of the LLM ends with its last norm; the head
    is what comes after it up to the loss."""
    decoder = model.llm.base_model
    handles: list[Any] = [
        model.register_forward_pre_hook(lambda *_: timeline.enter("llm_forward")),
        model.register_forward_hook(lambda *_: timeline.leave(), always_call=True),
        decoder.register_forward_hook(_decoder_ended(timeline)),
    ]
    for part, phase in (
        (model.encoder, "encoder"),
        (model.encoder.log_mel, "mel"),
        (model.connector, "connector"),
    ):
        assert isinstance(part, nn.Module)
        handles.append(part.register_forward_pre_hook(_entering(timeline, phase)))
        handles.append(part.register_forward_hook(lambda *_: timeline.leave(), always_call=True))
    layers = transformer_layers(model.llm)
    if layers:
        handles.append(
            layers[0].register_forward_pre_hook(_llm_begins(timeline, counts), with_kwargs=True)
        )
    for layer in transformer_layers(model.encoder)[:1]:
        handles.append(layer.register_forward_pre_hook(_encoder_begins(counts), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(timeline: Timeline, phase: str) -> Callable[..., None]:
    return lambda *_: timeline.enter(phase)


def _decoder_ended(timeline: Timeline) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        if not hidden.requires_grad:  # the prefix, computed on its own, or the start of a CTC head
            return
        timeline.become("head")
        hidden.register_hook(lambda _: timeline.begin_span("llm_backward"))

    return hook


def _llm_begins(timeline: Timeline, counts: Counts) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        # Neither the prefix, which is computed on its own, nor layers that run again for the
        # backward.
        if not hidden.requires_grad or timeline.current != "llm_forward":
            return
        counts.llm_shapes.append((hidden.shape[0], hidden.shape[1]))
        hidden.register_hook(lambda _: timeline.end_span("llm_backward"))

    return hook


def _encoder_begins(counts: Counts) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        counts.encoder_shapes.append((hidden.shape[0], hidden.shape[1]))

    return hook
