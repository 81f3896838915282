from __future__ import annotations

from collections.abc import Iterator

import pytest
from grid_cluster import Grid, cluster, why_not


@pytest.fixture(scope="session")
def grid() -> Iterator[Grid]:
    """One cluster for the session; tests that need it are skipped where it cannot be."""
    if reason := why_not():
        pytest.skip(reason)
    with cluster() as running:
        yield running
