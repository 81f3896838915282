"""Speaking a text: through the espeak-ng library, or through programs that a machine may have.

A speaker is `LANGUAGE+VARIANT` (the library) or `PROGRAM:VOICE`.
"""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import soundfile
from espeak import Espeak, Voice
from speech_voices import ACCENTS, Speech, speakers

from speechllm.errors import UserError

WORDS_A_MINUTE = 170  # flite's own, at duration_stretch 1
HERTZ = 100  # its male voices' mean pitch; 50 in our scale


def program_speakers() -> tuple[str, ...]:
    """Speakers of the programs `flite` and `espeak-ng` on the PATH, if any, to draw from.

    Of espeak-ng only the training variants: the others must stay unheard.
    """
    found: list[str] = []
    if shutil.which("flite"):
        # "Voices available: kal awb_time kal16 awb rms slt": kal has half the bandwidth, awb_time
        # knows the words of clock times only.
        listed = _run(["flite", "-lv"]).partition(":")[2].split()
        names = [f"flite:{name}" for name in listed if name in ("kal16", "awb", "rms", "slt")]
        found += names * len(ACCENTS.split())  # as often as a variant of espeak-ng
    if shutil.which("espeak-ng"):
        found += [f"espeak-ng:{name}" for name in speakers("validation")]
    return tuple(found)


def speak(text: str, speech: Speech) -> tuple[np.ndarray, int]:
    """int16 [N], mono, and its sample rate.

    Raises:
        UserError: the speaker does not exist or its program fails.
    """
    program, _, name = speech.speaker.rpartition(":")
    if not program:
        voice = Voice(name, speech.rate, speech.pitch, speech.pitch_range)
        return _library().speak(text, voice), _library().sample_rate
    with tempfile.TemporaryDirectory() as directory:
        wav = Path(directory, "speech.wav")
        _run(_command(program, name, text, speech, wav))
        return soundfile.read(wav, dtype="int16")


def _command(program: str, name: str, text: str, speech: Speech, wav: Path) -> list[str]:
    match program:
        case "flite":
            stretch = f"duration_stretch={WORDS_A_MINUTE / speech.rate:.2f}"
            pitch = f"int_f0_target_mean={HERTZ * (0.5 + speech.pitch / 100):.0f}"
            options = ["-voice", name, "--setf", stretch, "--setf", pitch]
            return ["flite", *options, "-t", text, "-o", str(wav)]
        case "espeak-ng":
            options = ["-v", name, "-s", str(speech.rate), "-p", str(speech.pitch)]
            return ["espeak-ng", *options, "-w", str(wav), text]
        case _:
            raise AssertionError(program)


@functools.cache
def _library() -> Espeak:
    return Espeak()


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"{command[0]} failed ({result.stderr.strip()}): use --engines library")
    return result.stdout
