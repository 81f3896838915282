import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

import pytest
from memory_corpus import (
    MemoryStore,
    build_prompter,
    facts,
    processes,
    take,
    train_loader,
)

from speechllm.data.prompt import Prompter
from speechllm.model.tiny import build_tiny_llm
from speechllm.types import Utterance


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return build_prompter(tmp_path_factory.mktemp("llm") / "tiny")


def test_workers_use_one_thread_and_no_thread_pool(prompter: Prompter) -> None:
    class Asking(MemoryStore):
        def read(self, i: int) -> Utterance:
            seen = f"{torch.get_num_threads()} {os.environ['TOKENIZERS_PARALLELISM']}"
            return Utterance(f"u{i}", np.ones(200, dtype=np.int16), seen)

    (data,) = take(train_loader(prompter, Asking(), num_workers=1), 1)
    assert {r.text for m in data.microbatches for r in m.references} == {"1 false"}


def test_stop_signals_reach_the_parent_and_spare_the_workers(prompter: Prompter) -> None:
    received = []
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    former = {n: signal.signal(n, lambda n, frame: received.append(n)) for n in numbers}
    try:
        before = processes()
        with closing(train_loader(prompter, num_workers=2).steps(0, 0)) as steps:
            first = next(steps)
            workers = processes() - before
            assert len(workers) == 2
            for number in numbers:
                signal_from_elsewhere(number, [*workers, os.getpid()])
            rest = list(itertools.islice(steps, 10))
            assert processes() - before == workers
        assert set(received) == set(numbers)
    finally:
        for n, handler in former.items():
            signal.signal(n, handler)
    whole = take(train_loader(prompter), 11)
    assert [facts(data) for data in [first, *rest]] == [facts(data) for data in whole]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def signal_from_elsewhere(number: int, pids: list[int]) -> None:
    """As a batch system does it: the sender is not the workers' parent."""
    subprocess.run(["kill", f"-{int(number)}", *map(str, pids)], check=True)


SCRIPT = """
import multiprocessing, os, sys
from types import SimpleNamespace
import torch
import numpy as np
from transformers import PreTrainedTokenizerFast
from speechllm.config.model import Prompt
from speechllm.data.loader import TrainLoader
from speechllm.data.plan import PlanSettings, plan_epoch
from speechllm.data.prompt import Prompter
from speechllm.types import Utterance

class Store:
    corpus = SimpleNamespace(cache=None)
    def read(self, i):
        return Utterance(str(i), np.full(160_000, 3, dtype=np.int16), "some words")

torch.distributed.init_process_group(
    "gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1
)
torch.distributed.all_reduce(torch.ones(1000))
torch.randn(800, 800) @ torch.randn(800, 800)
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
tokenizer(["in the parent's", "thread pool"] * 50)
prompter = Prompter(tokenizer, Prompt(), 0)
costs = np.full(400, 20)
settings = PlanSettings(0, 200, 4, 100)
loader = TrainLoader(
    Store(), prompter, lambda n: n // 10_000, 0,
    lambda epoch: plan_epoch(np.array([400]), costs, np.arange(400), settings, epoch),
    rank=0, world=1, num_workers=2, prefetch=2,
)
closed = loader.steps(0, 0)
next(closed)
closed.close()
assert not multiprocessing.active_children()
steps = loader.steps(0, 0)
kept = [next(steps) for _ in range(3)]
print(*[p.pid for p in multiprocessing.active_children()], flush=True)
"""


def test_in_the_middle_of_an_epoch_no_worker_is_left_and_nothing_is_said(tmp_path: Path) -> None:
    """However the parent ends, and beside the threads of gloo, of OpenMP and of the tokenizer."""
    directory = build_tiny_llm(tmp_path / "llm")
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    endings = {"sys.exit(99)": 99, "os.kill(os.getpid(), 9)": -9}
    parents = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT + ending, str(directory), str(tmp_path / str(code))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for ending, code in endings.items()
    ]
    workers = []
    for parent, code in zip(parents, endings.values(), strict=True):
        printed, told = parent.communicate(timeout=120)
        assert (parent.returncode, told) == (code, "")
        assert len(printed.split()) == 2
        workers += printed.split()
    for _ in range(150):
        if not any(os.path.exists(f"/proc/{pid}") for pid in workers):
            return
        time.sleep(0.1)
    pytest.fail(f"workers {workers} outlive their parents")
