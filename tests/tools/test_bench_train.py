"""The training benchmark at sizes that take a moment; what is asserted is what it counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import bench_speech
import bench_train
import bench_train_flops
import bench_train_timing
import bench_train_ways
import pytest
from bench_train_flops import Row, count_flops, layer_rate
from bench_train_process import Failed, Process
from bench_train_sample import Sample
from bench_train_subject import Subject
from speech_files import write_shards

from speechllm.config.load import load_config
from speechllm.config.model import MLPConnector
from speechllm.data.index import open_corpus
from speechllm.data.store import Store
from speechllm.errors import UserError
from speechllm.planner.architecture import Architecture, Transformer
from speechllm.prepare import prepare_text
from speechllm.training_data import open_training
from speechllm.world import World

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "configs" / "tiny.yaml")
DEMO = str(ROOT / "configs" / "demo.yaml")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("pieces"), 100, seconds=(0.5, 3.0))


def test_joined_speech_has_the_wanted_lengths_and_texts(pieces: Path, tmp_path: Path) -> None:
    made = bench_speech.speech_shards(4.0, 30, source=[str(pieces)], cache=tmp_path / "a")
    corpus, source = open_corpus([str(made)]), open_corpus([str(pieces)])
    assert len(corpus) == 30
    assert corpus.durations.mean() == pytest.approx(4.0, rel=0.05)
    assert corpus.durations.min() < 2.5
    assert corpus.durations.max() > 8
    texts = {Store(source).read(i).text for i in range(len(source))}
    spoken = Store(corpus).read(0)
    parts = bench_speech.joins(source.durations.tolist(), bench_speech.targets(4.0, 30, 0), 0)[0]
    pieces_of_it = [Store(source).read(i) for i in parts]
    assert spoken.text == " ".join(piece.text for piece in pieces_of_it)
    assert len(spoken.samples) == sum(len(piece.samples) for piece in pieces_of_it)
    assert {piece.text for piece in pieces_of_it} <= texts


def test_joined_speech_depends_on_the_arguments_alone(pieces: Path, tmp_path: Path) -> None:
    def tar(cache: str, seed: int) -> bytes:
        made = bench_speech.speech_shards(
            3.0, 4, seed=seed, source=[str(pieces)], cache=tmp_path / cache
        )
        return (made / "speech-000000.tar").read_bytes()

    assert tar("a", 0) == tar("b", 0)
    assert tar("a", 1) != tar("a", 0)


def test_pieces_are_used_about_equally_often() -> None:
    parts = bench_speech.joins([1.0] * 100, [10.0] * 30, seed=0)
    times = Counter(piece for part in parts for piece in part)
    assert len(times) == 100
    assert sum(times.values()) == 300
    assert max(times.values()) <= 4


def test_lengths_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UserError, match="2 to 30"):
        bench_speech.targets(60.0, 4, 0)


def _architecture() -> Architecture:
    llm = Transformer(
        layers=3, width=8, heads=2, kv_heads=1, head_width=4, feed_forward=16, gated=True,
        head_norms=False, mels=0, vocabulary=100, parameters=0, layer_parameters=0,
        embedding_parameters=0, head_parameters=0,
    )  # fmt: skip
    whisper = Transformer(
        layers=2, width=6, heads=2, kv_heads=2, head_width=3, feed_forward=24, gated=False,
        head_norms=False, mels=10, vocabulary=0, parameters=0, layer_parameters=0,
        embedding_parameters=0, head_parameters=0,
    )  # fmt: skip
    return Architecture(
        llm=llm, whisper=whisper, connector=MLPConnector(downsampling_factor=5, hidden_size=12),
        frame_width=6, filterbank_mels=0, connector_parameters=0, lora_rank=0, lora_parameters=0,
        lora_inputs=0, lora_matrices=0, unfrozen_layers=0,
    )  # fmt: skip


def test_operations_are_those_counted_by_hand() -> None:
    row = Row(frames=10, tokens=2, positions=3, prefix=2, labels=1)
    found = count_flops(_architecture(), [row])
    # q 8x8, k and v 8x4, o 8x8, gate and up 8x16, down 16x8: 576 weights; 2 operations each, for
    # the output and for the gradient of the input. Attention: 1 + 2 + 3 pairs of one's own, 3 x 2
    # with the prefix, 8 wide; a pair takes 2 products forward and 4 backward, but 2 where its key
    # is of the prefix and needs no gradient.
    linear = 3 * 2 * 2 * 576
    attention = 2 * 8 * (6 * (2 + 4) + 6 * (2 + 2))
    assert found["llm"] == 3 * (linear + attention)
    assert found["head"] == 2 * 2 * 8 * 100
    # LayerNorm left out; 30 x 12 without the gradient of its input, 12 x 8 with it.
    assert found["connector"] == 2 * (2 * 2 * 360 + 3 * 2 * 96)
    convolutions = 10 * (2 * 2 * 3 * 10 * 6 + 2 * 3 * 6 * 6)
    layer = 10 * 2 * (4 * 36 + 2 * 6 * 24) + 2 * 2 * 10 * 10 * 6
    assert found["encoder"] == convolutions + 2 * layer
    assert count_flops(_architecture(), [row, row]) == {k: 2 * n for k, n in found.items()}


def test_long_audio_is_attended_to_in_chunks() -> None:
    def encoder(frames: int) -> int:
        return count_flops(_architecture(), [Row(frames, 0, 0, 0, 0)])["encoder"]

    assert encoder(1600) == encoder(1500) + encoder(100)
    assert encoder(1500) > 15 * encoder(100)


def test_products_take_time() -> None:
    rate = layer_rate(_architecture().llm, 4, torch.float32, CPU)
    assert 0 < rate < 1e12


def test_a_moment_belongs_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(bench_train_timing.time, "perf_counter", lambda: next(clock))
    timeline = bench_train_timing.Timeline(CPU)
    with timeline.phase("llm_forward"):  # 0
        with timeline.phase("encoder"):  # 1
            timeline.begin_span("part")  # 2
            with timeline.phase("mel"):  # 3, 4
                pass
            timeline.end_span("part")  # 5
        timeline.become("head")  # 6 leaves the encoder, 7
    with timeline.phase("backward"):  # 8 leaves the head; 9, 10
        pass
    assert timeline.read() == {
        "llm_forward": 2, "encoder": 4, "mel": 1, "head": 1, "backward": 1, "other": 1, "part": 3,
    }  # fmt: skip
    assert timeline.read() == {}


def test_ways_go_from_the_plain_path_to_the_configuration_itself() -> None:
    config = load_config(DEMO)
    found = bench_train_ways.ways(config, 8)
    assert found[0].name == "plain"
    assert load_config(DEMO, found[0].overrides).performance.preset == "plain"
    assert found[-1].overrides == ()
    for way, following in pairwise(found[1:]):
        assert set(following.overrides) < set(way.overrides)
        load_config(DEMO, way.overrides)
    off = load_config(DEMO, found[1].overrides)
    assert off.model.encoder.kind == "whisper"
    assert off.model.encoder.context == "pad30"
    assert (off.performance.prefix_cache, off.performance.label_logits) == ("off", False)


def test_shortcuts_that_a_configuration_does_not_take_are_no_ways() -> None:
    overrides = ["performance.prefix_cache=off", "performance.label_logits=false"]
    some = bench_train_ways.ways(load_config(DEMO, overrides), 8)
    every = bench_train_ways.ways(load_config(DEMO), 8)
    assert len(some) == len(every) - 2


class Here:
    """In place of a process: the same questions in this one."""

    def __init__(
        self, config: str, overrides: Sequence[str], *, steps: int, world: int, threads: int
    ) -> None:
        self.ask = Subject(load_config(config, overrides), World(0, 1, 0, CPU), steps).ask

    def close(self) -> None:
        pass


@pytest.mark.parametrize("steps", [2, 40])
def test_every_way_goes_through_the_same_utterances_once(pieces: Path, steps: int) -> None:
    def utterances(*overrides: str) -> list[int]:
        config = load_config(
            TINY, [f"data.train={pieces}", "data.microbatch_tokens=512", *overrides]
        )
        sample = Sample.of(config, open_training(config, prepare_text(config)), steps)
        return sorted(n for k in range(sample.num_steps) for part in sample.step(k) for n in part)

    full = utterances()
    assert len(full) == len(set(full)) == (100 if steps == 40 else len(full))
    assert utterances("performance.preset=plain") == full


def test_a_wrong_strategy_is_found_before_anything_is_measured(
    pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "speech_shards", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UserError, match="--strategies zero7: neither ddp"):
        bench_train.main([TINY, "--source", str(pieces), "--strategies", "ddp,zero7"])


@pytest.fixture(scope="module")
def result(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all ways, with the tiny models; written to a file and read again."""
    directory = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_train, "Process", Here)
        patch.setattr(bench_train_ways, "CACHE_TOOL", directory / "none")
        patch.setattr(bench_train, "TOKENS", (300, 600))
        patch.setattr(bench_train_flops, "SQUARES", (64,))
        arguments = [
            TINY, "model.connector.dropout=0", "--mean-seconds", "2", "--steps", "2",
            "--batch", "3", "--utterances", "60", "--rounds", "2", "data.num_workers=0",
            "--source", str(pieces),
            "--speech-cache", str(directory), "--strategies", "ddp",
            "--trace", str(directory / "trace.json"), "--json", str(directory / "result.json"),
        ]  # fmt: skip
        assert bench_train.main(arguments) == 0
    read = json.loads((directory / "result.json").read_text())
    read["trace_file"] = str(directory / "trace.json")
    return read


def test_the_result_has_its_shape(result: dict[str, Any]) -> None:
    assert result["mean_seconds"] == 2
    assert result["plain"]["utterances_per_second"] > 0
    assert {
        "utterances_per_second", "mfu", "padding_fraction", "data_wait_fraction", "peak_rss_bytes",
        "phases",
    } <= result["full"].keys()  # fmt: skip
    assert list(result["full"]["phases"]) == [
        "load", "mel", "encoder", "connector", "llm_forward", "head", "backward", "optimizer",
        "communication",
    ]  # fmt: skip
    assert result["speedup"] == result["ablation"][-1]["ratio"]
    assert len(result["ablation"]) == len(bench_train_ways.ways(load_config(TINY), 3))
    for entry in result["ablation"]:
        assert {"added", "utterances_per_second", "ratio"} <= entry.keys()
    assert result["gemm_peak_flops"] > 0
    assert [entry["tokens"] for entry in result["llm"]] == [300, 600]
    assert result["strategies"][0]["utterances_per_second"] > 0
    assert set(result["precision"]) == {"fp32", "bf16"}
    assert result["precision"]["bf16"]["settings"]["precision"] == "bf16"


def test_utilisation_is_work_over_time_and_peak(result: dict[str, Any]) -> None:
    full = result["full"]
    needed = sum(full["flops_per_step"].values())
    speeds = [
        needed * full["steps"] / full["utterances"] * speed / gemm["own"]
        for speed, gemm in zip(full["rounds"], result["gemm"], strict=True)
    ]
    assert full["mfu"] == pytest.approx(sum(speeds) / 2)


def test_phases_take_the_time_of_a_step(result: dict[str, Any]) -> None:
    for way in ("plain", "full"):
        phases, details = result[way]["phases"], result[way]["details"]
        whole = sum(phases.values()) + details["other"]
        assert whole == pytest.approx(result[way]["step_seconds"], rel=0.35)
        assert 0 < details["llm_backward"] < phases["backward"]
        for phase in ("mel", "encoder", "connector", "llm_forward", "head", "backward"):
            assert phases[phase] > 0, (way, phase)


def test_every_way_has_the_same_utterances_and_nearly_the_same_loss(
    result: dict[str, Any],
) -> None:
    assert result["plain"]["utterances"] == result["full"]["utterances"] >= 4
    assert result["plain"]["flops_per_step"]["llm"] * result["plain"]["steps"] == pytest.approx(
        result["full"]["flops_per_step"]["llm"] * result["full"]["steps"]
    )
    assert result["equal_loss"]["difference_in_same_context"] < 1e-5
    assert result["equal_loss"]["difference"] < 1e-2


def test_the_plain_path_runs_more_than_is_needed(result: dict[str, Any]) -> None:
    plain, full = result["plain"], result["full"]
    frames = plain["encoder_frames_per_step"]["run"] * plain["steps"]
    assert frames == 1500 * plain["utterances"]
    for key in ("encoder_frames_per_step", "llm_positions_per_step"):
        needed = full[key]["needed"] * full["steps"]
        assert needed == plain[key]["needed"] * plain["steps"]
        assert needed <= full[key]["run"] * full["steps"] < plain[key]["run"] * plain["steps"]

    for way in (plain, full):
        for part, needed in way["flops_per_step"].items():
            assert way["flops_run_per_step"][part] >= needed, part
    assert result["operations_ratio"] > 2


def test_the_trace_is_a_chrome_trace(result: dict[str, Any]) -> None:
    events = json.loads(Path(result["trace_file"]).read_text())["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)


def test_a_process_answers_and_its_end_is_told() -> None:
    process = Process(TINY, [], steps=1, world=1, threads=1)
    try:
        rates = process.ask("gemm", rows=[8])
        assert rates["shapes"]["8"] > 0
        with pytest.raises(Failed, match="nothing of the kind"):
            process.ask("nothing of the kind")
    finally:
        process.close()
