"""A site: how its batch system wants to be asked, and what a job finds on its hosts.

A profile is a YAML file in cluster/sites/, or any other one by its path. Field descriptions are
the profile reference of the documentation.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from speechllm.cluster.sections import (
    AbsolutePath,
    Array,
    Claim,
    Cpus,
    GpuMemory,
    Gpus,
    Letter,
    Meeting,
    Name,
    Names,
    NoClaim,
    Ram,
    Seconds,
    Storage,
    Time,
    node_mode,
    port_range,
)
from speechllm.config.load import read_tree, validated
from speechllm.config.section import Section, as_list
from speechllm.errors import ConfigError

SITES = Path(__file__).parents[2] / "cluster" / "sites"


class SiteProfile(Section):
    kind: Literal["sge", "slurm"] = Field("sge", description="Grid Engine, or Slurm.")
    description: str = Field("", description="What `speechllm-submit` says of the site.")
    client: tuple[str, ...] = Field(
        (),
        description="Command that runs qsub, qstat and the like where they work, put before them; "
        "{repository} stands for the project's folder. none: they work where you are.",
    )
    queue: Names = Field((), description="Queues (-q), as in long.q@@gpu; Slurm: partitions.")
    project: Name | None = Field(None, description="Project (-P); Slurm: account.")
    requests: dict[Name, Name] = Field(
        {},
        description="Further resources (-l) as they are asked for, as in arch: lx-amd64; Slurm: "
        "options of sbatch, as in constraint: a100.",
    )
    gpus: Gpus | None = Field(None, description="How GPUs are asked for; none: they are not.")
    gpu_memory: GpuMemory | None = Field(None, description="How memory of GPUs is asked for.")
    ram: Ram | None = Field(None, description="How main memory is asked for.")
    storage: Storage | None = Field(None, description="Tokens of storage servers.")
    cpus: Cpus = Field(Cpus(), description="Slots of one host.")
    multi_node: Annotated[str, AfterValidator(node_mode)] = Field(
        "array",
        description="How a job gets several hosts. `array`: one array task a host, which meet in "
        "the shared folder; `pe:NAME`: a parallel environment whose allocation rule gives every "
        "host `cpus.slots` slots.",
    )
    array: Array = Field(Array(), description="Bounds of array jobs.")
    time: Time = Field(Time(), description="Time limits.")
    notify_seconds: Seconds | None = Field(
        None,
        description="Seconds between the warning signal and the kill, as the queue's `notify` "
        "says; asks for the warning (-notify). none: no warning.",
    )
    rerun: bool = Field(
        True, description="The job may be started again after its host has died (-r y)."
    )
    checkpoint: Name | None = Field(
        None, description="Checkpointing environment (-ckpt) that moves preempted jobs."
    )
    ulimits: dict[Letter, str] = Field(
        {}, description="`ulimit` in the job script: letter and value, as in n: 4096."
    )
    environment: tuple[str, ...] = Field(
        (),
        description="Lines of bash before the program starts: activation, HF_HOME, the hub's "
        "offline switch.",
    )
    python: AbsolutePath | None = Field(
        None, description="Python interpreter on the hosts; none: the one that submits."
    )
    shared: Annotated[tuple[AbsolutePath, ...], BeforeValidator(as_list)] = Field(
        (),
        description="Folders that all hosts see. Run directories must lie in one of them; none "
        "given: not checked.",
    )
    scratch: str | None = Field(
        None,
        description="Local scratch of a host, as in /tmp or $TMPDIR; becomes TMPDIR of the "
        "processes.",
    )
    network_interface: Name | None = Field(
        None, description="Interface for gloo and NCCL, as in ib0 or eth0; none: they choose."
    )
    ports: Annotated[tuple[int, int], AfterValidator(port_range)] = Field(
        (20000, 39999), description="Ports that a meeting may choose from: [LOW, HIGH]."
    )
    gpu_claim: Claim = Field(
        NoClaim(), description="How a job gets hold of its GPUs on the host where it runs."
    )
    meeting: Meeting = Field(Meeting(), description="How nodes meet, and how often they try.")

    @model_validator(mode="after")
    def _kinds_fit(self) -> SiteProfile:
        if self.kind == "slurm" and self.pe is not None:
            raise ValueError("multi_node: pe:NAME is Grid Engine's; Slurm takes `array`")
        only_sge = {
            "cpus.pe": self.cpus.pe,
            "gpu_memory": self.gpu_memory,
            "storage": self.storage,
            "checkpoint": self.checkpoint,
            "time.soft": self.time.soft,
        }
        given = [key for key, value in only_sge.items() if value is not None]
        if self.kind == "slurm" and given:
            raise ValueError(f"{given[0]} is not asked of Slurm; remove it, or see `requests`")
        if self.kind == "sge" and self.cpus.slots > 1 and not (self.cpus.pe or self.pe):
            raise ValueError("cpus.slots above 1 need cpus.pe, the environment that gives them")
        return self

    @property
    def pe(self) -> str | None:
        """The parallel environment of several hosts; None in array mode."""
        return self.multi_node.removeprefix("pe:") if self.multi_node != "array" else None


def site_names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(file.stem for file in SITES.glob("*.yaml"))


def load_profile(site: str, changes: Sequence[str] = ()) -> SiteProfile:
    """Read a profile by its name in cluster/sites/ or by the path of a YAML file.

    changes: `a.b=value` as on the command line, put over the file by the rules of configurations.

    Raises:
        ConfigError: no such profile, or one line for each thing that is wrong with it.
    """
    tree, origins = read_tree(str(_find(site)), changes, SiteProfile)
    return validated(_without_none(tree), origins, SiteProfile)


def dump_profile(profile: SiteProfile) -> str:
    """YAML that `load_profile` reads back to an equal profile."""
    content = profile.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _find(site: str) -> Path:
    if "/" in site or site.endswith((".yaml", ".yml")):
        file = Path(site).expanduser()
        if not file.is_file():
            raise ConfigError(f"--site {site}: no such file")
        return file
    if site not in site_names():
        near = difflib.get_close_matches(site, site_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(site_names())}"
        raise ConfigError(f"--site {site}: no such site in {SITES}; {hint}")
    return SITES / f"{site}.yaml"


def _without_none(value: Any) -> Any:
    """`key:`, `key: null` and `key: ~` mean the key's default."""
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return value
