"""The configuration, as pydantic models. Every key of every YAML file is one field.

Imports no torch, so that `--help` and a wrong key answer at once. Field descriptions are the
configuration reference of the documentation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from speechllm.config.data import Data
from speechllm.config.model import Model
from speechllm.config.performance import Performance
from speechllm.config.section import Path, Section, kind_tag

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
    activation_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="Run layers of encoder and LLM again in the backward in place of keeping their "
        "activations: less memory, about a third more time. `auto`: where `speechllm plan`'s "
        "estimate does not fit into the memory without it.",
    )
    compile: bool = Field(
        False, description="torch.compile of the layers of encoder and LLM; slow first steps."
    )
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
    length_penalty: float = Field(
        0.0,
        description="Beams are compared by log probability divided by length to this power. 0: the "
        "likeliest output wins; 1 favours long ones, also those that repeat themselves.",
    )
    microbatch_tokens: int = Field(4096, ge=1, description="Budget of a decoded batch.")
    normalizer: Literal["whisper_en", "basic", "none"] = Field(
        "whisper_en", description="Applied to both texts before they are scored."
    )


class DDPStrategy(Section):
    kind: Literal["ddp"] = Field(
        "ddp", description="Every rank holds everything; also what one process runs."
    )


class FSDP2Strategy(Section):
    kind: Literal["fsdp2"] = Field(
        "fsdp2", description="Weights, gradients and optimizer sharded over the ranks, by PyTorch."
    )
    reshard_after_forward: bool = Field(
        True,
        description="Free a layer's gathered weights after its forward and gather them again for "
        "the backward: less memory, half again as much traffic.",
    )


class DeepSpeedStrategy(Section):
    kind: Literal["deepspeed"] = Field(
        "deepspeed", description="DeepSpeed ZeRO, stage 1 to 3 as `config` says."
    )
    config: Path = Field(
        description="JSON file with DeepSpeed's ZeRO settings and nothing else, as in ds_configs/."
    )


Strategy = Annotated[
    Annotated[DDPStrategy, Tag("ddp")]
    | Annotated[FSDP2Strategy, Tag("fsdp2")]
    | Annotated[DeepSpeedStrategy, Tag("deepspeed")],
    kind_tag("ddp"),
]


class Config(Section):
    run_dir: Path | None = Field(None, description="Where everything of the run is written.")
    seed: int = Field(
        1,
        ge=0,
        le=2**64 - 1,  # torch takes no more
        description="Decides data order, augmentation, weights and dropout.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Compute. What trains keeps fp32 master weights in any; fp16 scales the loss "
        "and finds the scale by itself. `auto`: bf16 where the device multiplies it in hardware "
        "and, on a CPU, is measured to be no slower than fp32; the run's config.yaml says which.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto`: the GPU of the local rank where there is one."
    )
    model: Model = Field(description="Encoder, connector, LLM, prompt.")
    data: Data = Field(Data(), description="Shards, mixtures, budgets, loading, augmentation.")
    optim: Optim = Field(Optim(), description="AdamW and its schedule.")
    train: Train = Field(Train(), description="Length of the run, checkpoints.")
    evaluation: Evaluation = Field(Evaluation(), description="Evaluation during training.")
    generation: Generation = Field(Generation(), description="Decoding.")
    performance: Performance = Field(
        Performance(), description="Shortcuts that frozen parts allow; all exact but the cache."
    )
    strategy: Strategy = Field(DDPStrategy(), description="How ranks work together.")
    collective_timeout: float = Field(
        1800.0,
        gt=0,
        le=1e9,  # from about 9e9 on torch's clock, which counts nanoseconds, is over at once
        description="Seconds that a rank waits for the others in one collective before it gives "
        "up. Longer than the slowest checkpoint gather and evaluation of a rank.",
    )

    @model_validator(mode="after")
    def _best_needs_evaluation(self) -> Config:
        if self.evaluation.patience and not self.evaluation.every:
            raise ValueError("evaluation.patience needs evaluation.every above 0")
        return self

    @model_validator(mode="after")
    def _cached_frames_are_the_same_in_every_epoch(self) -> Config:
        if self.performance.encoder_cache == "off":
            return self
        reasons = [
            f"data.augmentation.{name} changes what the encoder hears from epoch to epoch"
            for name in type(self.data.augmentation).model_fields
            if getattr(self.data.augmentation, name).probability > 0
        ]
        if self.model.encoder.kind == "fbank":
            reasons.append("model.encoder.kind=fbank trains, and its outputs change with it")
        if self.model.unfreeze_encoder_layers:
            reasons.append("model.unfreeze_encoder_layers trains it, and its outputs change")
        if reasons:
            raise ValueError(
                f"performance.encoder_cache={self.performance.encoder_cache} keeps one output of "
                f"the encoder for each utterance, but {reasons[0]}; switch one of them off"
            )
        return self

    @model_validator(mode="after")
    def _system_turns_are_of_chats(self) -> Config:
        for name, dataset in self.data.mixture.items():
            if self.model.prompt.kind == "plain" and dataset.prompt.system is not None:
                raise ValueError(
                    f"data.mixture.{name}.prompt.system belongs to model.prompt.kind: chat; write "
                    "it into its texts instead"
                )
        return self
