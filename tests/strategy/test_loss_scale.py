from __future__ import annotations

import pytest

from speechllm.strategy.loss_scale import DOUBLE_EVERY, INITIAL, LARGEST, LossScale


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_fp16_it_is_one_and_stays(precision) -> None:  # type: ignore[no-untyped-def]
    scale = LossScale(precision)
    scale.update(finite=False, updates=DOUBLE_EVERY)
    scale.load(64.0)
    assert scale.value == 1.0
    assert scale.saved() is None


def test_it_halves_on_overflow_and_doubles_after_many_updates() -> None:
    scale = LossScale("fp16")
    scale.update(finite=False, updates=3)
    assert scale.value == INITIAL / 2
    scale.update(finite=True, updates=4)
    assert scale.value == INITIAL / 2
    scale.update(finite=True, updates=DOUBLE_EVERY)
    assert scale.value == INITIAL


def test_it_stays_between_one_and_its_bound() -> None:
    scale = LossScale("fp16")
    for _ in range(40):
        scale.update(finite=False, updates=1)
    assert scale.value == 1.0
    for _ in range(40):
        scale.update(finite=True, updates=DOUBLE_EVERY)
    assert scale.value == LARGEST


def test_it_goes_on_from_a_checkpoint_and_starts_anew_after_another_precision() -> None:
    before = LossScale("fp16")
    before.update(finite=False, updates=1)
    after = LossScale("fp16")
    after.load(before.saved())
    assert after.value == before.value
    after.load(LossScale("bf16").saved())
    assert after.value == before.value
