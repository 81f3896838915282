"""What a worker process gets of an object, in one place.

Worker processes that are spawned receive their arguments pickled, so these objects must survive it.
The bytes are made here and read here: nothing that came from a file or a peer is ever unpickled.
"""

from __future__ import annotations

import pickle
from typing import TypeVar

T = TypeVar("T")


def worker_copy(value: T) -> T:
    copied: T = pickle.loads(pickle.dumps(value))
    return copied


def worker_bytes(value: object) -> int:
    """How many bytes travel to each worker."""
    return len(pickle.dumps(value))
