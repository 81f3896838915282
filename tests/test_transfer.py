from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from speechllm.transfer import Transfer, mapped


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


@dataclass
class Held:
    name: str
    tensor: Tensor
    pair: Pair
    more: tuple[list[Tensor], int]


def test_every_tensor_is_found_and_nothing_else_is_changed() -> None:
    held = Held("a", torch.ones(2), Pair(torch.ones(1), None), ([torch.ones(3)], 7))
    found = mapped(held, lambda tensor: tensor + 1)
    assert (found.name, found.pair.right, found.more[1]) == ("a", None, 7)
    tensors = [found.tensor, found.pair.left, found.more[0][0]]
    assert [tensor.tolist() for tensor in tensors] == [[2, 2], [2], [2, 2, 2]]
    assert isinstance(found.pair, Pair)
    assert held.tensor.tolist() == [1, 1]


def test_on_a_cpu_a_batch_is_what_it_was() -> None:
    class Batch:
        def to(self, device: torch.device) -> object:
            return (self, device)

    batch, cpu = Batch(), torch.device("cpu")
    assert Transfer(cpu)(batch) == (batch, cpu)  # type: ignore[arg-type, comparison-overlap]
