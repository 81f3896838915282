from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_shards
import pytest
from fake_grid import EMPTY_QUEUE, FakeBatch, FakeGrid
from hypothesis import given
from hypothesis import strategies as st
from runs import TINY

from speechllm.cluster.batch import QueuedTask
from speechllm.cluster.job import Job, read_job
from speechllm.cluster.manage import cancel_job
from speechllm.cluster.options import job_name
from speechllm.cluster.profile import load_profile
from speechllm.cluster.submission import read_submission
from speechllm.cluster.submit import main
from speechllm.cluster.submit_train import combinations, variant_name
from speechllm.config.load import load_config
from speechllm.errors import ConfigError

Submit = Callable[..., tuple[int, str, str]]


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGrid:
    fake = FakeGrid(tmp_path / "grid")
    fake.answer("qsub", *(f"{number}\n" for number in range(11, 30)))
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def submit(grid: FakeGrid, capsys: pytest.CaptureFixture[str]) -> Submit:
    def call(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def train(submit: Submit, tmp_path: Path) -> Submit:
    (tmp_path / "shards").mkdir()

    def call(*words: str, command: str = "train") -> tuple[int, str, str]:
        given = ["run_dir=exp/asr", "data.train=shards", "--site", "but"]
        return submit(command, TINY, *given, *words)

    return call


def folder_of(tmp_path: Path, name: str = "asr", run_dir: str = "exp/asr") -> Path:
    return tmp_path / run_dir / "cluster" / name


def test_train_keeps_what_it_submits(train: Submit, grid: FakeGrid, tmp_path: Path) -> None:
    code, out, err = train("--nodes", "2", "--gpus-per-node", "4", "optim.lr=0.5")
    assert code == 0, err
    folder = folder_of(tmp_path)
    job = read_job(folder / "job.json")
    assert (job.nodes, job.min_nodes, job.procs_per_node, job.mode) == (2, 2, 4, "array")
    assert job.arguments == ("train", str(folder / "config.yaml"))
    assert (job.directory, job.run_dir) == (str(tmp_path), str(tmp_path / "exp/asr"))
    config = load_config(str(folder / "config.yaml"))
    assert (config.optim.lr, config.run_dir) == (0.5, str(tmp_path / "exp/asr"))
    assert load_profile(str(folder / "site.yaml")) == load_profile("but") == job.site
    assert (folder / "script.sh").stat().st_mode & 0o100
    submission = read_submission(folder)
    assert submission is not None
    assert submission.job_ids == ["11"]
    assert submission.commands == [["qsub", *grid.calls("qsub")[0]]]
    assert submission.revision == job.revision
    assert "11" in out
    assert str(folder) in out
    assert grid.calls("qsub")[0][-1] == str(folder / "script.sh")


def test_a_dry_run_needs_no_grid_and_writes_nothing(
    train: Submit, grid: FakeGrid, tmp_path: Path
) -> None:
    code, out, _ = train("--nodes", "2", "--dry-run", "--chain", "3")
    assert code == 0
    assert "exec " in out
    assert "\n-t\n1-2\n" in out
    assert "3 times" in out
    code, out, _ = train("--nodes", "2", "--dry-run", "--json", "--hold", "4")
    [shown] = json.loads(out)["jobs"]
    assert shown["command"][:2] == ["qsub", "-terse"]
    assert shown["command"][-3:-1] == ["-hold_jid", "4"]
    assert not (tmp_path / "exp").exists()
    assert not (grid.folder / "calls.jsonl").exists()


def test_slurm_takes_the_same_command(train: Submit, grid: FakeGrid) -> None:
    grid.answer("sbatch", "31\n")
    code, out, err = train("--site", "slurm", "--nodes", "2", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["job_ids"] == ["31"]
    assert "--array=1-2" in grid.calls("sbatch")[0]


def test_a_chain_is_held_link_by_link(train: Submit, grid: FakeGrid) -> None:
    code, out, _ = train("--chain", "3", "--hold", "7", "--hold", "prepare", "--json")
    assert code == 0
    holds = [words[words.index("-hold_jid") + 1] for words in grid.calls("qsub")]
    assert holds == ["7,prepare", "11", "12"]
    assert json.loads(out)[0]["job_ids"] == ["11", "12", "13"]


def test_the_same_job_is_not_submitted_twice(train: Submit, grid: FakeGrid) -> None:
    assert train()[0] == 0
    grid.answer("qstat", QUEUED)
    code, _, err = train()
    assert code == 2
    assert "in the queue already (job 11)" in err
    assert train("--name", "other")[0] == 0
    grid.answer("qstat", QUEUED.replace("11", "99"))
    assert train()[0] == 0


def test_a_refused_submission_leaves_the_waiting_jobs_files_alone(
    train: Submit, grid: FakeGrid, tmp_path: Path
) -> None:
    assert train("optim.lr=0.5")[0] == 0
    config = folder_of(tmp_path) / "config.yaml"
    kept = config.read_text()
    grid.answer("qstat", QUEUED)
    assert train("optim.lr=0.25")[0] == 2
    assert config.read_text() == kept
    grid.answer("qstat", EMPTY_QUEUE)
    assert train("--vary", "optim.lr=1,2", "--name", "s", command="sweep")[0] == 0
    config = folder_of(tmp_path, "s") / "config.1.yaml"
    kept = config.read_text()
    grid.answer("qstat", QUEUED.replace("11", "12"))
    assert train("--vary", "optim.lr=3,4", "--name", "s", command="sweep")[0] == 2
    assert config.read_text() == kept
    assert train("run_dir=elsewhere", "--with", "shared=/mnt")[0] == 2
    assert not (tmp_path / "elsewhere").exists()


QUEUED = """<job_info><queue_info><job_list><JB_job_number>11</JB_job_number><JB_name>asr</JB_name>
<state>r</state><queue_name>long.q@node7</queue_name><slots>1</slots></job_list></queue_info>
</job_info>"""


def test_a_refusal_is_told_with_its_reason(train: Submit, grid: FakeGrid) -> None:
    grid.answer("qsub", ("", 'Unable to run job: unknown resource "gpu"\nExiting.', 1))
    code, _, err = train()
    assert code == 2
    assert 'qsub refuses asr: unknown resource "gpu"' in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.rl=1"], "optim.rl: no such key"),
        (["data.train=nowhere"], "nowhere: no such directory"),
        (["data.train=[]"], "data.train is missing"),
        (["run_dir=null"], "run_dir is missing"),
        (["--nodes", "0"], "--nodes must be 1 or more"),
        (["--nodes", "2", "--min-nodes", "3"], "--min-nodes"),
        (["--min-nodes", "0"], "--min-nodes"),
        (["--gpus-per-node", "-1"], "--gpus-per-node must be 0 or more"),
        (["--procs-per-node", "0"], "--procs-per-node must be 1 or more"),
        (["--chain", "0"], "--chain"),
        (["--name", "a b"], "--name a b"),
        (["--with", "shared=/mnt"], "none of the folders that all hosts see"),
        (["--site", "bot"], "did you mean but?"),
        (["--time", "soon"], "no time"),
    ],
)
def test_mistakes_cost_no_wait_in_the_queue(
    train: Submit, grid: FakeGrid, words: list[str], said: str
) -> None:
    code, _, err = train(*words)
    assert code == 2
    assert said in err
    assert not grid.calls("qsub")


def test_unknown_options_are_refused(train: Submit) -> None:
    with pytest.raises(SystemExit) as stopped:
        train("--nodez", "2")
    assert stopped.value.code == 2


def test_an_unset_variable_is_no_job_to_wait_for(
    train: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train("--hold", "")
    assert stopped.value.code == 2
    assert "--hold: '' is no job" in capsys.readouterr().err


def test_gpus_and_time(train: Submit, tmp_path: Path) -> None:
    assert train("--time", "2:00:00", "--launcher", "deepspeed")[0] == 0
    job = read_job(folder_of(tmp_path) / "job.json")
    assert (job.gpus_per_node, job.time_limit, job.launcher) == (1, 7200, "deepspeed")
    assert train("--name", "cpu", "--gpus-per-node", "0", "--procs-per-node", "3")[0] == 0
    job = read_job(folder_of(tmp_path, "cpu") / "job.json")
    assert (job.gpus_per_node, job.procs_per_node, job.time_limit) == (0, 3, None)


def test_sweep(train: Submit, grid: FakeGrid, tmp_path: Path) -> None:
    code, _, err = train(
        "--vary", "optim.lr=1e-4,3e-4", "--vary", "optim.betas=[0.9, 0.99],[0.8,0.9]",
        "train.steps=7", command="sweep",
    )  # fmt: skip
    assert code == 0, err
    job = read_job(folder_of(tmp_path) / "job.json")
    assert (job.mode, job.tasks) == ("single", 4)
    seen = set()
    for number in range(1, 5):
        task = job.for_task(number)
        config = load_config(task.arguments[1])
        assert task.arguments[0] == "train"
        assert config.run_dir == str(task.run)
        assert config.train.steps == 7
        assert task.run.parent == tmp_path / "exp/asr"
        seen.add((str(task.run), config.optim.lr, config.optim.betas))
    assert len({one[1:] for one in seen}) == len({one[0] for one in seen}) == 4
    arguments = grid.calls("qsub")[0]
    assert arguments[arguments.index("-t") + 1] == "1-4"
    code, _, err = train("--vary", "optim.lr=1,1", command="sweep")
    assert (code, "are the same" in err) == (2, True)
    code, _, err = train("--vary", "optim.lr", command="sweep")
    assert (code, "KEY=X,Y" in err) == (2, True)


def test_combinations() -> None:
    assert combinations(["a=1,2", "b=x"]) == [("a=1", "b=x"), ("a=2", "b=x")]
    assert combinations(["a={k: 1, l: 2},3"]) == [("a={k: 1, l: 2}",), ("a=3",)]
    with pytest.raises(ConfigError):
        combinations(["=1"])


@given(st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_directories_of_variants_and_names_of_jobs_are_plain(texts: list[str]) -> None:
    assert not set(variant_name([f"a.b={text}" for text in texts])) & set(" /,:$'\"\n*?")
    name = job_name(texts[0])
    Job.model_validate({**ANY_JOB, "name": name})


ANY_JOB: dict[str, Any] = {
    "kind": "train", "run_dir": "/r", "directory": "/", "arguments": (), "python": "/p",
    "repository": "/c", "site": load_profile("but"),
}  # fmt: skip


def test_shard(submit: Submit, grid: FakeGrid, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    code, out, err = submit(
        "shard", "m.jsonl", "--out", "data/train", "--tasks", "3", "--site", "sge_pe",
        "--shard-size", "10MB", "--json",
    )  # fmt: skip
    assert code == 0, err
    plan, array, check = (read_job(Path(one["folder"], "job.json")) for one in json.loads(out))
    assert (plan.tasks, array.tasks, check.tasks, array.is_launched) == (0, 3, 0, False)
    held = [call[-3:-1] for call in grid.calls("qsub")[1:]]
    assert [words[0] for words in held] == ["-hold_jid"] * 2
    assert held[0] != held[1]
    assert make_shards.parse_arguments(plan.after_python[1:]).plan_only
    for number in (1, 2, 3):
        tool, *arguments = array.for_task(number).after_python
        options = make_shards.parse_arguments(arguments)
        assert Path(tool).name == "make_shards.py"
        assert (options.task, options.num_tasks, options.num_workers) == (number, 3, 8)
        assert (options.out, options.shard_size) == (str(tmp_path / "data/train"), 10**7)
        assert make_shards.share_of(options) is not None
    code, out, _ = submit(
        "shard", "m.jsonl", "--out", "few", "--tasks", "3", "--site", "sge_pe", "--num-workers=2",
        "--json",
    )  # fmt: skip
    few = read_job(Path(json.loads(out)[1]["folder"], "job.json")).for_task(1).after_python[1:]
    assert make_shards.parse_arguments(few).num_workers == 2
    options = make_shards.parse_arguments(check.after_python[1:])
    assert options.check_complete
    assert make_shards.share_of(options) is None
    assert options.shard_size == 10**7
    same = ("--out", "d", "--tasks", "3", "--site", "but")
    code, _, err = submit("shard", "no.jsonl", *same)
    assert (code, "no.jsonl: no such file" in err) == (2, True)
    code, _, err = submit("shard", *same)
    assert (code, "no corpus is given" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shard-sise", "10MB"], "unrecognized arguments: --shard-sise 10MB"),
        (["--shard-size", "ten"], "--shard-size"),
        (["--source", "kaldy:data/train"], "--source kaldy:data/train: reads KIND:PATH"),
        (["--overwrite"], "--task goes with neither --overwrite"),
    ],
)
def test_options_that_the_tool_refuses_are_not_submitted(
    submit: Submit, grid: FakeGrid, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "m.jsonl").write_text("")
    same = ("--out", "d", "--tasks", "3", "--site", "sge_pe")
    code, _, err = submit("shard", "m.jsonl", *same, *words)
    assert (code, said in err) == (2, True), err
    assert grid.calls("qsub") == []


def test_nothing_is_submitted_where_a_later_job_is_refused(submit: Submit, grid: FakeGrid) -> None:
    shard = ["shard", "--source", "librispeech:/L", "--out", "d", "--tasks", "9", "--site", "but"]
    code, _, err = submit(*shard, "--with", "array.task_limit=8")
    assert (code, "9 tasks, but the site allows 8" in err) == (2, True), err
    assert grid.calls("qsub") == []
    assert submit(*shard)[0] == 0
    earlier = len(grid.calls("qsub"))
    grid.answer("qstat", QUEUED.replace("11", "12").replace("asr", "shard_d"))
    code, _, err = submit(*shard)
    assert (code, "in the queue already (job 12)" in err) == (2, True), err
    assert len(grid.calls("qsub")) == earlier
    grid.answer("qstat", EMPTY_QUEUE)
    grid.answer("qsub", "31\n", ("", "Only 1 job is allowed per user", 1))
    code, _, err = submit(*shard)
    assert (code, "Only 1 job" in err, "already: shard_d_plan (31)" in err) == (2, True, True), err


def test_shard_of_other_corpora(submit: Submit) -> None:
    sources = ["--source", "kaldi:data/train", "--source", "librispeech:/corpora/L,prefix=l-"]
    code, out, err = submit(
        "shard", *sources, "--normalise", "lowercase", "--out", "d", "--tasks", "2",
        "--site", "sge_pe", "--json",
    )  # fmt: skip
    assert code == 0, err
    for one in json.loads(out):
        words = read_job(Path(one["folder"], "job.json")).for_task(1).after_python
        options = make_shards.parse_arguments(words[1:])
        assert options.source == sources[1::2]
        assert (options.manifest, options.normalise) == (None, ("lowercase",))


def test_generate(submit: Submit, grid: FakeGrid, tmp_path: Path) -> None:
    run = tmp_path / "exp/asr"
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    (run / "config.yaml").write_text(Path(TINY).read_text())
    (run / "best").symlink_to("checkpoints/step_1")
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
    splits = ["--split", "a=data/a", "--split", "b=data/b"]
    for where in ("exp/asr", "exp/asr/best", "exp/asr/checkpoints/step_1"):
        code, out, err = submit(
            "generate", where, *splits, "--parts", "2", "--site", "but", "--json",
            "generation.num_beams=4",
        )  # fmt: skip
        assert code == 0, err
        array, score = (read_job(Path(one["folder"], "job.json")) for one in json.loads(out))
        assert Path(array.run_dir).resolve() == run
    parts = [array.for_task(k).arguments[-3:] for k in range(1, 5)]
    assert parts == [
        ("a=data/a", "--part", "1/2"), ("a=data/a", "--part", "2/2"),
        ("b=data/b", "--part", "1/2"), ("b=data/b", "--part", "2/2"),
    ]  # fmt: skip
    assert (array.gpus_per_node, score.gpus_per_node) == (1, 0)
    assert "generation.num_beams=4" in array.arguments
    assert score.after_python[-3:] == ("--merge", "2", "generation.num_beams=4")
    assert not score.is_launched
    assert "-hold_jid" in grid.calls("qsub")[-1]
    code, _, err = submit("generate", "exp", "--split", "a=b", "--site", "but")
    assert (code, "neither a run directory" in err) == (2, True)
    code, _, err = submit("generate", "exp/asr", "--split", "a", "--site", "but")
    assert (code, "NAME=DIR_OR_GLOB" in err) == (2, True)
    code, _, err = submit("generate", "exp/asr", "--split", "a=data/c", "--site", "but")
    assert (code, "--split a: data/c: no such directory" in err) == (2, True)
    wrong = ("--split", "a=data/a", "--site", "but", "generation.num_baems=4")
    code, _, err = submit("generate", "exp/asr", *wrong)
    assert (code, "did you mean generation.num_beams?" in err) == (2, True), err
    twice = ("--split", "a=data/a", "--split", "a=data/b")
    code, _, err = submit("generate", "exp/asr", *twice, "--site", "but")
    assert (code, "'a' is given twice" in err) == (2, True)


def test_what_is_waited_for_need_not_be_there(
    train: Submit, submit: Submit, tmp_path: Path
) -> None:
    data = "data.train=data/later"
    assert train(data)[0] == 2
    code, out, err = train(data, "--hold", "900", "--json")
    assert code == 0, err
    [job] = json.loads(out)
    later = ("--split", "a=data/later", "--hold", *job["job_ids"], "--site", "but")
    code, _, err = submit("generate", "exp/asr", *later)
    assert code == 0, err
    assert (tmp_path / "exp/asr/cluster/asr_generate/job.json").is_file()
    for checkpoint in ("best", "checkpoints/step_9"):
        code, _, err = submit("generate", f"exp/asr/{checkpoint}", *later)
        assert (code, "neither a run directory" in err) == (2, True)


def test_logs(train: Submit, submit: Submit, tmp_path: Path) -> None:
    assert train("--nodes", "2")[0] == 0
    code, _, err = submit("logs", "exp/asr")
    assert (code, "no log yet" in err) == (2, True)
    logs = folder_of(tmp_path) / "logs"
    for task in (1, 2):
        (logs / f"asr.11.{task}.log").write_text("".join(f"{task} line {i}\n" for i in range(9)))
    code, out, err = submit("logs", "11", "--task", "1", "-n", "2")
    assert (code, out) == (0, "1 line 7\n1 line 8\n")
    assert "asr.11.1.log" in err
    assert submit("logs", "11", "-n", "0")[:2] == (0, "")


def queued(state: Any, job_id: str = "11") -> list[QueuedTask]:
    return [QueuedTask(job_id, "asr", state, "", host="n1")]


def cancelled(tmp_path: Path, queues: list[list[QueuedTask]], wait: float = 9.0) -> Any:
    submission = read_submission(folder_of(tmp_path))
    assert submission is not None
    job = read_job(Path(submission.folder, "job.json"))
    batch = FakeBatch(queues)
    slept: list[float] = []
    said = cancel_job(job, submission, batch, wait, slept.append, lambda: float(len(slept)))
    return said, batch.deleted, len(slept), job.cancel.exists()


def test_cancel_lets_a_running_job_save(train: Submit, tmp_path: Path) -> None:
    assert train("--chain", "2")[0] == 0
    status = tmp_path / "exp/asr/status.json"
    status.write_text(json.dumps({"state": "saved", "step": 5, "time": 2e9 * 10}))
    both = [*queued("running"), *queued("held", "12")]
    said, deleted, slept, asked = cancelled(tmp_path, [both])
    assert said == "saved at step 5 and cancelled"
    assert deleted == ["12", "11", "12"]  # what waits must not start when the first one leaves
    assert (slept, asked) == (9, True)
    status.write_text(json.dumps({"state": "running", "step": 5, "time": 1.0}))
    said, deleted, slept, _ = cancelled(tmp_path, [queued("running")], wait=3.0)
    assert (said, deleted, slept) == ("cancelled", ["12", "11"], 3)
    said, deleted, slept, _ = cancelled(tmp_path, [queued("running"), queued("running"), []])
    assert (said, deleted, slept) == ("cancelled", ["12"], 1)
    assert cancelled(tmp_path, [[]])[:2] == ("not in the queue", [])


def test_cancel_of_a_job_that_waits_is_at_once(train: Submit, tmp_path: Path) -> None:
    assert train()[0] == 0
    said, deleted, slept, _ = cancelled(tmp_path, [queued("pending"), queued("pending"), []])
    assert (said, deleted, slept) == ("cancelled", ["11"], 0)


def test_cancel_of_a_job_that_was_submitted_by_hand(train: Submit, tmp_path: Path) -> None:
    assert train()[0] == 0
    start = {"event": "start", "time": 1.0, "job_id": "55"}
    (folder_of(tmp_path) / "attempts.jsonl").write_text(json.dumps(start) + "\n")
    said, deleted, slept, asked = cancelled(tmp_path, [queued("running", "55")], wait=3.0)
    assert (said, deleted, slept, asked) == ("cancelled", ["11", "55"], 3, True)


def test_submitting_again_takes_back_the_wish_to_cancel(train: Submit, tmp_path: Path) -> None:
    assert train()[0] == 0
    cancel = folder_of(tmp_path) / "cancel"
    cancel.touch()
    assert train()[0] == 0
    assert not cancel.exists()


def test_cancel_by_the_command_line(train: Submit, submit: Submit, grid: FakeGrid) -> None:
    assert train()[0] == 0
    grid.answer("qstat", QUEUED)
    code, out, _ = submit("cancel", "11", "--now")
    assert (code, out) == (0, "asr: cancelled\n")
    assert grid.calls("qdel") == [["11"]]
    code, _, err = submit("cancel", "nothing")
    assert (code, "neither a run directory nor a job" in err) == (2, True)
