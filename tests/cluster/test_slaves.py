"""How the first node of a parallel environment finds what starts the others."""

from __future__ import annotations

import pytest
from node_jobs import job_of

from speechllm.cluster.slaves import Slaves
from speechllm.errors import UserError

PE_HOSTFILE = "node1 2 long.q@node1 UNDEFINED\nnode3 2 long.q@node3 UNDEFINED\n"


def test_qrsh_need_not_be_on_the_path(tmp_path, monkeypatch):
    """Grid Engine gives jobs a short PATH, and says in a variable where its programs are."""
    (tmp_path / "sge").mkdir()
    fake = tmp_path / "sge" / "qrsh"
    fake.write_text(f"#!/bin/sh\necho $3 > {tmp_path}/called\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "pe").write_text(PE_HOSTFILE)
    job = job_of(tmp_path, "x", mode="pe", nodes=2, site={"multi_node": "pe:mpi"})
    environment = {"PE_HOSTFILE": str(tmp_path / "pe")}
    with pytest.raises(UserError, match=r"qrsh.*cannot be run.*multi_node: array"):
        Slaves(job, environment)
    Slaves(job, environment | {"SGE_BINARY_PATH": str(tmp_path / "sge")}).close()
    assert (tmp_path / "called").read_text() == "node3\n"
