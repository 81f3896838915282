"""What a run has trained, in files that other software reads.

OUT/adapter_model.safetensors, adapter_config.json   LoRA, as peft writes it
OUT/connector.safetensors                            names as in the module `connector`
OUT/encoder.safetensors                              of the Whisper encoder or the filterbank
OUT/config.yaml                                      what the connector is built from

peft is imported only where there is LoRA to write.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from safetensors.torch import save_file

from speechllm.checkpoint import find_checkpoint
from speechllm.config import model as schema
from speechllm.config.load import load_config
from speechllm.errors import UserError
from speechllm.model.adapt import ADAPTER, lora_config, takes_all
from speechllm.snapshot import read_trainable

WHISPER = "encoder.encoder."  # the Whisper within what feeds it
IN_PEFT = "base_model.model."  # what peft's wrapper puts before the names of the LLM


def export_run(run: Path, out: Path) -> list[Path]:
    """Write the trained weights of the run's best checkpoint (or of the one that `run` is).

    Returns the files, without LoRA none of peft's.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ModelError: there is LoRA to write, and peft is not installed.
        UserError: `out` holds something, or cannot be made.
    """
    checkpoint = find_checkpoint(run)
    model = load_config(str(checkpoint / "config.yaml")).model
    weights = read_trainable(checkpoint, weights_only=True).weights
    _make_empty(out)
    if model.lora.rank:
        _write_adapter(model, _under("llm.", weights), out)
    encoder = WHISPER if model.encoder.kind == "whisper" else "encoder."
    for name, prefix in (("connector", "connector."), ("encoder", encoder)):
        if part := _under(prefix, weights):
            save_file(part, out / f"{name}.safetensors", metadata={"format": "pt"})
    shutil.copyfile(checkpoint / "config.yaml", out / "config.yaml")
    return sorted(out.iterdir())


def _write_adapter(model: schema.Model, weights: Mapping[str, Tensor], out: Path) -> None:
    matrices = {n.replace(f".{ADAPTER}.weight", ".weight"): t for n, t in weights.items()}
    targets = list(model.lora.targets)
    if takes_all(model.lora):
        # Which layers these are depends on the class that peft is given; their names do not.
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in matrices})
    about = lora_config(model.lora, targets)
    about.base_model_name_or_path = model.llm.id
    about.revision = model.llm.revision
    about.task_type = "CAUSAL_LM"
    about.inference_mode = True
    about.save_pretrained(str(out))
    named = {IN_PEFT + name: tensor for name, tensor in matrices.items()}
    save_file(named, out / "adapter_model.safetensors", metadata={"format": "pt"})


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def _make_empty(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        holds = next(out.iterdir(), None)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror})") from error
    if holds is not None:
        raise UserError(f"--out {out}: holds {holds.name} already; give another directory")
