"""How much of the frozen weights a rank reads and holds, measured by the kernel's own counts."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from safetensors.torch import load_file

import pytest
from forked_function import on_ranks
from runs import ROOT, TINY

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.model.hub import resolve
from speechllm.model.speech_llm import SpeechLLM
from speechllm.model.tiny import build_tiny_llm
from speechllm.prepare import prepare_model
from speechllm.strategy.build import build_strategy
from speechllm.world import World

pytestmark = pytest.mark.distributed

MIB = 1 << 20
# What loading writes besides weights: objects, and pages of the heap of all earlier tests, which
# differ from one order of tests to another by MiB. ZeRO-3 has flat buffers, too.
BESIDES, BESIDES_ZERO3 = 12 * MIB, 20 * MIB


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """47 MiB in fp32, nearly all of it in matrices whose rows can be shared evenly."""
    return build_tiny_llm(tmp_path_factory.mktemp("llm") / "llama", hidden=512, layers=5)


@pytest.fixture(scope="module")
def frozen(llm: Path) -> int:
    """Bytes of the frozen weights of LLM and encoder in fp32."""
    stored = load_file(llm / "model.safetensors")
    stored |= load_file(resolve("random:whisper") / "model.safetensors")
    return sum(t.nbytes for name, t in stored.items() if "decoder" not in name)


def config_of(llm: Path | str, *overrides: str) -> Config:
    return load_config(TINY, ["precision=fp32", f"model.llm.id={llm}", *overrides])


def read_bytes() -> int:
    """What this process has asked files for; pages of mapped files are not counted."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


def written_bytes() -> int:
    """Memory that this process has to itself because it has written there."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the heap only keeps for later is not held
    found = re.search(r"Private_Dirty: +(\d+)", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) * 1024


def mapped_bytes() -> dict[str, int]:
    """Pages of weight files in this process's memory: its own, and those others have mapped too."""
    found = {"private": 0, "shared": 0}
    of_weights = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            of_weights = line.endswith(".safetensors")
        elif of_weights and (match := re.match(r"(Private|Shared)_\w+: +(\d+)", line)):
            found[match[1].lower()] += int(match[2]) * 1024
    return found


def load(config: Config, world: World) -> dict[str, int]:
    """Load the model as the strategy has it; what the kernel counted meanwhile, in bytes."""
    # First a small one, for what is imported, and for the pages that this process, a fork of one
    # with the heap of all earlier tests, makes its own as soon as it counts references there.
    gc.freeze()
    tiny = config.model_copy(update={"model": config_of("random:llama").model})
    kept = [_build(tiny, world) for _ in range(2)]
    read, written = read_bytes(), written_bytes()
    model = _build(config, world)
    result = {"read": read_bytes() - read, "written": written_bytes() - written}
    del kept
    if config.strategy.kind == "ddp":
        for parameter in model.parameters():
            parameter.sum()  # looks at every page, as a forward does
        world.barrier()
    result |= mapped_bytes()
    result["held"] = sum(_local(p).nbytes for p in model.parameters() if not p.requires_grad)
    world.barrier()
    return result


def _build(config: Config, world: World) -> SpeechLLM:
    model = prepare_model(config, world.device, sharded=True)
    if config.strategy.kind == "fsdp2":
        build_strategy(config, model, world)
    return model


def _local(parameter: Any) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # where ZeRO-3 keeps a rank's share


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fsdp2_reads_and_holds_one_share(
    tmp_path: Path, llm: Path, frozen: int, ranks: int
) -> None:
    config = config_of(llm, "strategy.kind=fsdp2")
    for found in on_ranks(ranks, tmp_path, lambda world: load(config, world)):
        assert found["held"] == pytest.approx(frozen / ranks, rel=0.01)
        # Besides: headers, configuration, 260 rows of the embeddings for the connector's scale.
        assert frozen / ranks <= found["read"] <= frozen / ranks + 2 * MIB
        assert frozen / ranks <= found["written"] <= frozen / ranks + BESIDES
        assert found["private"] + found["shared"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_zero3_holds_one_share(tmp_path: Path, llm: Path, frozen: int, ranks: int) -> None:
    pytest.importorskip("deepspeed")
    config = config_of(
        llm, "strategy.kind=deepspeed", f"strategy.config={ROOT}/ds_configs/zero3.json"
    )
    for found in on_ranks(ranks, tmp_path, lambda world: load(config, world)):
        assert found["held"] == pytest.approx(frozen / ranks, rel=0.02)
        assert frozen / ranks <= found["written"] <= frozen / ranks + BESIDES_ZERO3


def test_ddp_maps_what_has_the_right_type_and_shares_it(
    tmp_path: Path, llm: Path, frozen: int
) -> None:
    for found in on_ranks(
        2, tmp_path, lambda world: load(config_of(llm, "strategy.kind=ddp"), world)
    ):
        assert found["held"] == frozen
        assert found["written"] <= BESIDES
        assert found["shared"] >= frozen
        assert found["private"] <= MIB
