"""Single weights, or slices of them, straight from a model's safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.hub import resolve, weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it


class WeightFiles:
    """The weights of a Hugging Face directory by parameter name.

    Only headers are read before `read`, and `read` reads the bytes of its rows and no others, with
    ordinary reads: a mapped file would bring in the pages around them, and on a network file system
    one page at a time. Format: huggingface.co/docs/safetensors.

    A name is found with or without the prefix that the class which wrote the files put before it
    (`model.`, `encoder.`, `model.encoder.`, ...).

    Raises ModelError where there are no safetensors files, or they are damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._places: dict[str, _Place] = {}
        for file in weight_files(directory):
            self._places |= _read_header(file)

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ModelError where the files hold no such weight."""
        return self._place(name).shape

    def read(self, name: str, start: int = 0, stop: int | None = None, *, step: int = 1) -> Tensor:
        """Rows `start` to `stop` of a weight, or each `step`-th of them, in the file's own type.

        Raises ModelError where the files hold no such weight.
        """
        place = self._place(name)
        if place.dtype not in DTYPES:
            raise ModelError(
                f"{place.file}: {name} is stored as {place.dtype}, not as floating-point "
                "numbers; use a model that is not quantised."
            )
        rows = range(*slice(start, stop, step).indices(place.shape[0] if place.shape else 1))
        weight = torch.empty((len(rows), *place.shape[1:]), dtype=DTYPES[place.dtype])
        row_bytes = math.prod(place.shape[1:]) * weight.element_size()
        with place.file.open("rb", buffering=0) as stream:
            if step == 1:
                _read_into(weight, stream, place.offset + rows.start * row_bytes)
            else:
                for row_weight, row in zip(weight, rows, strict=True):
                    _read_into(row_weight, stream, place.offset + row * row_bytes)
        return weight.view(place.shape) if not place.shape else weight

    def _place(self, name: str) -> _Place:
        stored = self._stored_name(name)
        if stored is None:
            raise ModelError(
                f"{self.directory}: no weight {name} in its safetensors files. They hold another "
                "architecture or other names."
            )
        return self._places[stored]

    def _stored_name(self, name: str) -> str | None:
        candidates = [name, f"model.{name}", f"encoder.{name}", f"model.encoder.{name}"]
        candidates += [name.removeprefix("model.")]
        return next((c for c in candidates if c in self._places), None)


class FrozenWeights:
    """Where the files hold the frozen weights of a `SpeechLLM`, by its own parameter names."""

    def __init__(self, model: schema.Model) -> None:
        self._parts = {"llm.": WeightFiles(resolve(model.llm.id, model.llm.revision))}
        if model.encoder.kind == "whisper":
            directory = resolve(model.encoder.id, model.encoder.revision)
            self._parts["encoder.encoder."] = WeightFiles(directory)

    def read(self, names: Iterable[str], start: int, stop: int) -> Tensor:
        """Rows of the weight that goes by `names` in the model (several where it is tied).

        Raises ModelError where the files hold none of them.
        """
        found = [self._find(name) for name in names]
        files, name = next((pair for pair in found if pair[1] in pair[0]), found[0])
        return files.read(name, start, stop)

    def _find(self, name: str) -> tuple[WeightFiles, str]:
        part = next(part for part in self._parts if name.startswith(part))
        # LoRA puts the layer that it adds to one level deeper.
        return self._parts[part], name.removeprefix(part).replace(".base_layer.", ".")


def _read_header(file: Path) -> dict[str, _Place]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= size else b""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{file} is no safetensors file, or damaged. Get it again.") from error
    header.pop("__metadata__", None)
    end = max((about["data_offsets"][1] for about in header.values()), default=0)
    if 8 + length + end != size:
        raise ModelError(
            f"{file} has {size} bytes, but its header speaks of {8 + length + end}: it is damaged "
            "or was cut short. Get it again."
        )
    return {
        name: _Place(
            file, 8 + length + about["data_offsets"][0], tuple(about["shape"]), about["dtype"]
        )
        for name, about in header.items()
    }


def _read_into(weight: Tensor, stream: FileIO, offset: int) -> None:
    rest = memoryview(weight.view(-1).view(torch.uint8).numpy().data)
    stream.seek(offset)
    while len(rest):  # one call gives 2 GiB at most
        count = stream.readinto(rest)
        if not count:
            raise ModelError(f"{stream.name} ends before its weights do. Get it again.")
        rest = rest[count:]
