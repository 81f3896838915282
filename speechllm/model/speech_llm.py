"""Encoder, connector and LLM as one module that turns a batch into its loss.

Shape legend: B examples, S positions of the LLM, W width of its embeddings, A audio segments,
T frames, K audio tokens, L trained positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from speechllm.config.performance import Performance
from speechllm.model.adapt import lora_dropouts
from speechllm.model.ctc import CTCHead
from speechllm.model.decoding import Decoding, decode
from speechllm.model.decoding_cache import KeysValues
from speechllm.model.frontend import num_frames
from speechllm.model.layers import transformer_layers
from speechllm.model.plain import plain_loss, with_audio_padding
from speechllm.model.shortcuts import choose
from speechllm.types import IGNORE, Batch, Frames, LossSums, Objective, SpecMasks


class SpeechLLM(nn.Module):
    """Audio tokens take their places among the text embeddings of a causal LLM.

    Weights are read only inside the forwards of the modules that own them, so a strategy may
    shard any of them, and then sets `sharded`: every forward is a collective of all ranks.

    checkpointed: layers of transformers that drop their activations and compute them again, which
        they do only where their own `training` is set.
    compiled: some modules are, by torch.compile; they run so in training only.
    performance: the shortcuts asked for; ConfigError where one cannot be had.
    prefix: tokens with which the run's examples begin.
    tokens_of_chunk: audio tokens of 30 s, which the plain path runs for any shorter audio.
    """

    sharded = False

    def __init__(
        self,
        encoder: nn.Module,
        connector: nn.Module,
        llm: PreTrainedModel,
        *,
        compute_dtype: torch.dtype,
        ctc_head: CTCHead | None = None,
        checkpointed: Sequence[nn.Module] = (),
        compiled: bool = False,
        performance: Performance | None = None,
        prefix: Sequence[int] = (),
        tokens_of_chunk: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.llm = llm
        self.compute_dtype = compute_dtype
        self.ctc_head = ctc_head
        self.checkpointed = tuple(checkpointed)
        self.compiled = compiled
        self.tokens_of_chunk = tokens_of_chunk
        device = next(connector.parameters()).device
        self.shortcuts = choose(performance or Performance(), llm, tuple(prefix), device)
        for layer in transformer_layers(llm):
            assert isinstance(layer, GradientCheckpointingLayer)
            # The only cache that training knows is one that layers read and do not write.
            layer._can_checkpoint_with_cache = True
        self.train(self.training)

    def forward(self, batch: Batch, objective: Objective = "lm") -> LossSums:
        """Sums over the batch's target tokens: loss in nats, right guesses, tokens.

        objective: `lm` is the cross entropy of the LLM; `ctc` aligns audio tokens with the LLM's
        token embeddings and does not run the LLM (see `CTCHead`).
        """
        with self._stance():
            return self._ctc(batch) if objective == "ctc" else self._lm(batch)

    def _lm(self, batch: Batch) -> LossSums:
        with self.autocast():
            if self.shortcuts.plain:
                embeds_BSW = self.inputs_embeds(batch)
                return plain_loss(self.llm, embeds_BSW, batch, self.tokens_of_chunk)
            self.compute_prefix()
            layout, cache = self.shortcuts.lay_out(batch)
            embeds_RCW = self._embeds(batch, layout.tokens_RC, layout.audio_places_K)
            return self.shortcuts.loss(self.llm, embeds_RCW, layout, cache, batch.targets_L)

    def compute_prefix(self) -> None:
        """Keys and values of the run's prefix, on the first call; where weights are sharded, by all
        ranks together."""
        with self.autocast():
            self.shortcuts.prefix.compute(self.llm, self.device)

    def _ctc(self, batch: Batch) -> LossSums:
        assert self.ctc_head is not None, "built without a CTC head"
        assert len(batch.audio_AN) == len(batch.labels_BS), "CTC wants one audio an example"
        # With the end token: that audio tokens say where the text ends keeps the LLM from going on.
        targets = [row_S[row_S != IGNORE] for row_S in batch.labels_BS]
        with self.autocast():
            tokens_AKW, counts_A = self.audio_tokens(
                batch.audio_AN, batch.audio_lengths_A, batch.masks, batch.frames
            )
            sums: LossSums = self.ctc_head(tokens_AKW, counts_A, targets)
            if not (torch.is_grad_enabled() and _trains(self.llm)):
                return sums
            # Every strategy wants a gradient, if only zero, for all that trains.
            one_position_11W = self.llm.get_input_embeddings()(batch.tokens_BS[:1, :1])
            logits = self.llm(inputs_embeds=one_position_11W, use_cache=False).logits
            return sums._replace(loss=sums.loss + 0 * logits.float().sum())

    def generate(
        self, batch: Batch, settings: Decoding, any_rank: Callable[[bool], bool] | None = None
    ) -> list[list[int]]:
        """What follows each prompt, see `speechllm.model.decoding.decode`; the prompts are padded
        on the left. any_rank: needed where weights are sharded."""
        assert self.sharded == (any_rank is not None)
        plain = settings.plain or self.shortcuts.plain
        with self.autocast(), self._stance():
            prefix = () if plain else self._prefix_of(batch)
            embeds_BSW, mask_BS = self.inputs_embeds(batch), batch.attention_mask_BS
            if self.shortcuts.plain:
                embeds_BSW, mask_BS, _ = with_audio_padding(embeds_BSW, batch, self.tokens_of_chunk)
            return decode(
                self.llm,
                embeds_BSW,
                mask_BS,
                replace(settings, plain=plain),
                prefix=prefix,
                any_rank=any_rank,
            )

    def _prefix_of(self, batch: Batch) -> Sequence[KeysValues]:
        """Keys and values of what all rows begin with, as far as it is the run's prefix."""
        self.compute_prefix()
        # Something must be left of each row, for the LLM to say what follows.
        length = min(self.shortcuts.prefix.length(batch.opening), min(batch.lengths) - 1)
        if length <= 0:
            return ()
        return self.shortcuts.prefix.keys_values(length)

    def inputs_embeds(self, batch: Batch) -> Tensor:
        """Embeddings [B, S, W] of text, with the audio tokens put where `audio_mask_BS` is."""
        with self.autocast():
            return self._embeds(batch, batch.tokens_BS, batch.audio_places_K)

    def _embeds(self, batch: Batch, tokens_RC: Tensor, audio_places_K: Tensor) -> Tensor:
        """Of the batch in whatever rows its tokens lie."""
        embeds_RCW = self.llm.get_input_embeddings()(tokens_RC)
        if not batch.audio_samples:
            return embeds_RCW
        tokens_AKW, _ = self.audio_tokens(
            batch.audio_AN, batch.audio_lengths_A, batch.masks, batch.frames, batch.audio_samples
        )
        # Which they are was found with the batch, from the same count of tokens for samples.
        assert tokens_AKW.shape[1] == batch.most_audio_tokens, "another number of audio tokens"
        audio_KW = tokens_AKW.flatten(0, 1).index_select(0, batch.audio_sources_K)
        flat = embeds_RCW.flatten(0, 1).index_copy(0, audio_places_K, audio_KW.to(embeds_RCW.dtype))
        return flat.view_as(embeds_RCW)

    def audio_tokens(
        self,
        audio_AN: Tensor,
        lengths_A: Tensor,
        masks: SpecMasks | None = None,
        frames: Frames | None = None,
        samples: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """int16 [A, N] and samples [A] -> audio tokens [A, K, W] and their counts [A].

        frames: what the encoder made of the samples, which are not looked at then.
        samples: on the host what `lengths_A` is.
        """
        if frames is not None:
            return self.connector(frames.decoded(self.compute_dtype), num_frames(lengths_A))
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.encoder)):
            frames_ATD, counts_A = self.encoder(audio_AN, lengths_A, masks, samples)
        return self.connector(frames_ATD, counts_A)

    def autocast(self) -> AbstractContextManager[object]:
        """Where compute is bf16 and weights that train are fp32: each is cast once a forward."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def _stance(self) -> AbstractContextManager[object]:
        """Decoding and evaluation would be compiled anew: other shapes, a cache, no gradients."""
        if not self.compiled or self.training:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    @property
    def device(self) -> torch.device:
        return next(self.connector.parameters()).device

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """By name, sorted: the whole of what optimizers and checkpoints hold."""
        return dict(sorted((n, p) for n, p in self.named_parameters() if p.requires_grad))

    def train(self, mode: bool = True) -> SpeechLLM:
        """As `nn.Module.train`, but parts that do not train as a whole stay in eval mode.

        An LLM with LoRA, or a Whisper of which some layers train, keeps its own dropout off; that
        of LoRA is on.
        """
        super().train(mode)
        for part in (self.encoder, self.connector, self.llm):
            part.train(mode and all(p.requires_grad for p in part.parameters()))
        for dropout in lora_dropouts(self.llm):
            dropout.train(mode)
        for layer in self.checkpointed:
            layer.training = mode
        return self


def _trains(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())
