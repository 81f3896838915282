from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from speech_models import asr, batch_of, model_config, noise

from speechllm.transfer import Transfer
from speechllm.types import Frames, SpecMasks


def test_every_tensor_of_a_batch_is_found_and_nothing_else_is_changed() -> None:
    plain = batch_of(model_config(), [asr(noise(2_000), (10, 11))])
    batch = replace(
        plain,
        masks=SpecMasks(torch.ones(1, 2, 2), torch.ones(1, 1, 2)),
        frames=Frames(torch.ones(1, 4, 3), None),
    )
    found = batch.map(lambda tensor: tensor + 1)
    for name in (field.name for field in fields(batch)):
        before, after = getattr(batch, name), getattr(found, name)
        if isinstance(before, Tensor):
            assert torch.equal(after, before + 1), name
        elif name not in ("masks", "frames"):
            assert after == before, name
    assert isinstance(found.masks, SpecMasks)
    assert [int(part.min()) for part in found.masks] == [2, 2]
    assert isinstance(found.frames, Frames)
    assert (int(found.frames[0].max()), found.frames[1]) == (2, None)
    assert int(batch.tokens_BS[0, 0]) == 5


def test_on_a_cpu_a_batch_is_what_it_was() -> None:
    class Batch:
        def to(self, device: torch.device) -> object:
            return (self, device)

    batch, cpu = Batch(), torch.device("cpu")
    assert Transfer(cpu)(batch) == (batch, cpu)  # type: ignore[arg-type, comparison-overlap]
