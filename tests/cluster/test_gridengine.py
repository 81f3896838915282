from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from fake_grid import EMPTY_QUEUE

from speechllm.cluster import slurm
from speechllm.cluster.batch import BatchAway, BatchError, Client, Output, QueuedTask
from speechllm.cluster.gridengine import (
    GridEngine,
    parse_accounting,
    parse_complexes,
    parse_facts,
    parse_queue,
    state_of,
)

# As Grid Engine 8.1.9 answers.
QUEUE = """<?xml version='1.0'?>
<job_info  xmlns:xsd="http://arc.liv.ac.uk/repos/darcs/sge/source/dist/util/resources/schemas/qstat/qstat.xsd">
  <queue_info>
    <job_list state="running">
      <JB_job_number>8</JB_job_number>
      <JAT_prio>0.50000</JAT_prio>
      <JB_name>train</JB_name>
      <JB_owner>griduser</JB_owner>
      <state>r</state>
      <JAT_start_time>2026-11-22T18:52:50</JAT_start_time>
      <queue_name>long.q@node1</queue_name>
      <slots>2</slots>
      <tasks>3</tasks>
    </job_list>
  </queue_info>
  <job_info>
    <job_list state="pending">
      <JB_job_number>9</JB_job_number>
      <JB_name>held</JB_name>
      <state>hqw</state>
      <JB_submission_time>2026-11-22T18:53:28</JB_submission_time>
      <queue_name></queue_name>
      <slots>1</slots>
    </job_list>
  </job_info>
</job_info>
"""
AWAY = Output(
    1,
    "",
    "error: commlib error: got select error (Connection refused)\nUnable to run job: unable to "
    'send message to qmaster using port 6444 on host "head": got send error\nExiting.',
)
UNCLEAR = Output(
    1,
    "",
    "error: failed receiving gdi request response for mid=1 (got syncron message receive timeout "
    "error).",
)
NO_QUEUE = Output(1, "", "Unable to run job: error: no suitable queues\nExiting.")
WHY = Output(1, "", """\
Unable to run job: Job 7 (-l gpu=9) cannot run in queue "high.q" because it is not contained in \
its hard queue list (-q)
Job 7 (-l gpu=9) cannot run at host "node1" because it offers only hc:gpu=2.000000
Job 7 (-l gpu=9) cannot run at host "node1" because it offers only hc:gpu=2.000000
verification: no suitable queues
Exiting.""")  # fmt: skip
NOTHING = Output(0, EMPTY_QUEUE, "")
SUBMIT = ["-terse", "-w", "e", "-N", "w", "script.sh"]


@dataclass
class Script:
    """Answers by command, one after the other, the last for ever; notes what was asked."""

    answers: dict[str, list[Output]]
    asked: list[tuple[str, ...]] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    def run(self, *words: str) -> Output:
        self.asked.append(words)
        left = self.answers[words[0]]
        return left.pop(0) if len(left) > 1 else left[0]


class ScriptedClient(Client):
    def __init__(self, script: Script, patience: float = 300.0) -> None:
        super().__init__((), patience, script.slept.append)
        object.__setattr__(self, "script", script)

    def run(self, *words: str) -> Output:
        return self.script.run(*words)  # type: ignore[attr-defined, no-any-return]


def grid(patience: float = 300.0, **answers: Sequence[Output]) -> tuple[GridEngine, Script]:
    script = Script({"qstat": [NOTHING]} | {name: list(given) for name, given in answers.items()})
    return GridEngine(ScriptedClient(script, patience)), script


@pytest.mark.parametrize("answer", ["12\n", "12.1-4:1\n", "Welcome to our site\n12\n"])
def test_the_id_of_a_submitted_job(answer: str) -> None:
    engine, script = grid(qsub=[Output(0, answer, "")])
    assert engine.submit(SUBMIT, "w") == "12"
    assert script.asked[-1] == ("qsub", *SUBMIT)


def test_an_answer_without_an_id_is_no_success() -> None:
    engine, _ = grid(qsub=[Output(0, "Your job was put somewhere", "")])
    with pytest.raises(BatchAway, match="look at qstat"):
        engine.submit(SUBMIT, "w")


def test_a_master_that_is_away_is_asked_again_with_growing_pauses() -> None:
    engine, script = grid(qsub=[AWAY, AWAY, AWAY, Output(0, "3\n", "")])
    assert engine.submit(SUBMIT, "w") == "3"
    assert script.slept == [1, 2, 4]


def test_patience_has_an_end() -> None:
    engine, script = grid(20.0, qsub=[AWAY])
    with pytest.raises(BatchAway, match="does not answer since 31 s"):
        engine.submit(SUBMIT, "w")
    assert sum(script.slept) == 31


def test_a_job_that_was_taken_without_an_answer_is_not_submitted_twice() -> None:
    taken = Output(0, QUEUE.replace("<JB_name>held", "<JB_name>w"), "")
    engine, script = grid(qsub=[UNCLEAR], qstat=[NOTHING, taken])
    assert engine.submit(SUBMIT, "w") == "9"
    assert [words[0] for words in script.asked].count("qsub") == 1


def test_a_job_that_was_not_taken_is_submitted_again() -> None:
    other = Output(0, QUEUE.replace("<JB_name>held", "<JB_name>w"), "")  # there before
    engine, script = grid(qsub=[UNCLEAR, Output(0, "10\n", "")], qstat=[other])
    assert engine.submit(SUBMIT, "w") == "10"
    assert [words[0] for words in script.asked].count("qsub") == 2


def test_a_master_that_answers_too_late_is_asked_again() -> None:
    taken = Output(0, QUEUE.replace("<JB_name>held", "<JB_name>w"), "")
    engine, script = grid(qsub=[UNCLEAR], qstat=[NOTHING, UNCLEAR, taken])
    assert engine.submit(SUBMIT, "w") == "9"
    assert [words[0] for words in script.asked].count("qsub") == 1
    engine, script = grid(qstat=[UNCLEAR, Output(0, QUEUE, "")], qdel=[UNCLEAR, Output(0, "", "")])
    assert len(engine.queued()) == 2
    engine.delete(["9"])
    assert script.slept == [1, 1]


def test_a_master_that_never_answers_in_time_is_given_up() -> None:
    engine, script = grid(20.0, qsub=[UNCLEAR])
    with pytest.raises(BatchAway, match="look at qstat before you retry"):
        engine.submit(SUBMIT, "w")
    assert 20 <= sum(script.slept) < 60


def test_an_impossible_request_is_refused_with_the_schedulers_reasons() -> None:
    engine, script = grid(qsub=[NO_QUEUE, WHY])
    with pytest.raises(BatchError) as refused:
        engine.submit(SUBMIT, "w")
    assert str(refused.value) == (
        "qsub refuses w: no host could ever run it: (-l gpu=9) cannot run at host "
        '"node1" because it offers only hc:gpu=2.000000; no suitable queues'
    )
    assert script.asked[-1] == ("qsub", "-terse", "-w", "v", "-N", "w", "script.sh")


def test_other_refusals_are_told_as_they_are() -> None:
    said = 'Unable to run job: unknown resource "gpux"\nExiting.'
    engine, script = grid(qsub=[Output(1, "", said)])
    with pytest.raises(BatchError, match=r'qsub refuses w: unknown resource "gpux"$'):
        engine.submit(SUBMIT, "w")
    assert not script.slept


def test_a_queue_that_cannot_be_read_is_told() -> None:
    engine, _ = grid(qstat=[Output(2, "", "There is no cluster; start one")])
    with pytest.raises(BatchError, match="qstat fails: There is no cluster; start one"):
        engine.queued()


def test_a_missing_command_says_where_it_works() -> None:
    with pytest.raises(BatchError, match="submit host"):
        Client(("/no/such/program",)).run("qstat")


def test_a_prefix_stands_before_every_command() -> None:
    output = Client(("echo", "on", "head")).run("qsub", "a  b", "$HOME", "")
    assert output.out == "on head qsub a  b $HOME \n"


def test_names_in_another_encoding_are_no_error() -> None:
    """Of any other job of the user's, as of one submitted in an older locale."""
    write = "import sys; sys.stdout.buffer.write(b'p\\xf8epis'); sys.stderr.buffer.write(b'\\xf8')"
    output = Client((sys.executable, "-c", write)).run("qstat")
    assert (output.code, output.out[0], output.out[-4:]) == (0, "p", "epis")


def test_the_queue() -> None:
    assert parse_queue(QUEUE) == [
        QueuedTask("8", "train", "running", "r", 3, "node1", "2026-11-22T18:52:50", 2),
        QueuedTask("9", "held", "held", "hqw", None, None, "2026-11-22T18:53:28", 1),
    ]
    assert parse_queue(EMPTY_QUEUE) == []


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("r", "running"), ("t", "running"), ("Rr", "running"), ("hr", "running"),
        ("qw", "pending"), ("Rq", "pending"), ("hqw", "held"), ("hRwq", "held"),
        ("s", "suspended"), ("S", "suspended"), ("T", "suspended"), ("RS", "suspended"),
        ("dr", "deleting"), ("dt", "deleting"), ("dRr", "deleting"),
        ("Eqw", "error"), ("Ehqw", "error"),
    ],
)  # fmt: skip
def test_states(code: str, state: str) -> None:
    assert state_of(code) == state


def test_why_a_job_is_in_error_state() -> None:
    said = 'error: can\'t open output file "/exp/logs": No such file or directory'
    text = (
        f"job_number:   4\nerror reason    1:          11/23/2026 12:00:00 [7:8]: {said}\n"
        f"error reason    2:          11/23/2026 12:00:00 [7:9]: {said}\n"
        "scheduling info:            Job is in error state\n"
    )
    engine, _ = grid(qstat=[Output(0, text, "")])
    assert engine.why_pending("4") == [said, "Job is in error state"]


def test_why_a_job_waits() -> None:
    text = (
        "job_number:   4\nscheduling info:            queue full\n"
        '                            cannot run at host "a"\n'
        '                            cannot run at host "a"\n'
    )
    engine, _ = grid(qstat=[Output(0, text, "")])
    assert engine.why_pending("4") == ["queue full", 'cannot run at host "a"']
    engine, _ = grid(qstat=[Output(0, "job_number: 4\n", "")])
    assert engine.why_pending("4") == []


def test_exit_codes_are_those_of_the_last_attempts() -> None:
    rule = "=" * 62
    text = "".join(
        f"{rule}\nqname        long.q  \ntaskid       {task}    \nexit_status  {code}\n"
        for task, code in ((1, "99"), (2, "0"), (1, "137                  (Killed)"))
    )
    assert len(parse_accounting(text)) == 3
    engine, _ = grid(qacct=[Output(0, text, "")])
    assert engine.exit_codes("4", None) == [137, 0]
    assert engine.exit_codes("4", 2) == [0]
    engine, _ = grid(qacct=[Output(1, "", "error: job id 99 not found")])
    assert engine.exit_codes("99", None) == []


def test_a_job_that_could_not_be_started_has_not_ended_well() -> None:
    text = (
        f"{'=' * 62}\ntaskid       undefined           \n"
        "failed       26  : opening input/output file\nexit_status  0                   \n"
    )
    engine, _ = grid(qacct=[Output(0, text, "")])
    assert engine.exit_codes("4", None) == [1]
    engine, _ = grid(qacct=[Output(0, text.replace("26  : opening input/output file", "0"), "")])
    assert engine.exit_codes("4", None) == [0]


def test_deleting_what_is_gone_is_no_error() -> None:
    engine, _ = grid(qdel=[Output(1, 'denied: job "2" does not exist', "")])
    engine.delete(["2"])
    engine, _ = grid(qdel=[Output(1, "", "denied: not your job")])
    with pytest.raises(BatchError, match="not your job"):
        engine.delete(["2"])


def test_qconf() -> None:
    text = "# comment\npe_list       make smp \\\n              mpi\nhostlist NONE\nempty\n"
    assert parse_facts(text) == {"pe_list": "make smp mpi", "hostlist": "NONE", "empty": ""}
    engine, _ = grid(qconf=[Output(1, "", "no such queue")])
    assert engine.facts("-sq", "x") == {}
    rows = parse_complexes(
        "#name shortcut type relop requestable consumable default urgency\n"
        "#------------------------------------------\n"
        "gpu g INT <= YES JOB 0 0\n"
    )
    assert rows["gpu"] == rows["g"]
    assert rows["gpu"]["consumable"] == "JOB"


def test_slurms_queue() -> None:
    text = (
        "101|1|RUNNING|n1|2026|8|100|a\n100|N/A|PENDING||2026|1|100|somebody's a|b\n"
        "7|N/A|NODE_FAIL||2026|1|7|c\n"
    )
    one, two, three = slurm.parse_queue(text)
    assert [one.name, two.name, three.name] == ["a", "somebody's a|b", "c"]
    assert (one.job_id, one.task, one.host, one.state, one.slots) == ("100", 1, "n1", "running", 8)
    assert (two.job_id, two.task, two.host, two.state) == ("100", None, None, "pending")
    assert three.state == "error"


def test_slurms_jobs_that_were_ended_have_not_ended_well() -> None:
    text = "COMPLETED|0:0\nTIMEOUT|0:0\nCANCELLED by 1000|0:15\nFAILED|100:0\n"
    engine = slurm.Slurm(ScriptedClient(Script({"sacct": [Output(0, text, "")]})))
    assert engine.exit_codes("4", None) == [0, 1, 1, 100]


def test_slurms_submission() -> None:
    script = Script({"sbatch": [Output(0, "12;cluster\n", "")]})
    engine = slurm.Slurm(ScriptedClient(script))
    assert engine.submit(["--parsable", "x.sh"], "x") == "12"
    script.answers["sbatch"] = [Output(1, "", "sbatch: error: invalid partition")]
    with pytest.raises(BatchError, match="invalid partition"):
        engine.submit(["--parsable", "x.sh"], "x")
