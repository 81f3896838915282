from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from speechllm.cluster.profile import SITES, dump_profile, load_profile, site_names
from speechllm.cluster.requests import clock, memory_share
from speechllm.cluster.sections import parse_memory, parse_seconds
from speechllm.errors import ConfigError

ALL = sorted(SITES.glob("*.yaml"))


def test_the_promised_sites_are_there() -> None:
    assert {"but", "sge_pe", "local_grid", "slurm"} <= set(site_names())


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.stem)
def test_every_shipped_profile_loads_and_reads_back(file: Path, tmp_path: Path) -> None:
    profile = load_profile(file.stem)
    assert profile == load_profile(str(file))
    assert profile.description
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_profile(profile))
    assert load_profile(str(copy)) == profile


def test_profiles_are_as_their_sites_want_to_be_asked() -> None:
    but = load_profile("but")
    assert (but.queue, but.multi_node, but.pe) == (("long.q@@gpu",), "array", None)
    assert but.ulimits == {"n": "4096", "f": "unlimited", "v": "unlimited"}
    assert load_profile("sge_pe").pe == "mpi"
    assert load_profile("slurm").kind == "slurm"


def test_scalars_mean_what_they_say(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(
        "queue: no\nrerun: no\ntime: {limit: 24:00:00, margin: 10:30}\nproject: null\n"
        "environment: ['export A=yes']\nstorage:\n"
    )
    profile = load_profile(str(file))
    assert profile.queue == ("no",)
    assert profile.rerun is False
    assert (profile.time.limit, profile.time.margin) == (86400, 630)
    assert profile.project is None
    assert profile.storage is None


def test_changes_from_the_command_line() -> None:
    changes = [
        "multi_node=pe:nodes1", "time.limit=1:00:00", "storage.tokens.matylda6=0.5",
        "ports=[30000, 30100]", "gpu_claim.kind=locks", "gpu_claim.devices=2",
    ]  # fmt: skip
    profile = load_profile("but", changes)
    assert profile.pe == "nodes1"
    assert profile.time.limit == 3600
    assert profile.storage is not None
    assert profile.storage.tokens == {"scratch": 0.5, "matylda6": 0.5}
    assert profile.ports == (30000, 30100)
    assert profile.gpu_claim.model_dump()["devices"] == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("gpu.name=x", "gpu: no such key; did you mean gpus?"),
        ("time.hardness=x", "time.hardness: no such key; did you mean time.hard?"),
        ("multi_node=pe", "multi_node"),
        ("ram.amount=7X", "'7X' is no amount of memory"),
        ("time.limit=1 day", "'1 day' is no time"),
        ("time.limit=60", "limit 60 s is not above margin 600 s"),
        ("time.hard=h_rt", "give `limit`"),
        ("cpus.slots=4", "cpus.pe"),
        ("ports=[1, 2]", "1024"),
        ("ports=[1, 2", "override ports=[1, 2: the value starts like a YAML list"),
        ("queue=a b", "queue"),
        ("requests.arch=a,b=c", "requests.arch"),
        ("gpu_claim.kind=lock", "gpu_claim"),
        ("gpu_claim.kind=command", "gpu_claim.command is missing: The tool"),
        ("gpu_claim.command=[gpus]", "no such key of kind safe_gpu; it belongs to command"),
        ("gpu_claim=safe_gpu", "gpu_claim: expected a section of keys"),
        ("environment=export A=1", "environment: expected a list"),
        ("ulimits.nofile=4096", "ulimits.nofile: 'nofile' is no letter of ulimit"),
        ("storage.tokens={'a,b': 1}", "'a,b' is no name"),
        ("python=python3", "python: 'python3' is no absolute path"),
        ("shared=data", "shared: 'data' is no absolute path"),
        ("meeting.stale_after=6", "three times heartbeat"),
        ("meeting.heartbeat=0", "meeting.heartbeat: expected greater than 0"),
        ("limit", "expected KEY=VALUE"),
    ],
)
def test_mistakes_are_named(change: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_profile("but", [change])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("multi_node=pe:mpi", "Slurm takes `array`"),
        ("cpus.pe=smp", "cpus.pe is not asked of Slurm"),
        ("gpu_memory={names: gpu_ram, amount: 20G}", "gpu_memory is not asked of Slurm"),
        ("storage.tokens.scratch=1", "storage is not asked of Slurm"),
        ("time.soft=s_rt", "time.soft is not asked of Slurm"),
    ],
)
def test_what_only_grid_engine_has_is_refused_of_slurm(change: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_profile("slurm", [change])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("site", "said"),
    [("bot", "did you mean but?"), ("zzz", "there are but"), ("./no.yaml", "no such file")],
)
def test_an_unknown_site(site: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_profile(site)
    assert said in str(refused.value)


def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("queue: long.q\nram:\n  names: mem free\n  amount: 4G\n")
    with pytest.raises(ConfigError, match=r"site\.yaml:3: ram\.names: 'mem free' is no name"):
        load_profile(str(file))


@pytest.mark.parametrize(
    "text", ["", "just text", "a: [", "- list", "queue: short.q\nqueue: long.q"]
)
def test_a_file_that_is_no_profile(text: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"site\.yaml"):
        load_profile(str(file))


def test_a_profile_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_profile("but").kind = "slurm"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [("20G", 20 * 2**30), ("20g", 20 * 10**9), ("1.5K", 1536), ("7", 7), ("2T", 2**41)],
)
def test_memory(text: str, value: int) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("90", 90), ("1:30", 90), ("24:00:00", 86400), (5, 5), ("0:0:7", 7)]
)
def test_seconds(text: str, value: float) -> None:
    assert parse_seconds(text) == value


@given(st.integers(0, 10**7))
def test_a_clock_reads_back(seconds: int) -> None:
    assert parse_seconds(clock(seconds)) == seconds


@given(st.integers(1, 4096), st.sampled_from("KMGTkmgt"), st.integers(2, 64))
def test_shares_of_memory_are_enough_and_not_much_more(amount: int, unit: str, parts: int) -> None:
    whole = parse_memory(f"{amount}{unit}")
    share = parse_memory(memory_share(f"{amount}{unit}", parts))
    assert whole <= share * parts
    assert share <= math.ceil(whole / parts) + 2**20
