"""Text normalisation before scoring."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from speechllm.errors import UserError

NORMALIZERS = ("whisper_en", "basic", "none")


@cache
def normalizer(name: str) -> Callable[[str], str]:
    """The function that brings reference and hypothesis into one form; spaces come out single.

    whisper_en: OpenAI's English normaliser (numbers, contractions, British spellings, fillers,
    diacritics), the one by which Whisper's word error rates are reported. It is for English only.
    basic: OpenAI's normaliser for other languages: lower case, no punctuation, nothing in brackets.
    none: the text as it is.
    Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", appendix C.

    Raises:
        UserError: there is no such normaliser.
    """
    match name:
        case "whisper_en":
            return _single_spaced(EnglishTextNormalizer())
        case "basic":
            return _single_spaced(BasicTextNormalizer())
        case "none":
            return _single_spaced(str)
    raise UserError(f"no normalizer {name!r}; there are {', '.join(NORMALIZERS)}")


def _single_spaced(clean: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: " ".join(clean(text).split())
