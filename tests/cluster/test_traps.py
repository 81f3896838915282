from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_grid import FakeBatch

from speechllm.cluster.allreduce import main as allreduce
from speechllm.cluster.batch import QueuedTask
from speechllm.cluster.doctor import probe, probe_job
from speechllm.cluster.profile import SiteProfile, load_profile
from speechllm.cluster.traps import SiteFacts, findings, limit_of, params, queue_name, words

PE = [
    "multi_node=pe:mpi", "cpus.pe=smp", "cpus.slots=2", "time.limit=1:00:00", "time.soft=s_rt",
    "time.hard=h_rt", "checkpoint=migr",
]  # fmt: skip
ROW = {"requestable": "YES", "consumable": "YES"}
GOOD = SiteFacts(
    configuration={"reschedule_unknown": "00:00:10", "max_aj_tasks": "75000"},
    scheduler={"schedd_job_info": "true"},
    queues={
        "long.q": {
            "pe_list": "make smp,[@gpu=mpi]", "notify": "00:01:00", "ckpt_list": "migr",
            "s_rt": "INFINITY", "h_rt": "INFINITY", "terminate_method": "NONE",
        }
    },
    pes={
        "smp": {"allocation_rule": "$pe_slots", "control_slaves": "FALSE"},
        "mpi": {"allocation_rule": "2", "control_slaves": "TRUE"},
    },
    checkpoints={"migr": {"ckpt_name": "migr"}},
    complexes={
        **dict.fromkeys(("gpu", "ram_free", "mem_free", "scratch"), ROW),
        **dict.fromkeys(("gpu_ram", "s_rt", "h_rt"), ROW | {"consumable": "NO"}),
    },
)  # fmt: skip


def said(site: SiteProfile, facts: SiteFacts, level: str) -> list[str]:
    return [one.text for one in findings(site, facts, sys.executable) if one.level == level]


def site(*changes: str) -> SiteProfile:
    return load_profile("but", [*PE, *changes])


def changed(part: str, name: str, **values: str) -> SiteFacts:
    """GOOD with other values in one object, or without it where there are none."""
    objects = dict(getattr(GOOD, part))
    objects[name] = objects.get(name, {}) | values if values else {}
    return replace(GOOD, **{part: objects})


def setting(part: str, **values: str) -> SiteFacts:
    return replace(GOOD, **{part: {**getattr(GOOD, part), **values}})


def test_a_profile_that_fits_has_nothing_wrong() -> None:
    assert said(site(), GOOD, "wrong") == []


@pytest.mark.parametrize(
    ("changes", "facts", "level", "text"),
    [
        ([], changed("queues", "long.q"), "wrong", "no queue long.q"),
        (["gpus.name=gpux"], GOOD, "wrong", "no resource gpux"),
        ([], changed("complexes", "gpu", requestable="NO"), "wrong", "requestable NO"),
        (["gpus.per=job"], GOOD, "wrong", "counted for each slot"),
        ([], changed("complexes", "gpu", consumable="JOB"), "wrong", "not counted for each slot"),
        ([], changed("pes", "mpi"), "wrong", "no parallel environment mpi"),
        ([], changed("pes", "mpi", allocation_rule="4"), "wrong", "allocation_rule 4"),
        ([], changed("pes", "mpi", allocation_rule="$fill_up"), "warning", "$fill_up"),
        ([], changed("pes", "mpi", control_slaves="FALSE"), "wrong", "control_slaves FALSE"),
        ([], changed("pes", "smp", allocation_rule="$round_robin"), "wrong", "may spread slots"),
        ([], changed("queues", "long.q", pe_list="make smp"), "wrong", "does not offer parallel"),
        ([], changed("queues", "long.q", notify="00:00:05"), "warning", "kills 5 s after"),
        ([], changed("queues", "long.q", terminate_method="SIGINT"), "warning", "terminate_method"),
        ([], changed("queues", "long.q", h_rt="00:30:00"), "wrong", "h_rt 1800 s, less than"),
        ([], changed("queues", "long.q", s_rt="00:55:00"), None, ""),
        ([], changed("queues", "long.q", s_rt="00:45:00"), "wrong", "s_rt 2700 s"),
        ([], changed("checkpoints", "migr"), "wrong", "no checkpointing environment migr"),
        ([], changed("queues", "long.q", ckpt_list="NONE"), "wrong", "does not offer migr"),
        ([], setting("scheduler", schedd_job_info="false"), "warning", "schedd_job_info"),
        ([], setting("configuration", reschedule_unknown="00:00:00"), "warning", "dead host"),
        (
            [],
            setting("configuration", qmaster_params="MAX_DYN_EC=50,FORBID_RESCHEDULE=1"),
            "warning",
            "--chain",
        ),
        (
            [],
            setting("configuration", qmaster_params="FORBID_APPERROR=TRUE"),
            "warning",
            "FORBID_APPERROR",
        ),
        ([], setting("configuration", execd_params="NOTIFY_KILL=none"), "warning", "NOTIFY_KILL"),
        (["array.task_limit=9"], setting("configuration", max_aj_tasks="8"), "wrong", "at most 8"),
    ],
)
def test_each_trap(changes: list[str], facts: SiteFacts, level: str | None, text: str) -> None:
    before = set(said(site(), GOOD, "wrong") + said(site(), GOOD, "warning"))
    after = {
        one: name for name in ("wrong", "warning") for one in said(site(*changes), facts, name)
    }
    new = {one: name for one, name in after.items() if one not in before}
    if level is None:
        assert not new
    else:
        assert any(name == level and text in one for one, name in new.items()), new


def test_a_queue_with_a_limit_that_the_profile_does_not_know() -> None:
    plain = load_profile("but")
    facts = changed("queues", "long.q", h_rt="24:00:00")
    assert any("write time.limit: 24:00:00" in one for one in said(plain, facts, "wrong"))


def test_an_interpreter_that_jobs_cannot_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    python = str(closed / "bin" / "python")
    assert not any("interpreter" in one.text for one in findings(site(), GOOD, python))
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    found = [one for one in findings(site(), GOOD, python) if "interpreter" in one.text]
    assert [one.level for one in found] == ["wrong"]


def test_notation_of_qconf() -> None:
    assert queue_name("long.q@@gpu") == queue_name("long.q@n1") == queue_name("long.q") == "long.q"
    assert words("make smp,[@gpu=mpi fill]") == ["make", "smp", "@gpu", "mpi", "fill"]
    assert limit_of("INFINITY") is None
    assert limit_of("24:00:00,[n1=1:00:00]") == 3600
    assert params("A=1,b=none C") == {"A": "1", "B": "none", "C": "1"}


OPTIONS = argparse.Namespace(dir="", gpus_per_node=None)


def probed(tmp_path: Path, queues: list[list[str]], result: Any, wait: float = 5.0) -> Any:
    OPTIONS.dir = str(tmp_path)
    job = probe_job(OPTIONS, load_profile("local_grid"))
    states = [[QueuedTask("1", "doctor", "running", code) for code in one] for one in queues]
    batch = FakeBatch([[], *states], reasons=["too few hosts"])

    def sleep(_: float) -> None:
        if result is not None:
            (tmp_path / "sum.json").write_text(json.dumps(result))

    seconds = itertools.count()
    return probe(job, batch, wait, sleep, lambda: float(next(seconds))), batch


def test_two_hosts_that_found_each_other(tmp_path: Path) -> None:
    answer = {"size": 2, "sum": 1.0, "hosts": ["n1", "n2"], "seconds": 3.2, "device": "cpu"}
    finding, batch = probed(tmp_path, [["r", "r"], []], answer)
    assert finding.level == "ok"
    assert "n1 and n2" in finding.text
    assert "-t" in batch.submitted[0]
    finding, _ = probed(tmp_path, [["r"], []], answer | {"sum": 0.0})
    assert (finding.level, "added wrongly" in finding.text) == ("wrong", True)


def test_a_test_job_that_fails_or_never_starts(tmp_path: Path) -> None:
    finding, batch = probed(tmp_path, [["qw"]], None)
    assert (finding.level, batch.deleted) == ("wrong", ["1"])
    assert "qw after 6 s: too few hosts" in finding.text
    finding, batch = probed(tmp_path, [["Eqw"]], None)
    assert "Eqw after 2 s" in finding.text
    finding, _ = probed(tmp_path, [["r"], []], None)
    assert "do the hosts see that folder" in finding.text


def test_the_test_program_adds_alone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert allreduce(str(tmp_path / "sum.json")) == 0
    found = json.loads((tmp_path / "sum.json").read_text())
    assert (found["size"], found["sum"], len(found["hosts"])) == (1, 0.0, 1)
