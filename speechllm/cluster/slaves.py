"""The other nodes of a parallel environment: the first task starts them by `qrsh -inherit`.

It hands on no environment and splits words again, so each node gets a script file of its own, which
sets what it must know and then runs the job's script.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from speechllm.cluster.job import Job
from speechllm.cluster.signals import ignore_stop_signals
from speechllm.errors import UserError

NODE_TASK = "SPEECHLLM_NODE_TASK"
LINGER = 15.0  # seconds that the others have to end after the first


def hosts_of(pe_hostfile: str) -> list[str]:
    """The hosts in $PE_HOSTFILE, `HOST SLOTS QUEUE PROCESSORS` a line; the first runs the job."""
    hosts = [line.split()[0] for line in pe_hostfile.splitlines() if line.strip()]
    return list(dict.fromkeys(hosts))


class Slaves:
    """Tasks 2, 3, ... on the other hosts. Raises UserError where the hosts are not as many as the
    nodes of the job."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        hosts = hosts_of(Path(environment["PE_HOSTFILE"]).read_text(encoding="utf-8"))
        if len(hosts) != job.nodes:
            raise UserError(
                f"the parallel environment {job.site.pe} gave {len(hosts)} host(s) "
                f"({', '.join(hosts)}) for {job.nodes} nodes; its allocation_rule must be the "
                f"number of slots of a host, {job.site.cpus.slots} (qconf -sp {job.site.pe})"
            )
        folder = job.own / "nodes"
        folder.mkdir(parents=True, exist_ok=True)
        job_id = environment.get("JOB_ID", "0")
        # The PATH of a job may be a short one, without Grid Engine's own programs.
        program = shutil.which("qrsh") or str(Path(environment.get("SGE_BINARY_PATH", ""), "qrsh"))
        self._running = [
            self._start(program, host, self._script(job, folder, job_id, task))
            for task, host in enumerate(hosts[1:], start=2)
        ]

    def _start(self, program: str, host: str, script: Path) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [program, "-inherit", "-nostdin", host, str(script)],
                stdin=subprocess.DEVNULL,
                preexec_fn=ignore_stop_signals,
            )
        except OSError as error:
            raise UserError(
                f"{program}, which starts the other nodes, cannot be run ({error.strerror}); give "
                "its folder in a line of the profile's `environment`, as in "
                "export PATH=$PATH:FOLDER, or use multi_node: array"
            ) from None

    def _script(self, job: Job, folder: Path, job_id: str, task: int) -> Path:
        script = folder / f"{job_id}.{task}.sh"
        aside = script.with_name(f".{script.name}")
        aside.write_text(
            "#!/bin/bash\n"
            f"export {NODE_TASK}={task} JOB_ID={shlex.quote(job_id)}\n"
            f"exec /bin/bash {shlex.quote(str(job.script))}\n",
            encoding="utf-8",
        )
        aside.chmod(0o755)
        aside.replace(script)
        return script

    def close(self) -> None:
        for one in self._running:
            with suppress(subprocess.TimeoutExpired):
                one.wait(LINGER)
        for one in self._running:
            if one.poll() is None:
                one.kill()
                one.wait()
