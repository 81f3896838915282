"""The audio of a lhotse recording: which of its sources, and which channel of that."""

from __future__ import annotations

from typing import Any

from speechllm.data.sources.spec import SourceOptions
from speechllm.data.sources.utterance import AudioRef, CommandAudio, FileAudio
from speechllm.errors import DataError

# What needs not be done, because everything is resampled to 16 kHz here anyway.
_HARMLESS_TRANSFORMS = ("Resample",)


def audio_of(
    recording: dict[str, Any], channel: Any, where: str, options: SourceOptions
) -> tuple[AudioRef, int | None]:
    """The audio with this channel, and the channel's number within it (None where it has one).

    Raises DataError for audio in memory, for several channels at once, for transforms that would
    change it, and for commands that are not allowed.
    """
    name = recording.get("id")
    if isinstance(channel, list) and len(channel) == 1:
        channel = channel[0]
    if not isinstance(channel, int) or isinstance(channel, bool):
        raise DataError(
            f"{where}: channel {channel!r} of recording {name}: an utterance has one channel; "
            "split it with lhotse first (e.g. CutSet.to_mono of multi-channel cuts)"
        )
    transforms = recording.get("transforms") or []
    for transform in transforms if isinstance(transforms, list) else [transforms]:
        kind = transform.get("name") if isinstance(transform, dict) else transform
        if kind not in _HARMLESS_TRANSFORMS:
            raise DataError(
                f"{where}: recording {name} has the transform {kind}, which only lhotse can do; "
                "save the audio with lhotse first (CutSet.save_audios)"
            )
    sources = recording.get("sources")
    sources = [one for one in sources if isinstance(one, dict)] if isinstance(sources, list) else []
    if not sources:
        raise DataError(f"{where}: recording {name} has no `sources`")
    for source in sources:
        channels = source.get("channels")
        if isinstance(channels, list) and channel in channels:
            chosen = channels.index(channel) if len(channels) > 1 else None
            return _reference(source, name, where, options), chosen
    raise DataError(f"{where}: no source of recording {name} has channel {channel}")


def _reference(source: dict[str, Any], name: Any, where: str, options: SourceOptions) -> AudioRef:
    kind, value = source.get("type"), source.get("source")
    if kind in ("file", "url", "command") and isinstance(value, str) and value:
        if kind != "command":
            return FileAudio(value)
        if not options.allow_commands:
            raise DataError(
                f"{where}: recording {name} is a command ({value}): commands of a corpus are run "
                "only with --allow-commands, because they can do anything that you can"
            )
        return CommandAudio(value.strip().removesuffix("|").strip())
    raise DataError(
        f"{where}: recording {name} has a source of type {kind!r}; file, url and command can be "
        "read; save other audio with lhotse first (CutSet.save_audios)"
    )
