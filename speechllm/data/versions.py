"""The versions of whatever has a say in the bytes of a shard and its index."""

from __future__ import annotations

from functools import cache

import numpy as np

import pyarrow
import soundfile
import soxr

import speechllm


@cache
def versions() -> dict[str, str]:
    return {
        "speechllm": speechllm.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
        "soundfile": soundfile.__version__,
        "soxr": soxr.__version__,
        "numpy": np.__version__,
        "pyarrow": pyarrow.__version__,
    }
