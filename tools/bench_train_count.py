"""What steps of training hold, what is needed for them, and what was run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench_train_flops import Row, count_flops
from bench_train_timing import Counts

from speechllm.config.schema import Config
from speechllm.model.build import AudioTokens
from speechllm.model.frontend import num_frames
from speechllm.planner.advice import Machine, config_name, job_of
from speechllm.planner.architecture import read_architecture
from speechllm.planner.memory import estimate_memory
from speechllm.planner.workload import shape_of
from speechllm.types import IGNORE, Batch, Microbatch, StepData
from speechllm.world import World


class Work:
    """Of one rank. prefix: tokens with which every example begins and which the LLM need not run,
    being frozen."""

    def __init__(
        self, config: Config, world: World, audio_tokens: AudioTokens, prefix: int
    ) -> None:
        self.config = config
        self.world = world
        self.audio_tokens = audio_tokens
        self.prefix = prefix
        self.left_out = 0 if config.performance.prefix_cache == "off" else prefix
        self.architecture = read_architecture(config.model)

    def sums(self, done: Sequence[StepData], counts: Counts) -> dict[str, float]:
        """Over the steps that were done. Positions and frames: *_useful are needed, *_real are no
        padding, *_run were run; flops.PART are needed, run.PART were run."""
        microbatches = [m for data in done for m in data.microbatches if m.weight]
        rows = [row for microbatch in microbatches for row in self.rows(microbatch.batch)]
        useful = sum(row.positions for row in rows)
        needed = count_flops(self.architecture, rows)
        run = count_flops(self.architecture, self._rows_run(rows, counts))
        return {
            "utterances": sum(m.utterances for m in microbatches),
            "audio_seconds": sum(m.audio_seconds for m in microbatches),
            "target_tokens": sum(m.batch.num_target_tokens for m in microbatches),
            "positions_useful": useful,
            "positions_real": useful + (self.prefix - self.left_out) * len(rows),
            "positions_run": counts.llm_positions,
            "frames_real": sum(row.frames for row in rows),
            "frames_run": counts.encoder_frames,
            **{f"flops.{part}": value for part, value in needed.items()},
            **{f"run.{part}": value for part, value in run.items()},
        }

    def rows(self, batch: Batch) -> list[Row]:
        labels = (batch.labels_BS[:, 1:] != IGNORE).sum(1).tolist()
        assert len(batch.audio_samples) == len(batch.lengths), "one audio a row"
        encodes = batch.frames is None
        return [
            Row(
                frames=num_frames(samples) if encodes else 0,
                tokens=int(self.audio_tokens(samples)),
                positions=length - self.prefix,
                prefix=self.prefix,
                labels=count,
            )
            for samples, length, count in zip(
                batch.audio_samples, batch.lengths, labels, strict=True
            )
        ]

    def predicted_bytes(self, done: Sequence[StepData]) -> int:
        """By the planner, of the costliest microbatch."""
        return max(self._predicted(m) for data in done for m in data.microbatches)

    def _predicted(self, microbatch: Microbatch) -> int:
        machine = Machine(self.world.size, 0, on_cpu=self.world.device.type != "cuda")
        job = job_of(self.config, self.architecture, machine)
        shape = shape_of(self.config, microbatch.batch, self.prefix)
        return sum(estimate_memory(job, shape, config_name(self.config)).values())

    def _rows_run(self, rows: Sequence[Row], counts: Counts) -> list[Row]:
        """Padding and all; encoder and LLM apart from each other."""
        everywhere = not self.config.performance.label_logits
        encoder = [Row(n, 0, 0, 0, 0) for count, n in counts.encoder_shapes for _ in range(count)]
        llm = [
            Row(0, 0, columns, self.left_out, columns if everywhere else 0)
            for count, columns in counts.llm_shapes
            for _ in range(count)
        ]
        rest = [
            replace(row, frames=0, positions=0, labels=0 if everywhere else row.labels)
            for row in rows
        ]
        return [*encoder, *llm, *rest]
