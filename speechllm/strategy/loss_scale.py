"""The scale that keeps small fp16 gradients from vanishing (Micikevicius et al. 2018)."""

from __future__ import annotations

from typing import Literal

INITIAL, LARGEST = 2.0**16, 2.0**24
DOUBLE_EVERY = 2000  # updates


class LossScale:
    """One and fixed unless compute is fp16.

    All ranks call `update` with the same arguments, so all have the same scale. Where it goes
    follows from its value and the number of updates, which a checkpoint has.
    """

    def __init__(self, precision: Literal["auto", "fp32", "bf16", "fp16"]) -> None:
        self.moves = precision == "fp16"
        self.value = INITIAL if self.moves else 1.0

    def update(self, *, finite: bool, updates: int) -> None:
        """After a step: `updates` is how many the optimizer has made, this one included."""
        if not self.moves:
            return
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif updates % DOUBLE_EVERY == 0:
            self.value = min(self.value * 2, LARGEST)

    def saved(self) -> float | None:
        """For the checkpoint: None where there is nothing to go on from."""
        return self.value if self.moves else None

    def load(self, saved: float | None) -> None:
        """Take over what `saved` gave; a run that had no moving scale leaves the initial one."""
        if self.moves and saved is not None:
            self.value = saved
