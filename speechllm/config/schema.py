"""The configuration, as pydantic models. Every key of every YAML file is one field here.

Imports no torch, so that `--help` and a wrong key answer at once. Field descriptions are the
configuration reference of the documentation.
"""

from __future__ import annotations

from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Path = Annotated[str, AfterValidator(expanduser)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]


def _kind(default: str) -> Discriminator:
    """Choose the member of a tagged union by `kind`, which may be left out for the usual one."""

    def tag(value: Any) -> Any:
        if isinstance(value, dict):
            kind = value.get("kind", default)
            return kind if isinstance(kind, str) else repr(kind)
        return getattr(value, "kind", None)

    return Discriminator(tag)


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
    _kind("whisper"),
]


class LLM(Section):
    id: Path = Field(
        description="Hub id, local directory, or `random:llama`, `random:olmo2`, `random:qwen2`."
    )
    revision: str | None = Field(None, description="Hub revision: branch, tag or commit.")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description="Attention kernel. `auto`: eager for bf16 on CPU (fastest there at short "
        "lengths), sdpa elsewhere.",
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
    _kind("transformer"),
]


class Prompt(Section):
    kind: Literal["chat", "plain"] = Field(
        "chat",
        description="`chat`: texts are user turns of the LLM's own chat template; `plain`: texts "
        "are the whole prompt as it stands.",
    )
    system: str | None = Field(None, description="System turn (chat only).")
    texts: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        ("Transcribe the speech to text: {audio}",),
        min_length=1,
        description="One is chosen per utterance and epoch. `{audio}` is where the audio goes; "
        "without it the audio follows the text. An utterance's own `prompt` field replaces it.",
    )

    @model_validator(mode="after")
    def _one_audio(self) -> Prompt:
        for text in self.texts:
            if text.count("{audio}") > 1:
                raise ValueError(f"prompt text {text!r} holds {{audio}} more than once")
        if self.kind == "plain" and self.system is not None:
            raise ValueError("`system` belongs to kind: chat; write it into `texts` instead")
        return self


class Model(Section):
    encoder: Encoder = Field(description="Speech to frames, 50 a second.")
    llm: LLM = Field(description="Frozen instruction-tuned causal LLM.")
    connector: Connector = Field(
        TransformerConnector(), description="Frames to audio tokens; what trains."
    )
    prompt: Prompt = Field(Prompt(), description="What the LLM reads around the audio.")
    frozen_dtype: Literal["auto", "fp32"] = Field(
        "auto", description="Storage of frozen weights. `auto`: bf16 where precision is bf16."
    )


class Data(Section):
    train: Paths = Field((), description="Directories or globs of tar shards with their indexes.")
    validation: Paths = Field((), description="The same, for evaluation during training.")
    microbatch_tokens: int = Field(
        4096, ge=1, description="Budget of one microbatch, padding included, in LLM positions."
    )
    microbatches_per_step: int = Field(
        8, ge=1, description="M: microbatches of a step over all ranks together."
    )
    window: int = Field(
        20_000, ge=1, description="Utterances that are bucketed by length together."
    )
    min_seconds: float = Field(0.1, ge=0, description="Shorter utterances are dropped.")
    max_seconds: float = Field(60.0, gt=0, description="Longer utterances are dropped.")
    characters_per_token: float = Field(
        3.0, gt=0, description="Estimate by which text length enters the budget."
    )
    num_workers: int = Field(2, ge=0, description="Loader processes of each rank; 0: none.")
    prefetch: int = Field(4, ge=1, description="Microbatches each worker keeps ready.")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="A larger part of unreadable utterances stops the run."
    )

    @model_validator(mode="after")
    def _some_length_fits(self) -> Data:
        if self.min_seconds > self.max_seconds:
            raise ValueError(
                f"min_seconds {self.min_seconds} is above max_seconds {self.max_seconds}; "
                "no utterance would be left"
            )
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(5e-4, ge=0, description="Decoupled weight decay of AdamW.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Decay rates of Adam's moments.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping by global norm.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "linear", description="Course of the learning rate after the warm-up."
    )
    warmup_steps: int = Field(500, ge=0, description="Steps in which the rate rises to its peak.")
    min_lr_fraction: float = Field(0.0, ge=0, le=1, description="Final lr as a part of the peak.")


class Train(Section):
    steps: int = Field(15_000, ge=1, description="Optimizer steps of the whole run.")
    ctc_steps: int = Field(
        0,
        ge=0,
        description="The first steps align audio tokens with the LLM's token embeddings by CTC and "
        "do not run the LLM, which makes them cheaper. Learning rate and "
        "warm-up start anew after them.",
    )
    ctc_lr_scale: float = Field(
        1.0, gt=0, description="Learning rate of those steps, as a multiple of `optim.lr`."
    )
    log_every: int = Field(10, ge=1, description="Steps between lines of metrics.jsonl.")
    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(1, ge=1, description="Newest checkpoints kept for resuming.")
    keep_best: int = Field(1, ge=0, description="Best checkpoints kept besides.")
    init_from: Path | None = Field(
        None, description="Run or checkpoint directory whose trained weights start this run."
    )


class Evaluation(Section):
    every: int = Field(500, ge=0, description="Steps between evaluations; 0: never.")
    max_utterances: int = Field(0, ge=0, description="For loss and accuracy; 0: all.")
    wer_utterances: int = Field(0, ge=0, description="Decoded for WER; 0: no WER.")
    metric: Literal["loss", "token_accuracy", "wer"] = Field(
        "loss", description="What `best` means, and what early stopping watches."
    )
    patience: int = Field(0, ge=0, description="Evaluations without a new best; 0: no stopping.")

    @model_validator(mode="after")
    def _wer_is_measured(self) -> Evaluation:
        if self.metric == "wer" and self.wer_utterances == 0:
            raise ValueError("metric: wer needs wer_utterances above 0")
        return self


class Generation(Section):
    max_new_tokens: int = Field(200, ge=1, description="Longest output, in tokens.")
    num_beams: int = Field(1, ge=1, description="1: greedy.")
    microbatch_tokens: int = Field(4096, ge=1, description="Budget of a decoded batch.")
    normalizer: Literal["whisper_en", "basic", "none"] = Field(
        "whisper_en", description="Applied to both texts before they are scored."
    )


class DDPStrategy(Section):
    kind: Literal["ddp"] = Field("ddp", description="Replicated data parallel; one process too.")


class Config(Section):
    run_dir: Path | None = Field(None, description="Where everything of the run is written.")
    seed: int = Field(1, ge=0, description="Decides data order, weights and dropout.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Compute. What trains keeps fp32 master weights in either. `auto`: bf16 where "
        "the device multiplies it in hardware, else fp32; the run's config.yaml says which.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto`: the GPU of the local rank where there is one."
    )
    model: Model = Field(description="Encoder, connector, LLM, prompt.")
    data: Data = Field(Data(), description="Shards, budgets, loading.")
    optim: Optim = Field(Optim(), description="AdamW and its schedule.")
    train: Train = Field(Train(), description="Length of the run, checkpoints.")
    evaluation: Evaluation = Field(Evaluation(), description="Evaluation during training.")
    generation: Generation = Field(Generation(), description="Decoding.")
    strategy: DDPStrategy = Field(DDPStrategy(), description="How ranks work together.")

    @model_validator(mode="after")
    def _best_needs_evaluation(self) -> Config:
        if self.evaluation.patience and not self.evaluation.every:
            raise ValueError("evaluation.patience needs evaluation.every above 0")
        return self
