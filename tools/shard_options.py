"""Options of make_shards.py that say what shards are made: their size, audio and cleaning."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from speechllm.data.cleaning import NORMALISERS, CleanSettings
from speechllm.data.encoding import MAX_OPUS_BITRATE, MIN_OPUS_BITRATE, Encoding
from speechllm.data.prepare import Mode, PrepareSettings
from speechllm.data.shards import parse_size
from speechllm.data.surveying import PackSettings
from speechllm.errors import UserError


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    shards = parser.add_argument_group("shards")
    shards.add_argument(
        "--shard-size", type=_size, default="256MB", help="aimed at (default 256MB)"
    )
    shards.add_argument("--seed", type=_seed, default=0, help="of the shuffling (default 0)")
    audio = parser.add_argument_group("audio")
    sources = audio.add_mutually_exclusive_group()
    sources.add_argument(
        "--keep",
        dest="mode",
        action="store_const",
        const="keep",
        help="take every decodable file as it is (default: FLAC, Opus, Ogg and MP3)",
    )
    sources.add_argument(
        "--reencode", dest="mode", action="store_const", const="reencode", help="encode every file"
    )
    audio.add_argument(
        "--codec",
        choices=("flac", "opus"),
        default="flac",
        help="for what is encoded, 16 kHz and mono (default flac); opus encodes every file, unless "
        "--keep is given too",
    )
    audio.add_argument(
        "--bitrate", type=_bitrate, default=24_000, help="of opus, e.g. 24k (the default)"
    )
    _add_cleaning(parser.add_argument_group("cleaning (each drop is listed in dropped.jsonl)"))


def _add_cleaning(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-seconds", type=_amount, default=0.0, help="drop what is shorter")
    group.add_argument("--max-seconds", type=_amount, help="drop what is longer")
    group.add_argument(
        "--normalise",
        type=_names,
        default=(),
        metavar="NAME,...",
        help=f"normalise texts, in this order: {', '.join(NORMALISERS)}",
    )
    for name, what in (("keep", "keep only texts that match one of these"), ("drop", "drop texts")):
        group.add_argument(
            f"--{name}-text",
            action="append",
            default=[],
            metavar="REGEX",
            help=f"{what}, before they are normalised; may be given several times",
        )
    group.add_argument("--min-chars-per-second", type=_amount, help="drop what is spoken slower")
    group.add_argument("--max-chars-per-second", type=_amount, help="drop what is spoken faster")
    group.add_argument(
        "--max-silence",
        type=_share,
        metavar="SHARE",
        help="of 20 ms frames whose peak is under -40 dBFS, 0 to 1",
    )
    group.add_argument(
        "--max-clipping", type=_share, metavar="SHARE", help="of samples at full scale, 0 to 1"
    )
    group.add_argument(
        "--drop-duplicate-audio",
        action="store_true",
        help="of utterances with the same samples keep the first (decodes everything twice)",
    )


def shard_settings(options: argparse.Namespace) -> PackSettings:
    """Raises UserError for a regular expression or normaliser that is none, and for options that
    do not go together."""
    clean = CleanSettings(
        min_seconds=options.min_seconds,
        max_seconds=options.max_seconds,
        normalise=options.normalise,
        keep_text=tuple(options.keep_text),
        drop_text=tuple(options.drop_text),
        min_chars_per_second=options.min_chars_per_second,
        max_chars_per_second=options.max_chars_per_second,
        max_silence=options.max_silence,
        max_clipping=options.max_clipping,
        drop_duplicate_audio=options.drop_duplicate_audio,
    )
    if clean.max_seconds is not None and clean.max_seconds < clean.min_seconds:
        raise UserError(
            f"--max-seconds {clean.max_seconds:g} is less than --min-seconds {clean.min_seconds:g}"
        )
    mode: Mode = options.mode or ("reencode" if options.codec == "opus" else "auto")
    prepare = PrepareSettings(mode, Encoding(options.codec, options.bitrate), clean)
    return PackSettings(options.shard_size, options.seed, prepare)


def _typed(convert: Callable[[str], float], says: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no {says}") from error

    return parse


def _finite(text: str, most: float = math.inf) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 <= value <= most):
        raise ValueError
    return value


_amount = _typed(_finite, "number from 0")
_share = _typed(lambda text: _finite(text, 1.0), "share from 0 to 1")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; write a whole number from 0")
    return int(text)


def _bitrate(text: str) -> int:
    """`24k` -> 24,000 bits a second."""
    thousands = text.lower().endswith("k")
    digits = text[:-1] if thousands else text
    rate = int(digits) * (1000 if thousands else 1) if digits.isdecimal() else 0
    if not MIN_OPUS_BITRATE <= rate <= MAX_OPUS_BITRATE:
        low, high = MIN_OPUS_BITRATE // 1000, MAX_OPUS_BITRATE // 1000
        raise argparse.ArgumentTypeError(f"{text!r} is no bit rate from {low}k to {high}k")
    return rate


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
