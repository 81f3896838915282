"""What a process of the benchmark measures: one way to train, or nothing but its LLM's products.

Run by tools/bench_train.py with the address of a socket, steps of a round, CONFIG and overrides.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import transformers

from bench_train_flops import gemm_rates
from bench_train_variant import Variant

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.errors import UserError
from speechllm.log import logger
from speechllm.model.build import COMPUTE_DTYPES
from speechllm.planner.architecture import read_architecture
from speechllm.settle import settle
from speechllm.world import World, connected


class Subject:
    """The model is built when it is first needed. steps: of a round, see `Sample`."""

    def __init__(self, config: Config, world: World, steps: int) -> None:
        self.config = config
        self.world = world
        self.steps = steps
        self._variant: Variant | None = None

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """`gemm`, or a method of `Variant`. All ranks must ask the same."""
        if what == "gemm":
            return self._gemm(**arguments)
        if self._variant is None:
            self._variant = Variant(self.config, self.world, self.steps)
        answer: dict[str, Any] = getattr(self._variant, what)(**arguments)
        return answer

    def _gemm(self, rows: Sequence[int]) -> dict[str, Any]:
        """See `gemm_rates`."""
        precision = settle(self.config, self.world.device).precision
        llm = read_architecture(self.config.model).llm
        return gemm_rates(llm, rows, COMPUTE_DTYPES[precision], self.world.device)


def serve(address: str, steps: int, config_file: str, overrides: Sequence[str]) -> None:
    """Answer until the other side hangs up."""
    logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    config = load_config(config_file, overrides)
    with connected(config.device, alone_in_group=config.strategy.kind != "ddp") as world:
        subject = Subject(config, world, steps)
        stream = None
        if world.is_main:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(address)
            stream = connection.makefile("rw", encoding="utf-8")
        while True:
            line = stream.readline() if stream is not None else ""
            question = world.from_main(json.loads(line) if line else None)
            if question is None:
                return
            answer = subject.ask(**question)
            if stream is not None:
                stream.write(json.dumps(answer) + "\n")
                stream.flush()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
