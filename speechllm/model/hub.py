"""Where models lie and what exactly they are: ids to directories, directories to hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import snapshot_download

from speechllm.errors import ModelError
from speechllm.model.tiny import build_tiny_llm, build_tiny_whisper

RANDOM = ("random:whisper", "random:llama", "random:olmo2", "random:qwen2")
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
UNWANTED = ["*.fp32*", "original/*", "onnx/*", "runs/*", "*.bin", "*.msgpack"]
VOCABULARY = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")

MIB = 1 << 20
WHOLE_FILE = 8 * MIB  # smaller weight files are hashed whole
NUM_BLOCKS, BLOCK = 64, 1 << 16


def resolve(id: str, revision: str | None = None, *, download: bool = True) -> Path:
    """The local directory of a model.

    Args:
        id: a directory, a hub id (looked for among the models that tools/fetch_models.py made
            before the hub's own cache), or `random:whisper`, `random:llama`, `random:olmo2`,
            `random:qwen2` (tiny random weights, built on first use).
        revision: branch, tag or commit; hub ids only.
        download: False looks in the hub's local cache only.

    Raises:
        ModelError: no such directory or model, or the hub cannot be reached; names the remedy.
    """
    if id.startswith("random:"):
        return _tiny(id)
    directory = Path(id).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelError(
                f"{id} is not a Hugging Face model directory: it holds no config.json. "
                "Give the directory that save_pretrained or a hub download wrote."
            )
        return directory
    if id.startswith(("/", "./", "../", "~")):
        raise ModelError(f"{id}: no such directory. Correct the path, or give a hub id.")
    fetched = fetched_models() / id.rpartition("/")[2].lower()
    if revision is None and _fetched_as(fetched) == id:
        return fetched
    try:
        path = snapshot_download(
            id,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            local_files_only=not download,
        )
    except (OSError, ValueError) as error:  # every error of the hub's client is one or the other
        at = f" (revision {revision})" if revision else ""
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"model {id}{at} is neither a local directory nor in the hub's local cache, and the "
            f"hub did not give it: {reason} Remedy: download it where there is a network "
            f"(`hf download {id}`) with HF_HOME pointing to a cache that this machine sees, unset "
            "HF_HUB_OFFLINE to download it from here, or give a local directory as id."
        ) from error
    return Path(path)


def fetched_models() -> Path:
    """Where tools/fetch_models.py keeps models: $SPEECHLLM_CACHE, or in the user's cache."""
    return Path(os.environ.get("SPEECHLLM_CACHE") or "~/.cache/speechllm/models").expanduser()


def _fetched_as(directory: Path) -> str | None:
    marker = directory / "verified.json"
    if not marker.is_file():
        return None
    hub_id: str | None = json.loads(marker.read_text(encoding="utf-8")).get("hub_id")
    return hub_id


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in order of name.

    Raises:
        ModelError: there are none, or a file that the index names is missing.
    """
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if not index.is_file():
        raise ModelError(
            f"{directory} holds no model.safetensors (nor its index). Other formats are not read: "
            "load the model once with transformers and write it with save_pretrained."
        )
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [directory / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing, but {index.name} names it. Download it again.")
    return files


def hash_weights(directory: Path) -> str:
    """sha256 (hex) that tells other weights from these, whatever the directory is called.

    Files above 8 MiB are sampled, so that 14 GB cost milliseconds: size, safetensors header (names,
    types, shapes, offsets), first and last MiB, and 64 blocks of 64 KiB spaced evenly. Training
    changes all tensors and is always seen; a few bytes flipped by hand may not be.

    Raises:
        ModelError: as `weight_files`.
    """
    digest = hashlib.sha256()
    for file in weight_files(directory):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(file, "rb") as stream:
            for offset, length in _sample(size, int.from_bytes(stream.read(8), "little")):
                stream.seek(offset)
                digest.update(stream.read(length))
    return digest.hexdigest()


def hash_vocabulary(directory: Path) -> str:
    """sha256 (hex) of tokenizer.json or, without one, of the vocabulary files there are.

    Raises:
        ModelError: there is no such file.
    """
    files = [directory / "tokenizer.json"]
    if not files[0].is_file():
        files = [directory / name for name in VOCABULARY if (directory / name).is_file()]
    if not files:
        raise ModelError(f"{directory} holds no tokenizer (tokenizer.json or vocabulary files).")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def hash_text(text: str) -> str:
    """sha256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _sample(size: int, header: int) -> list[tuple[int, int]]:
    """(offset, length) of what is hashed of a file of `size` bytes."""
    if size <= WHOLE_FILE:
        return [(0, size)]
    step = (size - BLOCK) // (NUM_BLOCKS - 1)
    blocks = [(i * step, BLOCK) for i in range(NUM_BLOCKS)]
    return [(0, max(MIB, 8 + header)), *blocks, (size - MIB, MIB)]


def _tiny(id: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "speechllm" / "random" / id.removeprefix("random:")
    match id:
        case "random:whisper":
            return build_tiny_whisper(directory)
        case "random:llama":
            return build_tiny_llm(directory, kind="llama")
        case "random:olmo2":
            return build_tiny_llm(directory, kind="olmo2")
        case "random:qwen2":
            return build_tiny_llm(directory, kind="qwen2")
    raise ModelError(f"{id}: there is no such random model; choose one of {', '.join(RANDOM)}.")
