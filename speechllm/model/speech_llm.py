"""Encoder, connector and LLM as one module that turns a batch into its loss.

Shape legend: B examples, S positions of the LLM, W width of its embeddings, A audio segments,
T frames, K audio tokens, L trained positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers import GenerationConfig, PreTrainedModel

from speechllm.model.adapt import lora_dropouts
from speechllm.model.ctc import CTCHead
from speechllm.model.frontend import num_frames
from speechllm.model.loss import label_loss
from speechllm.types import IGNORE, Batch, Frames, LossSums, Objective, SpecMasks


class SpeechLLM(nn.Module):
    """Audio tokens take their places among the text embeddings of a causal LLM.

    Weights are read only inside the forwards of the modules that own them, so a strategy may
    shard any of them, and then sets `sharded`: every forward is a collective of all ranks.

    checkpointed: layers of transformers that drop their activations and compute them again, which
        they do only where their own `training` is set.
    compiled: some modules are, by torch.compile; they run so in training only.
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
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.llm = llm
        self.compute_dtype = compute_dtype
        self.ctc_head = ctc_head
        self.checkpointed = tuple(checkpointed)
        self.compiled = compiled
        self.train(self.training)

    def forward(self, batch: Batch, objective: Objective = "lm") -> LossSums:
        """Sums over the batch's target tokens: loss in nats, right guesses, tokens.

        objective: `lm` is the cross entropy of the LLM; `ctc` aligns audio tokens with the LLM's
        token embeddings and does not run the LLM (see `CTCHead`).
        """
        with self._stance():
            return self._ctc(batch) if objective == "ctc" else self._lm(batch)

    def _lm(self, batch: Batch) -> LossSums:
        keep_BS = functional.pad(batch.labels_BS[:, 1:] != IGNORE, (0, 1))
        labels_L = batch.labels_BS.roll(-1, dims=1)[keep_BS]
        with self.autocast():
            # The output matrix runs on the trained positions only: with a vocabulary of 50 to 130
            # thousand, logits of every position cost more memory than all the rest.
            logits_LV = self.llm(
                inputs_embeds=self.inputs_embeds(batch),
                attention_mask=batch.attention_mask_BS,
                position_ids=position_ids(batch.attention_mask_BS),
                use_cache=False,
                logits_to_keep=keep_BS,
            ).logits
        return label_loss(logits_LV, labels_L)

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

    def generate(self, batch: Batch, settings: GenerationConfig) -> Tensor:
        """New token ids [B, at most max_new_tokens] after prompts that are padded on the left.

        Where weights are sharded, the ranks go on together until the last of them is done.
        """
        llm: Any = self.llm  # `generate` comes with every causal LLM, but not with its base class
        with self.autocast(), self._stance():
            ids_BS: Tensor = llm.generate(
                inputs_embeds=self.inputs_embeds(batch),
                attention_mask=batch.attention_mask_BS,
                generation_config=settings,
                synced_gpus=self.sharded,
            )
        return ids_BS

    def inputs_embeds(self, batch: Batch) -> Tensor:
        """Embeddings [B, S, W] of text, with the audio tokens put where `audio_mask_BS` is."""
        with self.autocast():
            embeds_BSW = self.llm.get_input_embeddings()(batch.tokens_BS)
            if len(batch.audio_AN) == 0:
                return embeds_BSW
            tokens_AKW, counts_A = self.audio_tokens(
                batch.audio_AN, batch.audio_lengths_A, batch.masks, batch.frames
            )
            positions_K = torch.arange(tokens_AKW.shape[1], device=tokens_AKW.device)
            audio = tokens_AKW[positions_K < counts_A[:, None]]
            places = batch.audio_mask_BS.flatten().nonzero().squeeze(1)
            assert len(audio) == len(places), f"{len(audio)} audio tokens, {len(places)} places"
            flat = embeds_BSW.flatten(0, 1).index_copy(0, places, audio.to(embeds_BSW.dtype))
            return flat.view_as(embeds_BSW)

    def audio_tokens(
        self,
        audio_AN: Tensor,
        lengths_A: Tensor,
        masks: SpecMasks | None = None,
        frames: Frames | None = None,
    ) -> tuple[Tensor, Tensor]:
        """int16 [A, N] and samples [A] -> audio tokens [A, K, W] and their counts [A].

        frames: what the encoder made of the samples, which are not looked at then.
        """
        if frames is not None:
            return self.connector(frames.decoded(self.compute_dtype), num_frames(lengths_A))
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trains(self.encoder)):
            frames_ATD, counts_A = self.encoder(audio_AN, lengths_A, masks)
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


def position_ids(attention_mask_BS: Tensor) -> Tensor:
    """0, 1, ... from each row's first real position, wherever the padding is."""
    return (attention_mask_BS.cumsum(1) - 1).clamp(min=0)


def _trains(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())
