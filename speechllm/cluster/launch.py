"""The command that starts the processes of one node, and their environment. Nothing is quoted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechllm.cluster.group import Generation, Member
from speechllm.cluster.job import Job
from speechllm.cluster.rank import DEVICES, VISIBLE, rank_environment

RANK_MODULE = "speechllm.cluster.rank"


@dataclass(frozen=True)
class Place:
    """This node among those that start together. port: of the master, where all processes join."""

    node_rank: int
    nodes: int
    master: str
    port: int


def place_of(group: Generation, me: Member) -> Place:
    return Place(group.rank_of(me), len(group.members), group.master.address, group.port)


def launch_command(job: Job, place: Place, hostfile: Path) -> list[str]:
    """Of torchrun with a static rendezvous, or of deepspeed without ssh; a lone process needs none.

    hostfile: read by deepspeed only; see `hostfile_text`.
    """
    if not job.is_launched or place.nodes * job.procs_per_node == 1:
        return [job.python, "-m", RANK_MODULE]
    if job.launcher == "deepspeed":
        return [
            job.python, "-m", "deepspeed.launcher.runner",
            "--hostfile", str(hostfile),
            "--no_ssh",
            "--node_rank", str(place.node_rank),
            "--master_addr", place.master,
            "--master_port", str(place.port),
            "--no_local_rank",
            "--module", RANK_MODULE,
        ]  # fmt: skip
    return [
        job.python, "-m", "torch.distributed.run",
        "--nnodes", str(place.nodes),
        "--node-rank", str(place.node_rank),
        "--nproc-per-node", str(job.procs_per_node),
        "--rdzv-backend", "static",
        "--master-addr", place.master,
        "--master-port", str(place.port),
        "--max-restarts", "0",
        "-m", RANK_MODULE,
    ]  # fmt: skip


def hostfile_text(hosts: Sequence[str], procs_per_node: int) -> str:
    """DeepSpeed's hostfile. Without ssh its names only count nodes, and each must be unlike."""
    seen: Counter[str] = Counter()
    lines = []
    for host in hosts:
        seen[host] += 1
        again = f"_{seen[host]}" if seen[host] > 1 else ""
        lines.append(f"{host}{again} slots={procs_per_node}")
    return "\n".join(lines) + "\n"


def launch_environment(
    job: Job,
    records: Path,
    *,
    devices: Mapping[str, str],
    deadline: float | None = None,
    lease: tuple[Path, str] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """What the node's processes see.

    records: see rank.py. devices: of the claim. deadline: Unix seconds at which the trainer is to
    stop. lease: file and token that allow to write the run directory.
    """
    result = dict(environment)
    # torchrun ends its processes at TERM and INT unless told that those are not for it. Torch that
    # cannot be told yet ignores this, and gives them 30 s to save at a TERM.
    result["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    result |= rank_environment(job.after_python, records)
    result |= devices
    if VISIBLE in result:
        result[DEVICES] = result[VISIBLE]
    processes = job.procs_per_node if job.is_launched else 1
    slots = max(job.site.cpus.slots, _slots_here(job, environment))
    result.setdefault("OMP_NUM_THREADS", str(max(1, slots // processes)))
    if job.site.network_interface is not None:
        result["GLOO_SOCKET_IFNAME"] = job.site.network_interface
        result["NCCL_SOCKET_IFNAME"] = job.site.network_interface
    if job.site.scratch is not None and (scratch := os.path.expandvars(job.site.scratch)):
        result["TMPDIR"] = scratch
    if deadline is not None:
        result["SPEECHLLM_DEADLINE"] = repr(deadline)
    if lease is not None:
        result["SPEECHLLM_LEASE"], result["SPEECHLLM_LEASE_TOKEN"] = str(lease[0]), lease[1]
    return result


def _slots_here(job: Job, environment: Mapping[str, str]) -> int:
    """NSLOTS counts all hosts of a parallel environment."""
    slots = environment.get("NSLOTS", "1")
    total = int(slots) if slots.isdecimal() else 1
    return total // job.nodes if job.mode == "pe" else total
