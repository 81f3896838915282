"""The `model` section: encoder, LLM, connector, prompt, and what trains besides the connector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from speechllm.config.section import Path, Section, as_list, kind_tag


class WhisperEncoder(Section):
    kind: Literal["whisper"] = Field("whisper", description="Frozen encoder half of a Whisper.")
    id: Path = Field(
        description="Hub id, local directory, or `random:whisper` (tiny random weights)."
    )
    revision: str | None = Field(None, description="Hub revision: branch, tag or commit.")
    context: Literal["trim", "pad30"] = Field(
        "trim",
        description="`trim` encodes the frames there are; `pad30` pads to 30 s and drops the "
        "padded frames before the connector. Longer audio is encoded in chunks of 30 s.",
    )


class FilterbankEncoder(Section):
    kind: Literal["fbank"] = Field(
        "fbank", description="Trainable front-end over log-mel frames, in place of Whisper."
    )
    mels: int = Field(80, ge=8, le=256, description="Mel filters.")
    hidden_size: int = Field(768, ge=8, description="Width of the frames given to the connector.")


Encoder = Annotated[
    Annotated[WhisperEncoder, Tag("whisper")] | Annotated[FilterbankEncoder, Tag("fbank")],
    kind_tag("whisper"),
]


class LLM(Section):
    id: Path = Field(
        description="Hub id, local directory, or `random:llama`, `random:olmo2`, `random:qwen2`."
    )
    revision: str | None = Field(None, description="Hub revision: branch, tag or commit.")
    attention: Literal["auto", "eager", "sdpa", "grouped", "flash_attention_2"] = Field(
        "auto",
        description="Attention kernel; `grouped` is this package's own for CPUs, matrix products "
        "for all heads that share keys. `auto`: eager for bf16 on CPU and sdpa elsewhere, unless "
        "another is measured to be 10 % faster on this device when a run starts; the run's "
        "config.yaml says which.",
    )


class TransformerConnector(Section):
    kind: Literal["transformer"] = Field(
        "transformer", description="Stacked frames through a small transformer encoder."
    )
    downsampling_factor: int = Field(6, ge=1, le=64, description="Frames stacked into one token.")
    hidden_size: int = Field(1024, ge=1, description="Width of the layers.")
    num_layers: int = Field(2, ge=1, description="Transformer layers.")
    num_heads: int = Field(16, ge=1, description="Attention heads; they divide hidden_size.")
    intermediate_size: int = Field(4096, ge=1, description="Width of the feed-forward blocks.")
    norm_first: bool = Field(True, description="Pre-norm (true) or post-norm (false).")
    add_final_norm: bool = Field(False, description="LayerNorm after the last layer.")
    use_positional_embeddings: bool = Field(False, description="Sinusoidal positions.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout while training.")

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConnector:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}; "
                "change one of them"
            )
        return self


class MLPConnector(Section):
    kind: Literal["mlp"] = Field(
        "mlp", description="Stacked frames through LayerNorm, Linear, GELU, Linear."
    )
    downsampling_factor: int = Field(5, ge=1, le=64, description="Frames stacked into one token.")
    hidden_size: int = Field(1536, ge=1, description="Width between the two linear layers.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout while training.")


class LinearConnector(Section):
    kind: Literal["linear"] = Field("linear", description="Stacked frames through one Linear.")
    downsampling_factor: int = Field(5, ge=1, le=64, description="Frames stacked into one token.")


class Conv1dConnector(Section):
    kind: Literal["conv1d"] = Field(
        "conv1d", description="One strided convolution over the frames, then a projection."
    )
    downsampling_factor: int = Field(5, ge=1, le=64, description="Stride of the convolution.")
    kernel_size: int = Field(7, ge=1, description="Frames seen by one token.")
    hidden_size: int = Field(1024, ge=1, description="Channels of the convolution.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout while training.")


Connector = Annotated[
    Annotated[TransformerConnector, Tag("transformer")]
    | Annotated[MLPConnector, Tag("mlp")]
    | Annotated[LinearConnector, Tag("linear")]
    | Annotated[Conv1dConnector, Tag("conv1d")],
    kind_tag("transformer"),
]


def refuse_two_audios(texts: Sequence[str]) -> None:
    for text in texts:
        if text.count("{audio}") > 1:
            raise ValueError(f"prompt text {text!r} holds {{audio}} more than once")


class Prompt(Section):
    kind: Literal["chat", "plain"] = Field(
        "chat",
        description="`chat`: texts are user turns of the LLM's own chat template; `plain`: texts "
        "are the whole prompt as it stands.",
    )
    system: str | None = Field(None, description="System turn (chat only).")
    texts: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field(
        ("Transcribe the speech to text: {audio}",),
        min_length=1,
        description="One is chosen per utterance and epoch. `{audio}` is where the audio goes; "
        "without it the audio follows the text. An utterance's own `prompt` field replaces it.",
    )

    @model_validator(mode="after")
    def _one_audio(self) -> Prompt:
        refuse_two_audios(self.texts)
        if self.kind == "plain" and self.system is not None:
            raise ValueError("`system` belongs to kind: chat; write it into `texts` instead")
        return self


class LoRA(Section):
    rank: int = Field(0, ge=0, description="Rank of the update matrices; 0: no LoRA.")
    alpha: float = Field(16.0, gt=0, description="Updates are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the update matrices.")
    targets: Annotated[tuple[str, ...], BeforeValidator(as_list)] = Field(
        ("q_proj", "v_proj"),
        min_length=1,
        description="Linear layers of the LLM, by the end of their names; `all-linear` takes all "
        "but the output matrix.",
    )


class Model(Section):
    encoder: Encoder = Field(description="Speech to frames, 50 a second.")
    llm: LLM = Field(description="Frozen instruction-tuned causal LLM.")
    connector: Connector = Field(
        TransformerConnector(), description="Frames to audio tokens; what trains."
    )
    prompt: Prompt = Field(Prompt(), description="What the LLM reads around the audio.")
    lora: LoRA = Field(LoRA(), description="Trained besides the connector: LoRA on the LLM.")
    unfreeze_encoder_layers: int = Field(
        0, ge=0, description="Trained besides the connector: the last n layers of the Whisper."
    )
    frozen_dtype: Literal["auto", "fp32"] = Field(
        "auto", description="Storage of frozen weights. `auto`: that of `precision`, bf16 for fp16."
    )
