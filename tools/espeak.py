"""Speech synthesis through the espeak-ng library that the PyPI package `espeakng-loader` ships.

The calls are those of espeak-ng's public headers `speak_lib.h` and `espeak_ng.h`. The library keeps
its state in global variables, so one thread of a process may use it at a time, and what it speaks
depends on what it spoke before: of 89 variants all gave other samples when another text had gone
ahead. The same texts in the same order in a new process give the same samples.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import espeakng_loader

from speechllm.errors import UserError

OUTPUT_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: hand the samples to the callback, play nothing
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER
POSITION_CHARACTER = 1
CHARS_UTF8 = 1
OK = 0
Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Voice:
    """name: language and variant, such as `en-us+f3`. rate: words a minute (80 to 450).
    pitch, pitch_range: 0 to 100, 50 is the variant's own."""

    name: str
    rate: int = 175
    pitch: int = 50
    pitch_range: int = 50


class Espeak:
    """The one synthesiser of a process.

    Raises:
        UserError: the library cannot be loaded or finds no voice data.
    """

    def __init__(self) -> None:
        path = espeakng_loader.get_library_path()
        mend = "Reinstall it: pip install --force-reinstall espeakng-loader"
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise UserError(f"The synthesiser {path} cannot be loaded ({error}). {mend}") from error
        data = espeakng_loader.get_data_path()
        self.sample_rate: int = self._library.espeak_Initialize(
            OUTPUT_SYNCHRONOUS, 0, data.encode(), 0
        )
        if self.sample_rate <= 0:
            raise UserError(f"espeak-ng does not start with its voices in {data}. {mend}")
        # Without this the noise in breathy voices is seeded by the clock.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._variants = Path(data, "voices", "!v")
        self._pieces: list[np.ndarray] = []
        self._callback = Callback(self._keep)  # the library holds no reference of its own
        self._library.espeak_SetSynthCallback(self._callback)

    def _keep(self, samples: Any, count: int, _events: int) -> int:
        if count > 0:  # a call without samples marks the end of the text
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """int16 [N] at `sample_rate`, mono: `text` in `voice`, with the silence around it.

        Raises:
            UserError: the voice does not exist or the synthesis fails.
        """
        # An unknown variant is passed over in silence by the library, hence the look at its file.
        variant = voice.name.partition("+")[2]
        known = not variant or (self._variants / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.name.encode()) != OK:
            raise UserError(f"espeak-ng has no voice {voice.name!r}: see {self._variants.parent}")
        for parameter, value in (
            (RATE, voice.rate),
            (PITCH, voice.pitch),
            (RANGE, voice.pitch_range),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._pieces = []
        data = text.encode()
        status = self._library.espeak_Synth(
            data, len(data) + 1, 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None
        )
        if status != OK or self._library.espeak_Synchronize() != OK or not self._pieces:
            raise UserError(f"espeak-ng cannot speak {text!r} as {voice.name} (status {status})")
        return np.concatenate(self._pieces)
