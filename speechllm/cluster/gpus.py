"""GPUs of this host for this job, claimed as the site wants it and held for the life of the job.

A claim is let go by the kernel when its holder dies, however it dies: locks are flocks on files of
the host's own disk, and the process that holds a claim of the package safe_gpu ends with us.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from speechllm.cluster.sections import (
    Claim,
    CommandClaim,
    LocksClaim,
    NoClaim,
    SafeGpuClaim,
    SchedulerClaim,
)
from speechllm.cluster.signals import ignore_stop_signals
from speechllm.errors import UserError

RETRY = 2.0
# Devices that a site's tool named are locked too: it may name the same ones to two jobs at a time.
COMMAND_LOCKS = "/tmp/speechllm-gpus"


class GpuError(UserError):
    """There are not as many GPUs as the job wants, or the way to claim them does not work."""


class GpusBusy(GpuError):
    """Others hold them for now."""


@dataclass(frozen=True)
class Claimed:
    """devices: as in CUDA_VISIBLE_DEVICES; None: nothing was claimed, the variable stays."""

    devices: tuple[str, ...] | None

    @property
    def environment(self) -> dict[str, str]:
        if self.devices is None:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)}


@contextmanager
def claim_gpus(
    claim: Claim,
    count: int,
    *,
    patience: float = 0.0,
    give_up: Callable[[], bool] = lambda: False,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Claimed]:
    """Hold `count` GPUs for the length of the block.

    patience: seconds to try again while others hold them. give_up: asked between two tries.

    Raises GpusBusy when patience has ended or `give_up` says so, GpuError for what waiting will not
    mend.
    """
    deadline = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                claimed = _claim(claim, count, stack, environment)
                break
            except GpusBusy:
                stack.close()
                if time.monotonic() > deadline or give_up():
                    raise
                time.sleep(min(RETRY, max(patience / 10, 0.1)))
        yield claimed


def _claim(claim: Claim, count: int, stack: ExitStack, environment: Mapping[str, str]) -> Claimed:
    if count == 0:
        return Claimed(None)
    match claim:
        case NoClaim():
            return Claimed(None)
        case SchedulerClaim():
            return Claimed(_from_scheduler(claim.variable, count, environment))
        case LocksClaim():
            number = claim.devices if claim.devices is not None else _count_devices()
            devices = [str(device) for device in range(number)]
            if number < count:
                raise GpuError(f"gpu_claim: locks: {count} GPUs wanted, this host has {number}")
            return Claimed(_lock(Path(claim.folder), devices, count, stack))
        case CommandClaim():
            return Claimed(_ask_command(claim.command, count, stack))
        case SafeGpuClaim():
            return Claimed(_hold_safe_gpu(count, stack))


def _from_scheduler(variable: str, count: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES has commas, Grid Engine's SGE_HGR_gpu blanks and names as in gpu0."""
    text = environment.get(variable)
    if text is None:
        raise GpuError(
            f"gpu_claim: scheduler: {variable} is not set in the job; correct "
            "gpu_claim.variable, or claim GPUs in another way"
        )
    words = re.split(r"[,\s]+", text.strip())
    devices = tuple(re.sub(r"^(?:gpu|cuda|nvidia)(?=\d+$)", "", word) for word in words if word)
    if len(devices) < count:
        raise GpuError(f"{variable}={text!r} names {len(devices)} GPUs, the job wants {count}")
    return devices[:count]


def _lock(folder: Path, devices: Sequence[str], count: int, stack: ExitStack) -> tuple[str, ...]:
    """Lock the first `count` devices that are free; all or none."""
    held: list[str] = []
    with ExitStack() as locks:
        for device in devices:
            descriptor = _open_for_all(folder / f"{device}.lock")
            locks.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            held.append(device)
            if len(held) == count:
                stack.push(locks.pop_all())
                return tuple(held)
    raise GpusBusy(f"{count} GPUs wanted, {len(held)} of {len(devices)} are free on this host")


def _open_for_all(file: Path) -> int:
    """Other users of the host lock the same files."""
    try:
        # Linux may refuse O_CREAT for another user's file in a sticky folder (protected_regular).
        return os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        former = os.umask(0)
        try:
            file.parent.mkdir(mode=0o1777, parents=True, exist_ok=True)
            return os.open(file, os.O_RDONLY | os.O_CREAT, 0o666)
        finally:
            os.umask(former)


def _count_devices() -> int:
    return len(_run(["nvidia-smi", "-L"], "gpu_claim.devices").splitlines())


def _ask_command(command: Sequence[str], count: int, stack: ExitStack) -> tuple[str, ...]:
    words = [word.replace("{count}", str(count)) for word in command]
    output = _run(words, "gpu_claim.command")
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if not re.fullmatch(r"\s*[\w:.-]+(?:[,\s]+[\w:.-]+)*,?\s*", last):
        raise GpusBusy(f"gpu_claim.command: {' '.join(words)} names no GPU: {output.strip()!r}")
    devices = re.split(r"[,\s]+", last.strip(" ,"))
    if len(devices) < count:
        raise GpusBusy(f"gpu_claim.command: {count} GPUs wanted, {last.strip()!r} are free")
    return _lock(Path(COMMAND_LOCKS), devices[:count], count, stack)


def _run(words: Sequence[str], key: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise GpuError(f"{key}: {words[0]} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise GpusBusy(
            f"{key}: {' '.join(words)} ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        )
    return done.stdout


# The package marks devices by using them, so a process of its own must live as long as the job.
_SAFE_GPU_HOLDER = """\
import os, sys
from safe_gpu import safe_gpu
safe_gpu.claim_gpus(int(sys.argv[1]))
print("devices", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def _hold_safe_gpu(count: int, stack: ExitStack) -> tuple[str, ...]:
    """Claim by https://pypi.org/project/safe-gpu; never run on a host with GPUs."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _SAFE_GPU_HOLDER, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore_stop_signals,  # the job still saves when it is warned
    )
    stack.callback(_end, holder)
    assert holder.stdout is not None
    for line in holder.stdout:
        if line.startswith("devices "):
            return tuple(line.split()[1].split(","))
    assert holder.stderr is not None
    errors = holder.stderr.read().strip()
    if "No module named" in errors:
        raise GpuError("gpu_claim: safe_gpu is not installed; run: pip install safe-gpu")
    raise GpusBusy(f"gpu_claim: safe_gpu: {errors[-300:]}")


def _end(holder: subprocess.Popen[str]) -> None:
    """Its standard input ends, as it does by itself when we are killed."""
    holder.communicate()
