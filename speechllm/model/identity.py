"""What trained weights belong to, and which models a configuration lacks on this machine."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.hub import hash_text, hash_vocabulary, hash_weights, resolve, weight_files


def identity(model: schema.Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, str]]:
    """What the trained weights belong to: `id`, `revision` and content `hash` of each part.

    Keys: encoder, llm, tokenizer, chat_template. The revision is the hub's commit, empty for local
    directories. Hashes do not depend on where the files lie; weights are sampled (`hash_weights`).

    Raises:
        ModelError: a model cannot be found or read.
    """
    llm = resolve(model.llm.id, model.llm.revision)
    named = {"id": model.llm.id, "revision": _commit(llm)}
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    return {
        "encoder": _encoder_identity(model.encoder),
        "llm": {**named, "hash": hash_weights(llm)},
        "tokenizer": {**named, "hash": hash_vocabulary(llm)},
        "chat_template": {**named, "hash": hash_text(template)},
    }


def missing(model: schema.Model) -> list[str]:
    """One line for each model that would have to be downloaded, or cannot be used; no network."""
    wanted = [("model.llm.id", model.llm.id, model.llm.revision)]
    if model.encoder.kind == "whisper":
        wanted.insert(0, ("model.encoder.id", model.encoder.id, model.encoder.revision))
    lines = []
    for key, id, revision in wanted:
        try:
            weight_files(resolve(id, revision, download=False))
        except ModelError as error:
            lines.append(f"{key}: {error}")
    return lines


def _encoder_identity(cfg: schema.Encoder) -> dict[str, str]:
    match cfg.kind:
        case "whisper":
            directory = resolve(cfg.id, cfg.revision)
            return {
                "id": cfg.id,
                "revision": _commit(directory),
                "hash": hash_weights(directory),
            }
        case "fbank":
            return {"id": "fbank", "revision": "", "hash": hash_text(cfg.model_dump_json())}


def _commit(directory: Path) -> str:
    """The commit of a snapshot in the hub's cache (.../snapshots/COMMIT), else empty."""
    return directory.name if directory.parent.name == "snapshots" else ""
