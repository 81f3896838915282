"""Which voices speak in which split, and how their speech varies.

A voice of espeak-ng is a language and a variant. The variant is what makes a person (vocal tract,
pitch, roughness); the language makes the accent. The variants of the test split are no other
split's. Where a name comes in several versions (edward, edward2), all are on one side.
Left out are whispers, robots and echoes, and what whisper-tiny.en itself made little of in a first
corpus (150 utterances, Whisper's English normaliser, 53 % WER in all): the variants Lee, boris,
Andrea and Michael (75, 80, 88 and 55 %) and the accents en-gb-scotland and en-gb-x-gbcwmd (65 and
67 %). The rest of those utterances had 36 %, but that flatters, since they chose the voices: on the
300 test utterances of a new corpus (--count 8000) it is 45 %, from 31 % (edward) to 77 % (linda).
The training variants have not been looked at in this way.
"""

import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]

# An accent that stands there twice is drawn twice as often.
ACCENTS = """
    en-us en-us en-us en en en-gb-x-rp en-us-nyc en-gb-x-gbclan
"""
TEST_VARIANTS = "m3 m7 f2 f4 belinda edward linda quincy"
TRAIN_VARIANTS = """
    m1 m2 m4 m5 m6 m8 f1 f3 f5 Alex Alicia Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky
    Marco Mario Mike Nguyen Reed adam anika antonio aunty benjamin caleb david ed grandma grandpa
    gustave ian iven iven2 iven3 iven4 john klatt klatt3 klatt4 marcelo max michel miguel mike2
    norbert pablo paul pedro rob robert sandro shelby steph steph2 steph3 travis victor zac
"""
RATES = range(140, 196)  # words a minute
PITCHES = range(30, 71)  # 50 is the variant's own
RANGES = range(30, 71)


@dataclass(frozen=True)
class Speech:
    """How one utterance is spoken: a speaker and the settings of `espeak.Voice`."""

    speaker: str
    rate: int
    pitch: int
    pitch_range: int


def speakers(split: Split, programs: tuple[str, ...] = ()) -> list[str]:
    """The speakers to draw from, some of them several times; `programs` join the training."""
    variants = TEST_VARIANTS if split == "test" else TRAIN_VARIANTS
    names = [f"{accent}+{variant}" for variant in variants.split() for accent in ACCENTS.split()]
    if split == "train":
        names += programs
    return names


def draw_speech(names: list[str], draw: random.Random) -> Speech:
    speaker = draw.choice(names)
    return Speech(speaker, draw.choice(RATES), draw.choice(PITCHES), draw.choice(RANGES))
