"""The master's spool, made before it starts, and its objects, which qconf hands to it."""

from __future__ import annotations

import pwd
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import objects
from enter import command_on
from layout import DEBIAN, MASTER, SCRIPTS, SHARE, Cluster, GridError


def _checked(command: Sequence[object], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise GridError(
            f"{command[0]} failed ({done.returncode}): {said}\n  {' '.join(map(str, command))}"
        )
    return done.stdout


def make_spool(cluster: Cluster) -> None:
    """Everything on disk that the daemons read at their start."""
    for name in ("bin", "utilbin", "lib"):
        (cluster.sge_root / name).mkdir(parents=True)
        (cluster.sge_root / name / "lx-amd64").symlink_to(DEBIAN)
    (cluster.sge_root / "util").symlink_to(SHARE / "util")
    cluster.common.mkdir(parents=True)
    (cluster.common / "act_qmaster").write_text(f"{MASTER}\n")
    (cluster.common / "cluster_name").write_text("local_grid\n")
    (cluster.common / "bootstrap").write_text(objects.bootstrap(cluster))
    (cluster.spool / "qmaster" / "job_scripts").mkdir(parents=True)
    (cluster.spool / "execd").mkdir()
    cluster.objects.mkdir()
    defaults = (SHARE / "default-configuration").read_text()
    configuration = cluster.objects / "global"
    configuration.write_text(objects.global_configuration(defaults, cluster))
    shutil.copy(SCRIPTS / "migrate", cluster.directory / "migrate")
    for folder in (cluster.sge_root, cluster.spool):
        _give_to_admin(folder)
    admin = pwd.getpwnam("sgeadmin")
    become = ["setpriv", "--reuid", admin.pw_uid, "--regid", admin.pw_gid, "--clear-groups"]
    spooling = ["classic", "libspoolc", f"{cluster.common};{cluster.spool / 'qmaster'}"]
    resources = SHARE / "util" / "resources"
    for words in (
        ["spoolinit", *spooling, "init"],
        ["spooldefaults", "configuration", configuration],
        ["spooldefaults", "complexes", resources / "centry"],
        ["spooldefaults", "usersets", resources / "usersets"],
        ["spooldefaults", "managers", "root", "sgeadmin"],
    ):
        _checked([*become, DEBIAN / str(words[0]), *words[1:]], cluster.environment)


def _give_to_admin(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            shutil.chown(path, "sgeadmin", "sgeadmin")


def on_master(cluster: Cluster, *command: object) -> str:
    """What a command of root's on the master prints. Raises GridError where it fails."""
    words = [str(word) for word in command]
    return _checked(command_on(cluster, MASTER, words, user="root", folder=Path("/")))


def wait_for_master(cluster: Cluster, patience: float = 30) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            on_master(cluster, "qconf", "-sh")
            return
        except GridError as error:
            if time.monotonic() > deadline:
                log = (cluster.host(MASTER) / "log").read_text()
                raise GridError(f"The master does not answer: {error}\n{log}") from error
            time.sleep(0.05)


def configure(cluster: Cluster) -> None:
    """Hosts, resources, parallel environments, checkpointing and queues."""

    def add(option: str, name: str, text: str) -> None:
        path = cluster.objects / name
        path.write_text(text)
        on_master(cluster, "qconf", option, path)

    everyone = ",".join(cluster.exec_hosts)
    on_master(cluster, "qconf", "-ah", everyone)
    on_master(cluster, "qconf", "-as", f"{MASTER},{everyone}")
    complexes = on_master(cluster, "qconf", "-sc")
    add("-Mc", "complexes", complexes + "\n".join(objects.COMPLEXES) + "\n")
    add("-Me", "global", objects.global_host())
    for name in cluster.exec_hosts:
        add("-Ae", name, objects.execution_host(cluster, name))
        add("-Aconf", name, objects.host_configuration(cluster.number(name)))
    add("-Ahgrp", "gpu", objects.host_group(cluster))
    for name in objects.PARALLEL:
        add("-Ap", name, objects.parallel_environment(name))
    for name in objects.CHECKPOINTING:
        add("-Ackpt", name, objects.checkpointing(cluster, name))
    add("-Msconf", "scheduler", objects.scheduler(on_master(cluster, "qconf", "-ssconf")))
    template = on_master(cluster, "qconf", "-sq")
    for name in objects.QUEUES:
        add("-Aq", name, objects.queue(template, cluster, name))


def _answers(cluster: Cluster, name: str) -> bool:
    port = cluster.environment["SGE_EXECD_PORT"]
    try:
        on_master(cluster, "qping", "-info", name, port, "execd", 1)
    except GridError:
        return False
    return True


def wait_for_hosts(cluster: Cluster, patience: float = 60) -> None:
    """Until every execution host answers and has reported its load.

    Both: the master believes for a while in the last report of a host that has died.
    """
    deadline = time.monotonic() + patience
    while True:
        rows = [line.split() for line in on_master(cluster, "qhost").splitlines()]
        ready = {row[0] for row in rows if len(row) > 6 and row[6] != "-"}
        missing = [
            name for name in cluster.exec_hosts if name not in ready or not _answers(cluster, name)
        ]
        if not missing:
            return
        if time.monotonic() > deadline:
            log = (cluster.host(missing[0]) / "log").read_text()
            raise GridError(f"{', '.join(missing)} do not report to the master\n{log}")
        time.sleep(0.1)
