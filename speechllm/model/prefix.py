"""Keys and values of the prompt that every example begins with, computed once a run.

While nothing of the LLM trains they are constants: the LLM runs on what follows and only reads
them. Logits and gradients are those of the whole rows.

Shape legend: B rows, P tokens of the prefix, S new positions, N keys after gathering, G key heads,
E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from speechllm.config.performance import Performance

Layers = list[tuple[Tensor, Tensor]]  # keys and values [1, G, P, E] of each layer


class Prefix:
    """tokens: what all examples of a run begin with; fewer of them will do, see `cache`."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self._layers: Layers | None = None

    @torch.no_grad()
    def compute(self, llm: PreTrainedModel, device: torch.device) -> None:
        """Once; later calls do nothing. Runs the LLM, so where its weights are sharded all ranks
        must call it at the same time."""
        if self._layers is not None or not self.tokens:
            return
        tokens_1P = torch.tensor([self.tokens], device=device)
        written = DynamicCache(config=llm.config)
        with torch.compiler.set_stance("force_eager"):  # once, so not worth machine code
            llm.base_model(
                inputs_embeds=llm.get_input_embeddings()(tokens_1P),
                past_key_values=written,
                use_cache=False,  # said so, layers that are checkpointed have nothing to warn of
            )
        self._layers = []
        for layer in written.layers:
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            self._layers.append((layer.keys, layer.values))

    def length(self, opening: Sequence[int]) -> int:
        """With how many tokens of the prefix rows begin that have this opening."""
        pairs = zip(self.tokens, opening, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self), len(opening)))

    def keys_values(self, length: int) -> Layers:
        """Of the first `length` tokens."""
        assert self._layers is not None, "compute comes first"
        assert 0 < length <= len(self)
        return [(keys[:, :, :length], values[:, :, :length]) for keys, values in self._layers]

    def cache(self, length: int, order_N: Tensor | None = None) -> Cache:
        """The first `length` tokens in front of the keys that each row brings; then, where it is
        given, the keys of the only row in that order. Can be read any number of times."""
        return Cache(layers=[ReadOnlyLayer(*layer, order_N) for layer in self.keys_values(length)])

    def __len__(self) -> int:
        return len(self.tokens)


class ReadOnlyLayer(DynamicLayer):
    """One layer's share of the cache; its `update` does not ask which layer that is."""

    def __init__(self, keys_1GPE: Tensor, values_1GPE: Tensor, order_N: Tensor | None) -> None:
        super().__init__()
        self.lazy_initialization(keys_1GPE, values_1GPE)
        self.keys, self.values = keys_1GPE, values_1GPE
        self.order_N = order_N

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefix and new keys, prefix and new values; nothing is kept of the new ones."""
        assert self.keys is not None
        assert self.values is not None
        return self._behind(self.keys, key_states), self._behind(self.values, value_states)

    def _behind(self, prefix_1GPE: Tensor, new_BGSE: Tensor) -> Tensor:
        repeated_BGPE = prefix_1GPE.expand(len(new_BGSE), -1, -1, -1)
        whole = torch.cat((repeated_BGPE, new_BGSE), dim=2)
        return whole if self.order_N is None else whole.index_select(2, self.order_N)


def why_not_cached(
    performance: Performance, *, llm_trains: bool, longest_row: int | None
) -> str | None:
    """None where keys and values of the prefix are computed once a run; else why not, of which
    there is nothing to say where the configuration does not ask for it.

    longest_row: see the function of that name.
    """
    if performance.preset == "plain" or performance.prefix_cache == "off":
        return ""
    if llm_trains:
        return "something of the LLM trains, so keys and values of the prefix change"
    if longest_row == 0:
        return "the LLM has layers that keep no keys and values"
    return None


def masks_hold(longest: int, longest_row: int | None) -> bool:
    """Whether in rows of up to `longest` positions masks that begin with a prefix and keep examples
    apart say the same as the LLM's own."""
    return longest_row is None or longest <= longest_row


def longest_row(llm: PreTrainedModel) -> int | None:
    """Positions up to which every layer sees all that went before: the narrowest of sliding windows
    and chunks, None where there are none; 0 where some layers keep no keys (recurrent ones)."""
    layers = DynamicCache(config=llm.config).layers
    windows = [x.sliding_window for x in layers if type(x) is DynamicSlidingWindowLayer]
    if not layers or any(type(x) not in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers):
        return 0
    return min(windows, default=None)
