from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safetensors.torch import load_file, save_file

import pytest
from forked_ranks import Ranks
from runs import TINY

import speechllm.decode
from speechllm.cli import main
from speechllm.config.load import load_config
from speechllm.decode import Slice, decoded_together, generate_run, merge_slices
from speechllm.errors import UserError
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
DECODING = ["generation.max_new_tokens=4", "generation.microbatch_tokens=300"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    directory = tmp_path_factory.mktemp("decode") / "run"
    code = main(
        ["train", TINY, f"run_dir={directory}", f"data.train={shards}", "train.steps=2",
         "data.num_workers=0", *DECODING]
    )  # fmt: skip
    assert code == 0
    return directory


def lines(run_dir: Path, split: str) -> list[dict[str, Any]]:
    text = (run_dir / "predictions" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_every_utterance_once_by_id(trained: Path, shards: Path) -> None:
    settings = "generation.max_new_tokens=4"  # an override after an option, as people type it
    assert main(["generate", str(trained), "--split", f"all={shards}", settings]) == 0
    found = lines(trained, "all")
    assert [line["id"] for line in found] == [f"utt-{i:05d}" for i in range(48)]
    assert {"id", "ref", "hyp", "duration"} == found[0].keys()
    assert all(0.25 < line["duration"] < 2.05 and line["ref"] for line in found)
    whole = json.loads((trained / "test_predictions.json").read_text(encoding="utf-8"))
    assert whole["all"]["ids"] == [line["id"] for line in found]
    assert whole["all"]["labels"] == [line["ref"] for line in found]
    assert whole["all"]["predictions"] == [line["hyp"] for line in found]
    assert not list((trained / "predictions").glob(".all.part*"))


def test_the_size_of_batches_changes_nothing(trained: Path, shards: Path) -> None:
    generate_run(trained, {"one": str(shards)}, ["generation.microbatch_tokens=120"], ALONE)
    generate_run(trained, {"many": str(shards)}, ["generation.microbatch_tokens=2000"], ALONE)
    assert lines(trained, "one") == lines(trained, "many")


def test_the_plain_path_takes_utterances_as_they_come(trained: Path) -> None:
    settings = ["performance.preset=plain", "performance.plain_utterances=5"]
    config = load_config(str(trained / "config.yaml"), settings)
    cut = decoded_together(config, np.zeros(0), np.arange(3, 15))
    assert [part.tolist() for part in cut] == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]


def test_the_plain_path_says_the_same(trained: Path, shards: Path) -> None:
    few = ["data.max_seconds=0.5", "generation.max_new_tokens=12"]
    about = trained / "predictions" / ".padded.json"
    generate_run(trained, {"padded": str(shards)}, few, ALONE)
    trimmed = about.read_text(encoding="utf-8")
    generate_run(trained, {"padded": str(shards)}, [*few, "model.encoder.context=pad30"], ALONE)
    assert about.read_text(encoding="utf-8") != trimmed, "not decoded anew for another encoder"
    generate_run(trained, {"plain": str(shards)}, [*few, "performance.preset=plain"], ALONE)
    assert 2 <= len(lines(trained, "plain")) <= 8
    assert lines(trained, "plain") == lines(trained, "padded")


def test_decoding_goes_on_where_it_was_cut_short(
    trained: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_run(trained, {"whole": str(shards)}, [], ALONE)
    real, calls = speechllm.decode.generate, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(speechllm.decode, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        generate_run(trained, {"cut": str(shards)}, [], ALONE)
    total = calls
    part = trained / "predictions" / ".cut.part0.jsonl"
    with part.open("a", encoding="utf-8") as file:
        file.write('{"number": 0, "id": "half a li')  # as a kill in a write leaves it
    generate_run(trained, {"cut": str(shards)}, [], ALONE)
    assert lines(trained, "cut") == lines(trained, "whole")
    done_before = total - 1
    calls = 0
    monkeypatch.setattr(speechllm.decode, "generate", real)
    generate_run(trained, {"cut": str(shards)}, [], ALONE)  # finished: nothing is decoded
    assert done_before == 3


def test_other_settings_decode_anew(trained: Path, shards: Path) -> None:
    generate_run(trained, {"s": str(shards)}, ["generation.max_new_tokens=4"], ALONE)
    four = lines(trained, "s")
    generate_run(trained, {"s": str(shards)}, ["generation.max_new_tokens=1"], ALONE)
    assert lines(trained, "s") != four


@pytest.mark.parametrize(
    "setting",
    ["data.max_seconds=0.6", "model.prompt.texts=Write it down: {audio}", "model.llm.revision=x"],
)
def test_what_is_read_and_asked_decodes_anew(trained: Path, shards: Path, setting: str) -> None:
    few = ["data.max_seconds=0.5", "generation.max_new_tokens=2"]
    maker = trained / "predictions" / ".asked.json"
    generate_run(trained, {"asked": str(shards)}, few, ALONE)
    before, said = maker.read_text(encoding="utf-8"), lines(trained, "asked")
    generate_run(trained, {"asked": str(shards)}, [*few, setting], ALONE)
    assert maker.read_text(encoding="utf-8") != before, "what was there counted as done"
    if setting.startswith("data."):
        assert len(lines(trained, "asked")) > len(said)


def test_a_checkpoint_of_the_same_name_with_other_weights_decodes_anew(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True, ignore=shutil.ignore_patterns("predictions"))
    generate_run(run, {"again": str(shards)}, ["data.max_seconds=0.5"], ALONE)
    maker = run / "predictions" / ".again.json"
    before = maker.read_text(encoding="utf-8")
    for file in run.glob("checkpoints/*/trainable.safetensors"):
        save_file({name: -weight for name, weight in load_file(file).items()}, file)
    generate_run(run, {"again": str(shards)}, ["data.max_seconds=0.5"], ALONE)
    assert maker.read_text(encoding="utf-8") != before, "what was there counted as done"


@pytest.mark.distributed
def test_predictions_of_the_link_to_the_best_are_with_its_run(trained: Path, shards: Path) -> None:
    best = trained / "best"
    best.unlink(missing_ok=True)
    best.symlink_to("checkpoints/step_00000002")
    written = generate_run(best, {"linked": str(shards)}, ["data.max_seconds=0.5"], ALONE)
    best.unlink()
    assert written["linked"] == trained / "predictions" / "linked.jsonl"
    maker = json.loads((trained / "predictions" / ".linked.json").read_text(encoding="utf-8"))
    assert maker["checkpoint"] == "step_00000002"


def test_two_ranks_share_the_work_and_say_the_same(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    generate_run(trained, {"alone": str(shards)}, [], ALONE)
    ended = Ranks(tmp_path, ["generate", str(trained), "--split", f"both={shards}"]).wait()
    assert ended.codes == [0, 0], ended.logs
    assert lines(trained, "both") == lines(trained, "alone")


class SecondOfTwo(World):
    """Its file server still shows what the first rank has removed, or not yet what it has written.
    `told`: what the first rank says."""

    told: Any

    def from_main(self, value: Any) -> Any:
        assert value is None
        return self.told

    def barrier(self) -> None:
        pass


def test_what_is_done_is_what_the_first_rank_says(trained: Path, shards: Path) -> None:
    generate_run(trained, {"seen": str(shards)}, [], ALONE)
    second = SecondOfTwo(1, 2, 0, torch.device("cpu"))
    object.__setattr__(second, "told", [False, list(range(40))])
    generate_run(trained, {"seen": str(shards)}, ["generation.microbatch_tokens=100"], second)
    part = (trained / "predictions" / ".seen.part1.jsonl").read_text(encoding="utf-8")
    numbers = {json.loads(line)["number"] for line in part.splitlines()}
    assert numbers
    assert numbers < set(range(40, 48)), "not a share of what is left"


def test_slices_merge_into_what_one_process_writes(
    trained: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_run(trained, {"whole": str(shards)}, [], ALONE)
    split = ["--split", f"sliced={shards}"]
    for part in ("3/3", "1/3"):
        assert main(["generate", str(trained), *split, "--part", part]) == 0
    assert not (trained / "predictions" / "sliced.jsonl").exists()
    assert main(["generate", str(trained), *split, "--merge", "3"]) == 2
    assert "sliced.slice2of3" in capsys.readouterr().err
    assert main(["generate", str(trained), *split, "--part", "2/3"]) == 0
    for _ in range(2):  # a merge that was killed is done again
        assert main(["generate", str(trained), *split, "--merge", "3"]) == 0
    assert lines(trained, "sliced") == lines(trained, "whole")
    everything = json.loads((trained / "test_predictions.json").read_text(encoding="utf-8"))
    assert everything["sliced"] == everything["whole"]
    rates = json.loads((trained / "predictions" / "wer.json").read_text(encoding="utf-8"))
    assert rates["sliced"]["utterances"] == 48
    assert f"{100 * rates['sliced']['wer']:.2f}" in capsys.readouterr().out


def test_more_slices_than_microbatches(trained: Path, shards: Path) -> None:
    generate_run(trained, {"whole": str(shards)}, [], ALONE)
    settings = ["generation.microbatch_tokens=100000"]  # all 48 are one microbatch
    for number in (1, 2):
        generate_run(trained, {"few": str(shards)}, settings, ALONE, part=Slice(number, 2))
    merge_slices(trained, ["few"], 2)
    assert [row["id"] for row in lines(trained, "few")] == [
        row["id"] for row in lines(trained, "whole")
    ]


def test_slices_of_different_settings_do_not_merge(trained: Path, shards: Path) -> None:
    for number, tokens in ((1, 2), (2, 3)):
        settings = [f"generation.max_new_tokens={tokens}"]
        generate_run(trained, {"mixed": str(shards)}, settings, ALONE, part=Slice(number, 2))
    with pytest.raises(UserError, match=r"mixed\.slice2of2 is of another checkpoint"):
        merge_slices(trained, ["mixed"], 2)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/"])
def test_a_part_is_k_of_n(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "run", "--split", "a=b", "--part", part])
    assert "K/N" in capsys.readouterr().err
