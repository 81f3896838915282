import json
from importlib.resources import files

import pytest

from speechllm.errors import UserError
from speechllm.text import NORMALIZERS, normalizer

SENTENCES = [
    "Mr. Smith's favourite colour isn't grey, it's GREEN!",
    "I paid $5.50 for twenty-five apples on the 21st of June, nineteen ninety nine.",
    "Uh, we're gonna, um, organise the théâtre's programme (laughs) [noise] at 10:30.",
    "Two hundred and three point five percent of O'Brien's 1,000,000 naïve cafés",
    "Dr. King won't've been there; y'all can't let's go",
    "one oh one double seven, minus three million",
    "straße Ærøskøbing señor",
    "",
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_whisper_en_equals_transformers(sentence):
    english = pytest.importorskip("transformers.models.whisper.english_normalizer")
    table = files("whisper_normalizer").joinpath("normalizers/english.json").read_text("utf-8")
    reference = english.EnglishTextNormalizer(json.loads(table))
    assert normalizer("whisper_en")(sentence) == reference(sentence).strip()


def test_what_each_normalizer_does():
    text = "  It's  the  Colour, \n of 25% Žluťoučký [noise] "
    assert normalizer("whisper_en")(text) == "it is the color of 25% zlutoucky"
    assert normalizer("basic")(text) == "it s the colour of 25 žluťoučký"
    assert normalizer("none")(text) == "It's the Colour, of 25% Žluťoučký [noise]"


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizing_twice_changes_nothing(name):
    clean = normalizer(name)
    for sentence in SENTENCES[:3]:
        assert clean(clean(sentence)) == clean(sentence)


def test_unknown_normalizer():
    with pytest.raises(UserError, match="whisper_en, basic, none"):
        normalizer("whisper")
