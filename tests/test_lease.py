from __future__ import annotations

from pathlib import Path

import pytest

from speechllm.errors import ConfigError, LostLease
from speechllm.lease import Lease, lease_of_environment


def test_the_token_in_the_file_decides(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease", "job 7, attempt 2")
    with pytest.raises(LostLease, match="taken over"):
        lease.check()
    lease.path.write_text("job 7, attempt 2\nsince 12:00\n")
    lease.check()
    lease.path.write_text("job 7, attempt 3\n")
    with pytest.raises(LostLease, match="attempt 3"):
        lease.check()


def test_it_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEECHLLM_LEASE", raising=False)
    assert lease_of_environment() is None
    monkeypatch.setenv("SPEECHLLM_LEASE", str(tmp_path / "lease"))
    monkeypatch.delenv("SPEECHLLM_LEASE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="SPEECHLLM_LEASE_TOKEN"):
        lease_of_environment()
    monkeypatch.setenv("SPEECHLLM_LEASE_TOKEN", "mine")
    assert lease_of_environment() == Lease(tmp_path / "lease", "mine")
