from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import pytest

from speechllm.data.sending import BatchMemory


class Sums(Dataset):
    """Item i: a large tensor of the size that `sizes` gives, all i but for a last row of zeros, and
    how many segments the worker has."""

    def __init__(self, sizes: list[int], dtype: torch.dtype = torch.int16) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.memory = BatchMemory()

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        values = self.memory.empty((3, self.sizes[i]), self.dtype)
        values[:2], values[2] = i % 100, 0
        return values, self.memory.num_segments


class Small(Dataset):
    memory = BatchMemory()

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return [
            torch.arange(7),
            torch.zeros(0, 3),
            torch.tensor([[True], [False]]),
            torch.tensor(2.5, dtype=torch.bfloat16),
            torch.full((600, 600), i),  # too large to go by value
        ]


def from_worker(dataset: Dataset, count: int) -> Iterator:
    loader = DataLoader(
        dataset,
        sampler=range(count),
        batch_size=None,
        collate_fn=lambda item: item,
        num_workers=1,
        prefetch_factor=2,
        worker_init_fn=lambda worker: get_worker_info().dataset.memory.send(),
        multiprocessing_context="fork",
    )
    return iter(loader)


def is_item(values: torch.Tensor, i: int, size: int) -> bool:
    wanted = torch.zeros(3, size, dtype=values.dtype)
    wanted[:2] = i % 100
    return torch.equal(values, wanted)


def test_tensors_arrive_as_they_were_sent() -> None:
    for i, sent in enumerate(from_worker(Small(), 3)):
        for one, wanted in zip(sent, Small()[i], strict=True):
            assert one.dtype == wanted.dtype
            assert torch.equal(one, wanted)


@pytest.mark.parametrize("dtype", [torch.int16, torch.bfloat16, torch.int8])
def test_batches_that_go_share_a_few_segments(dtype: torch.dtype) -> None:
    sizes = [200_000 + 1_000 * (7 * i % 20) for i in range(60)]
    counts = []
    for i, (values, segments) in enumerate(from_worker(Sums(sizes, dtype), 60)):
        assert values.dtype == dtype
        assert is_item(values, i, sizes[i])
        counts.append(segments)
        del values
    assert max(counts) <= 6


def test_a_batch_that_is_held_stays_as_it_is_even_by_a_view_of_it() -> None:
    sizes = [100_000] * 40
    held, views = [], []
    for i, (values, _) in enumerate(from_worker(Sums(sizes), 40)):
        if i % 3 == 0:
            held.append((i, values))
        if i % 3 == 1:
            views.append((i, values[1, 5:9]))
        del values
    assert all(is_item(values, i, sizes[i]) for i, values in held)
    assert all((view == i).all() for i, view in views)


def test_larger_batches_take_the_place_of_smaller_ones() -> None:
    sizes = [400_000 * (1 + i // 5) for i in range(20)]
    counts = []
    for i, (values, segments) in enumerate(from_worker(Sums(sizes), 20)):
        assert is_item(values, i, sizes[i])
        counts.append(segments)
        del values
    assert max(counts) <= 6


def test_outside_a_worker_nothing_is_shared() -> None:
    assert not BatchMemory().empty((2, 3), torch.int16).is_shared()
