"""How the processes of a node ended, as one exit code and a reason. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from speechllm.cluster.group import AGAIN, PERSON, Result

WRONG_INPUT, LOST_LEASE = 2, 98  # of `python -m speechllm`


def verdict(
    launcher: int,
    ranks: Sequence[int | None],
    *,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    stopped: str | None,
    saves: bool,
) -> Result:
    """launcher: its exit code, or minus a signal; 0 also when the ranks left with AGAIN. ranks:
    those of the processes, None: unknown.

    before, after: RUN/status.json when they started and when they had ended; what stands there is
    of this start only where it has changed. stopped: why they were asked to stop. saves: whether
    the program saves then; another one only begins again.
    """
    codes = {code for code in ranks if code is not None}
    status: Mapping[str, Any] = after if after != before else {}
    state, why = status.get("state"), status.get("reason")
    because = f": {why}" if why else ""
    if launcher == 0 and AGAIN not in codes:
        return Result(0, "done")
    if WRONG_INPUT in codes:
        return Result(PERSON, f"the input is wrong{because or '; the log of the job says what'}")
    if LOST_LEASE in codes:
        return Result(AGAIN, "lost the lease: another run has written to the run directory")
    if PERSON in codes:
        return Result(PERSON, f"the program asks for a person (exit code {PERSON}){because}")
    if state == "done" and codes <= {0}:
        return Result(0, "done")
    if saves and (state == "saved" or AGAIN in codes):
        return Result(AGAIN, f"saved at step {status.get('step', '?')}: {why or stopped}")
    if stopped is not None:
        how = "before it could save" if saves else "before it was done"
        return Result(AGAIN, f"stopped by {stopped} {how}")
    if AGAIN in codes:
        return Result(AGAIN, f"the program asks to be run again{because}")
    failed = sorted(codes - {0})
    code = failed[0] if failed else _exit_code(launcher)
    return Result(code, f"the program failed with exit code {code}{because}")


def _exit_code(launcher: int) -> int:
    """As a shell says it: 137 for SIGKILL."""
    return 128 - launcher if launcher < 0 else launcher
