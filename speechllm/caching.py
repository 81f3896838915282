"""Writing what the frozen encoder makes of the shards' audio, so that training need not run it.

Shape legend: A utterances, N samples at 16 kHz, T frames, D their width.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechllm.config.schema import Config
from speechllm.data.audio import decode_audio
from speechllm.data.features import Dtype, FeatureWriter, content_hash
from speechllm.data.index import Corpus, open_corpus, open_index
from speechllm.data.store import Store
from speechllm.errors import AudioError
from speechllm.features import Kind
from speechllm.model.build import COMPUTE_DTYPES, build_encoder, frozen_type
from speechllm.model.encoder import CHUNK_SAMPLES
from speechllm.model.frontend import FRAME_SAMPLES, num_frames
from speechllm.types import SAMPLE_RATE, EncodedAudio, Frames

_AHEAD = 4  # batches that are being decoded while one is encoded
_INT8 = 127


@dataclass(frozen=True)
class Written:
    """Sums over what was written.

    bad: utterances that cannot be decoded. seconds: in all; of these encoder_seconds were the
    encoder's, with the copy of its outputs. squares: of what the encoder gave; wrong_squares: of
    what is wrong with it on disk; largest and worst: the largest magnitude of either.
    """

    utterances: int = 0
    bad: int = 0
    frames: int = 0
    audio_seconds: float = 0.0
    bytes: int = 0
    seconds: float = 0.0
    encoder_seconds: float = 0.0
    squares: float = 0.0
    wrong_squares: float = 0.0
    largest: float = 0.0
    worst: float = 0.0

    def __add__(self, other: Written) -> Written:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Written)}
        sums |= {name: max(getattr(self, name), getattr(other, name)) for name in _MAXIMA}
        return Written(**sums)

    @property
    def relative_rms_error(self) -> float:
        return float((self.wrong_squares / self.squares) ** 0.5) if self.squares else 0.0

    @property
    def break_even_epochs(self) -> float:
        """Writing took as long as the encoder takes in so many epochs."""
        return self.seconds / self.encoder_seconds if self.encoder_seconds else 0.0


_MAXIMA = ("largest", "worst")


class ShardEncoder:
    """Runs the configured encoder over whole shards as training runs it over microbatches.

    config: with its precision settled. batch_seconds: of audio that is encoded at once, padding
    included; an utterance that is longer is encoded alone. threads: that decode audio.
    """

    def __init__(
        self,
        config: Config,
        kind: Kind,
        device: torch.device,
        *,
        batch_seconds: float,
        threads: int,
    ) -> None:
        assert config.precision != "auto", "precision is settled first"
        encoder = config.model.encoder
        assert encoder.kind == "whisper", "only a frozen encoder has outputs that can be kept"
        frozen = frozen_type(config.model, config.precision, device)
        self._encoder = build_encoder(encoder, frozen, device).eval()
        self._compute = COMPUTE_DTYPES[config.precision]
        self._kind, self._device, self._threads = kind, device, threads
        self._batch_samples = int(batch_seconds * SAMPLE_RATE)
        self._whole_chunks = encoder.context == "pad30"

    def write(self, tar: str, progress: Callable[[int], None]) -> Written:
        """Write one shard's file. progress(n): n more utterances are done.

        Raises DataError where the shard cannot be read or the file not be written.
        """
        begun = time.perf_counter()
        index, corpus = open_index(tar), open_corpus([tar])
        written = Written()
        with FeatureWriter(self._kind.path(tar), len(corpus)) as writer:
            for rows, decoded in _decoded(corpus, self._batches(corpus.durations), self._threads):
                good = {r: s for r, s in zip(rows, decoded, strict=True) if isinstance(s, Tensor)}
                for row, error in zip(rows, decoded, strict=True):
                    if isinstance(error, str):
                        writer.leave_out(row, error)
                if good:
                    written += self._write_batch(writer, good)
                written += Written(bad=len(rows) - len(good))
                progress(len(rows))
            written += Written(seconds=time.perf_counter() - begun)
            size = writer.finish(
                {
                    "dtype": self._kind.dtype,
                    "width": self._kind.width,
                    "frame_samples": FRAME_SAMPLES,
                    "index": content_hash(index),
                    "made with": self._kind.facts,
                    "written": asdict(written),
                    "relative rms error": written.relative_rms_error,
                }
            )
        return written + Written(bytes=size)

    @torch.inference_mode()
    def encode(self, audio: Sequence[Tensor]) -> Tensor:
        """int16 [N] each -> frames [A, T, D] on the device, as the model's own forward has them."""
        lengths_A = torch.tensor([len(samples) for samples in audio], device=self._device)
        audio_AN = pad_sequence(list(audio), batch_first=True).to(self._device)
        lower = self._compute != torch.float32
        autocast = torch.autocast(self._device.type, self._compute) if lower else nullcontext()
        with autocast:
            frames_ATD: Tensor = self._encoder(audio_AN, lengths_A)[0]
        return frames_ATD

    def _write_batch(self, writer: FeatureWriter, audio: dict[int, Tensor]) -> Written:
        begun = time.perf_counter()
        exact_ATD = self.encode(list(audio.values()))
        lengths = [len(samples) for samples in audio.values()]
        counts = [num_frames(length) for length in lengths]
        positions_T = torch.arange(exact_ATD.shape[1], device=self._device)
        outside_AT = positions_T >= torch.tensor(counts, device=self._device)[:, None]
        exact_ATD = exact_ATD.masked_fill(outside_AT[..., None], 0.0)
        frames = quantise(exact_ATD, self._kind.dtype)
        sums = _errors(exact_ATD, frames).tolist()
        values_ATD = frames.values_ATD.cpu()
        if self._kind.dtype == "bf16":
            values_ATD = values_ATD.view(torch.int16)
        scales_AD = None if frames.scales_AD is None else frames.scales_AD.cpu().numpy()
        encoder_seconds = time.perf_counter() - begun
        for a, (row, length, count) in enumerate(zip(audio, lengths, counts, strict=True)):
            scales_D = None if scales_AD is None else scales_AD[a]
            values_TD = values_ATD[a, :count].numpy()
            writer.add(row, EncodedAudio(length, values_TD, scales_D))
        return Written(
            utterances=len(audio),
            frames=sum(counts),
            audio_seconds=sum(lengths) / SAMPLE_RATE,
            encoder_seconds=encoder_seconds,
            squares=sums[0],
            wrong_squares=sums[1],
            largest=sums[2],
            worst=sums[3],
        )

    def _batches(self, durations: np.ndarray) -> Iterator[list[int]]:
        """Rows of like length, the longest first: what memory takes shows at once."""
        samples = np.rint(durations * SAMPLE_RATE).astype(np.int64)
        if self._whole_chunks:
            samples = -(-samples // CHUNK_SAMPLES) * CHUNK_SAMPLES
        batch: list[int] = []
        for row in np.argsort(-samples, kind="stable").tolist():
            if batch and (len(batch) + 1) * samples[batch[0]] > self._batch_samples:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def quantise(frames_ATD: Tensor, dtype: Dtype) -> Frames:
    """Frames without what pads them, zeroed, as they are kept.

    int8 is symmetric: the largest magnitude of each dimension in an utterance becomes 127. A few
    dimensions of a Whisper are far larger than the others: of tiny.en, relative RMS errors are
    1.5 % with a scale for each frame in place of one for each dimension.
    """
    if dtype == "bf16":
        return Frames(frames_ATD.to(torch.bfloat16), None)
    exact_ATD = frames_ATD.float()
    scales_AD = exact_ATD.abs().amax(1) / _INT8
    steps_ATD = exact_ATD / scales_AD.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return Frames(steps_ATD.round_().to(torch.int8), scales_AD)


def _errors(exact_ATD: Tensor, frames: Frames) -> Tensor:
    """[4]: squares, wrong_squares, largest and worst of `Written`."""
    exact_ATD = exact_ATD.float()
    wrong_ATD = frames.decoded(torch.float32) - exact_ATD
    return torch.stack(
        [
            exact_ATD.square().sum(),
            wrong_ATD.square().sum(),
            exact_ATD.abs().max(),
            wrong_ATD.abs().max(),
        ]
    )


def _decoded(
    corpus: Corpus, batches: Iterator[list[int]], threads: int
) -> Iterator[tuple[list[int], list[Tensor | str]]]:
    """Batches of rows with their int16 samples, or why they cannot be decoded, read ahead."""
    store = Store(corpus)

    def decode(audio: bytes, extension: str) -> Tensor | str:
        try:
            return torch.from_numpy(decode_audio(audio, extension))
        except AudioError as error:
            return str(error)

    def begin(rows: list[int]) -> tuple[list[int], list[Future[Tensor | str]]]:
        begun = []
        for row in rows:
            place = corpus.location(row)
            begun.append(pool.submit(decode, store.read_raw(place)[0], place.audio_ext))
        return rows, begun

    waiting: deque[tuple[list[int], list[Future[Tensor | str]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            waiting.append(begin(batch))
            if len(waiting) > _AHEAD:
                rows, futures = waiting.popleft()
                yield rows, [future.result() for future in futures]
        while waiting:
            rows, futures = waiting.popleft()
            yield rows, [future.result() for future in futures]
