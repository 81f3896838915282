"""Where everything of one local cluster lies: in a single directory."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

MASTER = "head"
JOB_USER = "griduser"
DEBIAN = Path("/usr/lib/gridengine")
SHARE = Path("/usr/share/gridengine")
SCRIPTS = Path(__file__).resolve().parent
REPOSITORY = SCRIPTS.parents[1]
PATH = ("/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin")
INSIDE = (
    "SPEECHLLM_LOCAL_GRID_HOST"  # set to the host's name for what runs on a host of the cluster
)


class GridError(Exception):
    """Something that the person at the keyboard can mend; the text says how."""


def default_directory() -> Path:
    """$SPEECHLLM_LOCAL_GRID, else one fixed place below the folder for temporary files."""
    given = os.environ.get("SPEECHLLM_LOCAL_GRID")
    return Path(given).absolute() if given else Path(tempfile.gettempdir()) / "speechllm-local-grid"


@dataclass(frozen=True)
class Cluster:
    """One master and `hosts` execution hosts, each with `slots` job slots and `gpus` GPUs."""

    directory: Path
    hosts: int = 3
    slots: int = 2
    gpus: int = 2

    @property
    def exec_hosts(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.hosts + 1)]

    @property
    def names(self) -> list[str]:
        return [MASTER, *self.exec_hosts]

    def number(self, name: str) -> int:
        """0 for the master, 1 to N for the execution hosts."""
        return self.names.index(name)

    def address(self, name: str) -> str:
        return f"10.99.7.{1 + self.number(name)}"

    def host(self, name: str) -> Path:
        """What belongs to one host: its process, its log, its scratch."""
        return self.directory / "host" / name

    @property
    def etc(self) -> Path:
        """Files that stand in for those of the same name in /etc, on the cluster's hosts only."""
        return self.directory / "etc"

    @property
    def sge_root(self) -> Path:
        return self.directory / "sge"

    @property
    def common(self) -> Path:
        return self.sge_root / "default" / "common"

    @property
    def spool(self) -> Path:
        return self.directory / "spool"

    @property
    def objects(self) -> Path:
        return self.directory / "objects"

    @property
    def shared(self) -> Path:
        """A folder that every user may write and every host sees."""
        return self.directory / "shared"

    @property
    def scratch(self) -> Path:
        """The same path on each host, with other contents: a host's own disk."""
        return self.directory / "scratch"

    @property
    def home(self) -> Path:
        return self.directory / "home" / JOB_USER

    @property
    def environment(self) -> dict[str, str]:
        """What clients and daemons of Grid Engine need to find this cluster."""
        return {
            "SGE_ROOT": str(self.sge_root),
            "SGE_CELL": "default",
            "SGE_CLUSTER_NAME": "local_grid",
            "SGE_QMASTER_PORT": "6444",
            "SGE_EXECD_PORT": "6445",
            "SPEECHLLM_LOCAL_GRID": str(self.directory),
            "PATH": ":".join([str(DEBIAN), *PATH, str(Path(sys.executable).resolve().parent)]),
        }

    def save(self) -> None:
        facts = {key: value for key, value in asdict(self).items() if key != "directory"}
        (self.directory / "cluster.json").write_text(json.dumps(facts) + "\n")


def load_cluster(directory: Path) -> Cluster | None:
    """The cluster that `up` made in `directory`; None where there is none.

    Raises GridError for a directory of somebody else, which root must not trust.
    """
    path = directory / "cluster.json"
    if not path.is_file():
        return None
    if directory.stat().st_uid not in (0, os.geteuid()):
        raise GridError(f"{directory} belongs to another user; set SPEECHLLM_LOCAL_GRID elsewhere.")
    return Cluster(directory, **json.loads(path.read_text()))


def need_cluster(directory: Path) -> Cluster:
    cluster = load_cluster(directory)
    if cluster is None:
        raise GridError(f"There is no cluster in {directory}; start one: {SCRIPTS / 'up'}")
    return cluster
