"""Training LoRA and encoder layers with the connector, and handing them to other software."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pytest
from runs import assert_same_run, tiny_config

from speechllm.checkpoint import find_checkpoint
from speechllm.cli import main
from speechllm.config.load import load_config
from speechllm.decode import load_trained
from speechllm.errors import CheckpointError
from speechllm.export import export_run
from speechllm.model.hub import resolve
from speechllm.train import DONE, train
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
LORA = ("model.lora.rank=4", "model.lora.alpha=6", "model.lora.dropout=0.1")
UNFROZEN = "model.unfreeze_encoder_layers=1"


def run(directory: Path, shards: Path, *overrides: str, steps: int = 3) -> Path:
    settings = (f"train.steps={steps}", "data.num_workers=0", "optim.lr=1e-2")
    assert train(tiny_config(directory, shards, *settings, *overrides), ALONE) == DONE
    return directory


def logits(llm: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = llm(input_ids=torch.arange(40).view(2, 20)).logits
    return result


@pytest.mark.parametrize("targets", ["[q_proj,layers.1.mlp.up_proj]", "all-linear"])
def test_peft_loads_what_was_trained(tmp_path: Path, shards: Path, targets: str) -> None:
    directory = run(tmp_path / "run", shards, *LORA, f"model.lora.targets={targets}")
    out = tmp_path / "new" / "export"
    written = export_run(directory, out)
    assert [path.name for path in written] == [
        "adapter_config.json", "adapter_model.safetensors", "config.yaml", "connector.safetensors"
    ]  # fmt: skip
    _, model, _, _ = load_trained(directory, [], prefer="last", world=ALONE)
    base = AutoModelForCausalLM.from_pretrained(resolve("random:llama"), dtype=torch.float32)
    before = logits(base.eval())
    adapted = PeftModel.from_pretrained(base, str(out)).eval()
    torch.testing.assert_close(logits(adapted), logits(model.llm), rtol=0, atol=1e-6)
    assert (logits(adapted) - before).abs().max() > 1e-3
    model.connector.load_state_dict(load_file(out / "connector.safetensors"))  # all, and no others
    assert load_config(str(out / "config.yaml")).model.lora.rank == 4


def test_a_run_with_lora_and_encoder_layers_resumes_to_the_bit(
    tmp_path: Path, shards: Path
) -> None:
    adapted = (*LORA, UNFROZEN, "optim.schedule=constant")
    whole = run(tmp_path / "whole", shards, *adapted)
    run(tmp_path / "cut", shards, *adapted, steps=2)
    cut = run(tmp_path / "cut", shards, *adapted)
    assert_same_run(whole, cut)
    stored = load_file(find_checkpoint(cut, prefer="last") / "trainable.safetensors")
    assert {name.split(".")[0] for name in stored} == {"connector", "encoder", "llm"}
    for change in (
        "model.lora.alpha=7", "model.lora.targets=all-linear", "model.lora.rank=0",
        "model.unfreeze_encoder_layers=2",
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=change.split("=")[0].rpartition(".")[0]):
            run(cut, shards, *adapted, change, steps=4)


def test_without_lora_there_is_nothing_for_peft(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run(tmp_path / "run", shards, UNFROZEN, steps=1)
    out = tmp_path / "export"
    assert main(["export", str(directory), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [
        str(out / f"{name}") for name in ("config.yaml", "connector.safetensors",
                                          "encoder.safetensors")
    ]  # fmt: skip
    assert "no LoRA" in printed.err
    encoder = load_trained(directory, [], prefer="last", world=ALONE)[1].encoder.encoder
    trained = load_file(out / "encoder.safetensors")
    assert all(torch.equal(encoder.get_parameter(name), w) for name, w in trained.items())
    assert main(["export", str(directory), "--out", str(out)]) == 2
    assert "holds" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_refused_and_nothing_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "speechllm export exp/first --out" in capsys.readouterr().out
