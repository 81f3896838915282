"""Single weights, or slices of them, straight from a model's safetensors files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from safetensors import safe_open

from speechllm.errors import ModelError
from speechllm.model.hub import weight_files


class WeightFiles:
    """The weights of a Hugging Face directory by parameter name; nothing is read before `read`.

    A name is found with or without the prefix that the class which wrote the files put before it
    (`model.`, `encoder.`, `model.encoder.`, ...).

    Raises ModelError where there are no safetensors files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as weights:
                self._file_of |= dict.fromkeys(weights.keys(), file)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a weight, in the file's own type; reads no other bytes.

        Raises ModelError where the files hold no such weight.
        """
        stored = self._stored_name(name)
        with safe_open(self._file_of[stored], framework="pt") as weights:
            if start == 0 and stop is None:
                return weights.get_tensor(stored)
            return weights.get_slice(stored)[start:stop]

    def _stored_name(self, name: str) -> str:
        candidates = [name, f"model.{name}", f"encoder.{name}", f"model.encoder.{name}"]
        candidates += [name.removeprefix("model.")]
        for candidate in candidates:
            if candidate in self._file_of:
                return candidate
        raise ModelError(
            f"{self.directory}: no weight {name} in its safetensors files. They hold another "
            "architecture or other names."
        )
