"""Audio that a shell command writes to its standard output."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess

from speechllm.errors import AudioError, UserError

_PR_SET_PDEATHSIG = 1
_STDERR_CHARACTERS = 500
# The command runs in the background of a shell that leads a process group: when this process dies,
# the kernel sends that shell SIGTERM, and it takes the whole group with it, pipelines included.
_GUARD = 'trap "kill -KILL 0" TERM; sh -c "$1" & wait $!'
_LIBC = ctypes.CDLL(None)


def run_command(command: str, timeout: float, directory: str | None = None) -> bytes:
    """What `sh -c COMMAND` writes, run in `directory`.

    It is killed with this process and after `timeout` seconds.

    Raises AudioError `command failed` for an exit code other than 0, for no end in time and for no
    output; its own messages are in the error.
    """
    process = subprocess.Popen(
        ["sh", "-c", _GUARD, "sh", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=directory,
        preexec_fn=_die_with_parent,
    )
    try:
        output, messages = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise AudioError(
            f"command failed: no end after {timeout:g} s: {command}; more time: --command-timeout"
        ) from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    said = messages.decode("utf-8", "replace").strip()[-_STDERR_CHARACTERS:]
    if process.returncode != 0:
        raise AudioError(f"command failed: exit code {process.returncode}: {command}: {said}")
    if not output:
        raise AudioError(f"command failed: no output: {command}: {said}")
    return _with_length(output)


def cached_output(command: str, timeout: float, cache: str, directory: str | None = None) -> str:
    """The path of a file with what the command writes; it runs only where there is none yet.

    Raises AudioError as `run_command` does, and UserError where the directory cannot be written:
    that is no fault of the utterance.
    """
    told = f"{directory}\0{command}".encode("utf-8", "surrogatepass")
    path = os.path.join(cache, f"{hashlib.sha256(told).hexdigest()[:32]}.wav")
    if os.path.exists(path):
        return path
    output = run_command(command, timeout, directory)
    aside = f"{path}.tmp-{os.uname().nodename}-{os.getpid()}"
    try:
        os.makedirs(cache, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(output)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(
            f"--command-cache {cache}: {path} cannot be written ({error}); free some space or "
            "choose another directory"
        ) from error
    return path


def _with_length(wav: bytes) -> bytes:
    """Programs that write a wav file into a pipe cannot go back to its header to tell its length.

    libsndfile takes too large a length for the rest of the file, but 0 for nothing.
    """
    if not wav.startswith(b"RIFF"):
        return wav
    at = 12
    while at + 8 <= len(wav):
        size = int.from_bytes(wav[at + 4 : at + 8], "little")
        if wav[at : at + 4] == b"data":
            rest = min(len(wav) - at - 8, 0xFFFFFFFF)
            return wav if size else wav[: at + 4] + rest.to_bytes(4, "little") + wav[at + 8 :]
        at += 8 + size + size % 2
    return wav


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
