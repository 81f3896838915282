from __future__ import annotations

import atexit
import gc
import sys
import weakref

import pytest

from speechllm.garbage import CollectedBySteps, libraries_stay


class Knot:
    def __init__(self) -> None:
        self.myself = self


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_left_as_it_was_found(was_on: bool) -> None:
    before = gc.isenabled()
    (gc.enable if was_on else gc.disable)()
    try:
        with pytest.raises(KeyError), CollectedBySteps():  # noqa: PT012 - it is the end that counts
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0
            raise KeyError
        assert gc.isenabled() == was_on
        assert gc.get_freeze_count() == 0
    finally:
        (gc.enable if before else gc.disable)()


def test_what_a_step_leaves_is_collected_after_it() -> None:
    with CollectedBySteps() as garbage:
        fresh = weakref.ref(Knot())
        assert fresh() is not None
        garbage.collect(everything=False)
        assert fresh() is None
        knot = Knot()
        older = weakref.ref(knot)
        garbage.collect(everything=False)  # outlives one collection
        del knot
        garbage.collect(everything=False)
        assert older() is not None
        garbage.collect(everything=True)
        assert older() is None


def test_libraries_are_left_out_from_their_import_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with libraries_stay():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        atexit.unregister(gc.freeze)


def test_a_process_that_has_torch_already_is_left_as_it_is() -> None:
    with libraries_stay():
        assert gc.isenabled()
    assert gc.get_freeze_count() == 0
