"""Fixtures that many tests share. Nothing outside pytest's temporary directories is written, except
that tests marked `models` keep the pretrained models in the user's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

import pytest
from speech_files import write_shards

from speechllm.log import close_logging

# One thread: tests share two cores with the processes that they start, and the spinning threads
# of several processes cost far more than they bring.
torch.set_num_threads(1)


# pytest-xdist hands out whole files in the order of collection. Those that take longest come first,
# so that none begins when the others have nothing left to do; the first two mostly wait.
LONGEST = (
    "grid/test_grid_survival.py", "grid/test_grid.py", "strategy/test_deepspeed.py",
    "strategy/test_matrix.py", "cluster/test_node.py", "test_train.py", "strategy/test_fsdp2.py",
    "model/test_layers.py", "test_failure.py", "planner/test_measured.py",
    "tools/test_bench_train.py", "strategy/test_adapted.py", "tools/test_parity.py",
    "planner/test_probe_strategies.py", "tools/test_recipes.py", "model/test_shortcuts.py",
    "test_caching.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    order = {here / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _random_models_in_a_temporary_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _logging_is_closed() -> Iterator[None]:
    yield
    close_logging()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 utterances of 0.3 to 2 s in several shards."""
    return write_shards(tmp_path_factory.mktemp("shards"), 48)
