"""The `performance` section: shortcuts that a frozen encoder and a frozen LLM allow."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from speechllm.config.section import Section

# What `preset: plain` comes to in the keys that it decides.
PLAIN = {"prefix_cache": "off", "packing": "off", "label_logits": False}


class Performance(Section):
    preset: Literal["full", "plain"] = Field(
        "full",
        description="`plain` is the straightforward implementation, to compare with: audio padded "
        "to 30 s up to the LLM, logits of every position, the prompt in every row, batches of "
        "`plain_utterances` whatever their lengths, and decoding by transformers' own `generate`. "
        "It takes no other key of this section than that.",
    )
    plain_utterances: int = Field(8, ge=1, description="Utterances of a microbatch under `plain`.")
    prefix_cache: Literal["auto", "off"] = Field(
        "auto",
        description="Keys and values of the prompt before the audio are computed once a run and "
        "not in every row of every step; of several prompts, those of the tokens that all begin "
        "with. `auto`: wherever the LLM is frozen as a whole.",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="All examples of a microbatch in one row without padding. `auto`: what "
        "`model.llm.attention=auto` finds faster on the device.",
    )
    label_logits: bool = Field(
        True, description="The LLM's output matrix runs on trained positions only."
    )
    logits_megabytes: int = Field(
        512,
        ge=1,
        description="Loss and gradient of the output matrix go through the positions in chunks "
        "whose fp32 logits take no more than this.",
    )
    head: Literal["torch", "liger"] = Field(
        "torch", description="`liger`: the fused linear cross entropy of liger-kernel (CUDA only)."
    )
    encoder_cache: Literal["off", "bf16", "int8"] = Field(
        "off",
        description="Training and its evaluation read the encoder's outputs, which "
        "tools/cache_features.py has written beside the shards, in place of decoding audio and "
        "running the encoder. Not with augmentation, nor where the encoder trains. `generate` and "
        "`transcribe` always hear the audio.",
    )

    @model_validator(mode="after")
    def _plain_is_plain(self) -> Performance:
        switched = sorted(self.model_fields_set - {"preset", "plain_utterances"})
        changed = [k for k in switched if getattr(self, k) not in _under_plain(k)]
        if self.preset == "plain" and changed:
            raise ValueError(
                f"preset: plain goes without shortcuts, and {', '.join(changed)} would change one; "
                "remove the key or set preset: full"
            )
        return self


def _under_plain(key: str) -> tuple[object, ...]:
    """The default, and what a run that has settled its configuration writes in its place."""
    default = Performance.model_fields[key].default
    return default, PLAIN.get(key, default)
