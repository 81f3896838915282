"""How many parameters a configuration has, from the models' configuration files alone."""

from __future__ import annotations

import torch

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechllm.config import model as schema
from speechllm.model.connector import build_connector
from speechllm.model.encoder import FilterbankFrames
from speechllm.model.hub import resolve


def count_parameters(model: schema.Model) -> tuple[int, int]:
    """(frozen, trained). Built without storage, so that a 70 B model costs seconds.

    Raises:
        ModelError: a model is not on this machine.
    """
    with torch.device("meta"):
        directory = resolve(model.llm.id, model.llm.revision, download=False)
        llm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
        frozen = sum(p.numel() for p in llm.parameters())
        match model.encoder.kind:
            case "whisper":
                about = AutoConfig.from_pretrained(
                    resolve(model.encoder.id, model.encoder.revision, download=False)
                )
                frozen += sum(p.numel() for p in WhisperEncoder(about).parameters())
                width, trained = about.d_model, 0
            case "fbank":
                front = FilterbankFrames(model.encoder.mels, model.encoder.hidden_size)
                width, trained = front.width, sum(p.numel() for p in front.parameters())
        out = llm.get_input_embeddings().embedding_dim
        connector = build_connector(model.connector, width, out, out_rms=1.0)
    return frozen, trained + sum(p.numel() for p in connector.parameters())
