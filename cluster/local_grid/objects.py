"""What the cluster consists of in Grid Engine's own terms: pure text, handed over by master.py.

Every value stands for a property that our users' clusters have or that keeps tests short; the
rest is Grid Engine's default.
"""

from __future__ import annotations

from collections.abc import Mapping

from layout import Cluster

Facts = dict[str, object]

NOBODY: Facts = {"user_lists": "NONE", "xuser_lists": "NONE"}
NOTIFY = "00:00:20"  # from SIGUSR1 or SIGUSR2 to SIGSTOP or SIGKILL
QUEUES = ("long.q", "short.q", "high.q")
PARALLEL = {
    "smp": "$pe_slots",
    "mpi": "$round_robin",
    "fill": "$fill_up",
    "nodes1": "1",
    "nodes2": "2",
}
CHECKPOINTING = ("rerun", "migr")
# name, shortcut, type, relation, requestable, consumable, default, urgency
COMPLEXES = (
    "gpu      gpu      INT    <= YES YES 0 0",
    "gpu_ram  gpu_ram  MEMORY <= YES NO  0 0",
    "ram_free ram_free MEMORY <= YES YES 0 0",
    "scratch  scratch  DOUBLE <= YES YES 0 0",
)


def table(facts: Mapping[str, object]) -> str:
    return "".join(f"{key:<24} {value}\n" for key, value in facts.items())


def edited(text: str, changes: Mapping[str, object]) -> str:
    """A table of Grid Engine's with some values replaced; each key must be there."""
    rows = dict(line.split(None, 1) for line in text.splitlines() if line and line[0] != "#")
    assert changes.keys() <= rows.keys(), f"unknown: {changes.keys() - rows.keys()}"
    return table({**rows, **changes})


def bootstrap(cluster: Cluster) -> str:
    return table(
        {
            "admin_user": "sgeadmin",
            "default_domain": "none",
            "ignore_fqdn": "true",
            "spooling_method": "classic",
            "spooling_lib": "libspoolc",
            "spooling_params": f"{cluster.common};{cluster.spool / 'qmaster'}",
            "binary_path": cluster.sge_root / "bin",
            "qmaster_spool_dir": cluster.spool / "qmaster",
            "security_mode": "none",
            "listener_threads": 2,
            "worker_threads": 2,
            "scheduler_threads": 1,
            "jvm_threads": 0,
        }
    )


def global_configuration(default: str, cluster: Cluster) -> str:
    """A dead host's jobs start again after 25 to 35 s: it looks for silent hosts every 15 s."""
    return edited(
        default,
        {
            "execd_spool_dir": cluster.spool / "execd",
            "min_uid": 0,
            "min_gid": 0,
            "load_report_time": "00:00:01",
            "max_unheard": "00:00:10",
            "reschedule_unknown": "00:00:05",
            "mailer": "/bin/true",
            "administrator_mail": "none",
            "shell_start_mode": "unix_behavior",
            "qmaster_params": "MAX_DYN_EC=50,ENABLE_RESCHEDULE_KILL=1,ENABLE_RESCHEDULE_SLAVE=1",
            "execd_params": "ENABLE_ADDGRP_KILL=TRUE,NOTIFY_KILL=USR2,NOTIFY_SUSP=USR1,"
            "PTF_MIN_PRIORITY=0",
            "reporting_params": "accounting=true reporting=false flush_time=00:00:01 joblog=false "
            "sharelog=00:00:00",
        },
    )


def host_configuration(number: int) -> str:
    """All hosts share one kernel, and jobs are known by an additional group: without a range of
    its own, one host would end another's job."""
    first = 60000 + 200 * number
    return table({"gid_range": f"{first}-{first + 199}", "mailer": "/bin/true"})


def _host(name: str, values: str) -> str:
    return table(
        {
            "hostname": name,
            "load_scaling": "NONE",
            "complex_values": values,
            **NOBODY,
            "projects": "NONE",
            "xprojects": "NONE",
            "usage_scaling": "NONE",
            "report_variables": "NONE",
        }
    )


def execution_host(cluster: Cluster, name: str) -> str:
    values = f"gpu={cluster.gpus},gpu_ram=24G,ram_free=64G,slots={cluster.slots}"
    return _host(name, values)


def global_host() -> str:
    """Storage tokens: one stock for the whole cluster."""
    return _host("global", "scratch=10")


def host_group(cluster: Cluster) -> str:
    return table({"group_name": "@gpu", "hostlist": " ".join(cluster.exec_hosts)})


def parallel_environment(name: str) -> str:
    return table(
        {
            "pe_name": name,
            "slots": 999,
            **NOBODY,
            "start_proc_args": "NONE",
            "stop_proc_args": "NONE",
            "allocation_rule": PARALLEL[name],
            "control_slaves": "TRUE",
            "job_is_first_task": "TRUE",
            "urgency_slots": "min",
            "accounting_summary": "TRUE",
            "qsort_args": "NONE",
        }
    )


def checkpointing(cluster: Cluster, name: str) -> str:
    """`rerun` starts a job again from its own checkpoint; `migr` also moves it off a host that a
    better queue takes."""
    moves = name == "migr"
    return table(
        {
            "ckpt_name": name,
            "interface": "application-level" if moves else "transparent",
            "ckpt_command": "NONE",
            "migr_command": f"{cluster.directory / 'migrate'} $job_pid" if moves else "NONE",
            "restart_command": "NONE",
            "clean_command": "NONE",
            "ckpt_dir": cluster.shared,
            "signal": "NONE" if moves else "USR2",
            "when": "xsr",
        }
    )


def scheduler(default: str) -> str:
    return edited(
        default,
        {
            "schedule_interval": "0:0:1",
            "job_load_adjustments": "NONE",
            "load_adjustment_decay_time": "0:0:0",
            "flush_submit_sec": 1,
            "flush_finish_sec": 1,
            "queue_sort_method": "seqno",
            "schedd_job_info": "true",
        },
    )


def queue(default: str, cluster: Cluster, name: str) -> str:
    """long.q: the ordinary one. short.q: limits run time softly. high.q: takes a host from
    long.q."""
    special: dict[str, Facts] = {
        "long.q": {},
        "short.q": {"s_rt": "00:00:30", "h_rt": "00:02:00", "rerun": "TRUE"},
        "high.q": {"subordinate_list": "long.q=1"},
    }
    return edited(
        default,
        {
            "qname": name,
            "hostlist": "@gpu",
            "seq_no": 10 * QUEUES.index(name),
            "load_thresholds": "NONE",
            "min_cpu_interval": "00:00:01",
            "pe_list": " ".join(PARALLEL),
            "ckpt_list": " ".join(CHECKPOINTING),
            "slots": cluster.slots,
            "tmpdir": cluster.scratch,
            "shell": "/bin/bash",
            "notify": NOTIFY,
            **special[name],
        },
    )
