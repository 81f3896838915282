"""What sizes follow from: the shapes and parameter counts of encoder, connector and LLM.

They come from configuration files alone (a model's own, or the table of published ones); nothing
is downloaded and no weights are read. This is the one place that counts parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.adapt import refuse_too_many_layers, refuse_unknown_targets
from speechllm.model.connector import build_connector
from speechllm.model.encoder import FilterbankFrames
from speechllm.model.head import plain_head
from speechllm.model.hub import RANDOM, resolve
from speechllm.model.prefix import longest_row
from speechllm.model.pretrained import refuse_no_decoder, refuse_no_whisper
from speechllm.planner.published import PUBLISHED, published


@dataclass(frozen=True)
class Transformer:
    """A stack of equal layers. Counts are of parameters."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    gated: bool  # two matrices into the feed-forward block, one through an activation function
    head_norms: bool  # queries and keys are normalised
    mels: int  # of an encoder, else 0
    vocabulary: int  # of an LLM, else 0
    parameters: int
    layer_parameters: int
    embedding_parameters: int
    head_parameters: int  # of an output matrix that is not the embedding


@dataclass(frozen=True)
class Architecture:
    """The model of a configuration. Counts are of parameters."""

    llm: Transformer
    whisper: Transformer | None  # None: a filterbank, which trains
    connector: schema.Connector
    frame_width: int
    filterbank_mels: int  # 0 with a Whisper
    connector_parameters: int  # with the filterbank's, where there is one
    lora_rank: int
    lora_parameters: int
    lora_inputs: int  # widths of the different inputs of adapted matrices, summed over the LLM
    lora_matrices: int
    unfrozen_layers: int  # of the Whisper, the last ones
    longest_row: int | None = None  # see `speechllm.model.prefix.longest_row`
    plain_head: bool = True  # see `speechllm.model.head.plain_head`

    @property
    def unfrozen_parameters(self) -> int:
        """The layers and the norm after the last."""
        if self.whisper is None or not self.unfrozen_layers:
            return 0
        return self.unfrozen_layers * self.whisper.layer_parameters + 2 * self.whisper.width

    @property
    def trained_parameters(self) -> int:
        return self.connector_parameters + self.lora_parameters + self.unfrozen_parameters

    @property
    def frozen_encoder_parameters(self) -> int:
        return (self.whisper.parameters if self.whisper else 0) - self.unfrozen_parameters

    @property
    def frozen_parameters(self) -> int:
        return self.llm.parameters + self.frozen_encoder_parameters


def read_architecture(model: schema.Model) -> Architecture:
    """From the models' configuration files, built without storage.

    Raises:
        ModelError: a model is neither on this machine nor in the table of published ones, or it is
            of another kind, or has not the layers that are to train.
    """
    whisper: Transformer | None
    # First of all, since a `random:` model is built on first use, with storage.
    about_llm = _model_config(model.llm.id, model.llm.revision)
    refuse_no_decoder(model.llm.id, about_llm)
    about_whisper = None
    if model.encoder.kind == "whisper":
        about_whisper = _model_config(model.encoder.id, model.encoder.revision)
        refuse_no_whisper(model.encoder.id, about_whisper)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(about_llm).requires_grad_(False)
        match model.encoder.kind:
            case "whisper":
                whisper = _whisper(about_whisper)
                refuse_too_many_layers(
                    model.unfreeze_encoder_layers, whisper.layers, model.encoder.id
                )
                frame_width, front = whisper.width, 0
            case "fbank":
                frames = FilterbankFrames(model.encoder.mels, model.encoder.hidden_size)
                whisper, frame_width, front = None, frames.width, _count(frames)
        width = llm.get_input_embeddings().embedding_dim
        connector = build_connector(model.connector, frame_width, width, out_rms=1.0)
    adapted = _adapted(llm, model.lora) if model.lora.rank else []
    return Architecture(
        llm=_decoder(llm, about_llm),
        whisper=whisper,
        connector=model.connector,
        frame_width=frame_width,
        filterbank_mels=model.encoder.mels if model.encoder.kind == "fbank" else 0,
        connector_parameters=_count(connector) + front,
        lora_rank=model.lora.rank,
        lora_parameters=model.lora.rank * sum(a.inputs + a.outputs for a in adapted),
        lora_inputs=sum({a.source: a.inputs for a in adapted}.values()),
        lora_matrices=len(adapted),
        unfrozen_layers=model.unfreeze_encoder_layers if whisper else 0,
        longest_row=longest_row(llm),
        plain_head=plain_head(llm) is not None,
    )


def _model_config(id: str, revision: str | None) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(resolve(id, revision, download=False))
    except ModelError as error:
        known = published(id)
        if known is None:
            raise ModelError(
                f"{id}: its config.json is not on this machine, and it is none of the published "
                f"models whose shapes are known: {', '.join(PUBLISHED)} (and their -Instruct "
                f"releases), {', '.join(RANDOM)}. Give a directory that holds its config.json, or "
                f"`hf download {id} config.json`."
            ) from error
        return AutoConfig.for_model(**known)
    except (OSError, ValueError) as error:
        raise ModelError(f"{id}: its config.json cannot be read: {error}") from error


def _whisper(about: Any) -> Transformer:
    encoder = WhisperEncoder(about)
    return Transformer(
        layers=about.encoder_layers,
        width=about.d_model,
        heads=about.encoder_attention_heads,
        kv_heads=about.encoder_attention_heads,
        head_width=about.d_model // about.encoder_attention_heads,
        feed_forward=about.encoder_ffn_dim,
        gated=False,
        head_norms=False,
        mels=about.num_mel_bins,
        vocabulary=0,
        parameters=_count(encoder),
        layer_parameters=_count(encoder.layers[0]),
        embedding_parameters=0,
        head_parameters=0,
    )


def _decoder(llm: PreTrainedModel, about: Any) -> Transformer:
    """Mixed architectures count as if all their layers were the largest one."""
    about = about.get_text_config()
    stack = max(
        (m for m in llm.modules() if isinstance(m, nn.ModuleList)), key=lambda layers: len(layers)
    )
    names = {name.rpartition(".")[2] for name, _ in stack[0].named_modules()}
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    heads = about.num_attention_heads
    return Transformer(
        layers=len(stack),
        width=about.hidden_size,
        heads=heads,
        kv_heads=getattr(about, "num_key_value_heads", None) or heads,
        head_width=getattr(about, "head_dim", None) or about.hidden_size // heads,
        feed_forward=getattr(about, "intermediate_size", None) or 4 * about.hidden_size,
        gated=bool(names & {"gate_proj", "gate_up_proj"}),
        head_norms="q_norm" in names,
        mels=0,
        vocabulary=embedding.num_embeddings,
        parameters=_count(llm),
        layer_parameters=max(map(_count, stack)),
        embedding_parameters=_count(embedding),
        head_parameters=0 if head.weight is embedding.weight else _count(head),
    )


class _Adapted(NamedTuple):
    """A matrix with LoRA (Hu et al. 2021, arXiv:2106.09685): in x rank and rank x out beside it."""

    inputs: int
    outputs: int
    source: str  # the same for matrices that read the same tensor


def _adapted(llm: PreTrainedModel, lora: schema.LoRA) -> list[_Adapted]:
    """The linear layers that `model.lora.targets` names. Raises ModelError as training does."""
    refuse_unknown_targets(llm, lora.targets)
    head = llm.get_output_embeddings()
    every = "all-linear" in lora.targets
    found = []
    for name, module in llm.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        if every or any(name == t or name.endswith(f".{t}") for t in lora.targets):
            block, _, leaf = name.rpartition(".")
            source = name if leaf.startswith(("o_", "out_", "down_")) else block
            found.append(_Adapted(module.in_features, module.out_features, source))
    return found


def _count(module: nn.Module) -> int:
    """A matrix that two modules share counts once."""
    return sum(parameter.numel() for parameter in module.parameters())
