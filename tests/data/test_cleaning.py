from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speech_files import tone

from speechllm.data.cleaning import (
    FLOOR_DBFS,
    FRAME,
    NORMALISERS,
    CleanSettings,
    audio_hash,
    audio_statistics,
    check_length,
    check_pace,
    check_sound,
    clean_text,
    first_of_equals,
    normalised,
    strip_brackets,
    strip_punctuation,
)
from speechllm.errors import DataError, UserError


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        ([], "As  it Is. ", "As  it Is. "),
        (["lowercase"], " ŽLUŤOUČKÝ  Kůň ", "žluťoučký kůň"),
        (["uppercase"], "straße", "STRASSE"),
        (["nfc"], "z\u030c", "ž"),
        (["nfkc"], "ﬁne \uff12", "fine 2"),
        (["strip-punctuation"], "Well-known: it's - 5 %, «ano»!", "Well-known it's 5 ano"),
        (["strip-brackets"], "a <unk> b [noise [loud]] (c)d {e}", "a b d"),
        (["strip-brackets", "strip-punctuation", "lowercase"], "[x] So, (uh) YES.", "so yes"),
        (["whisper-english"], "Mr. Brown's colour is twenty two", "mister brown is color is 22"),
        (["whisper-basic"], "Straße, [x] 5!", "straße 5"),
    ],
)
def test_normalisers(names: list[str], text: str, expected: str) -> None:
    assert normalised(text, names) == expected


@given(text=st.text(max_size=40))
def test_no_punctuation_is_left_but_within_words(text: str) -> None:
    for i, one in enumerate(stripped := strip_punctuation(text)):
        if unicodedata.category(one)[0] in "PS":
            assert one in "'’-"  # noqa: RUF001
            assert stripped[i - 1].isalnum()
            assert stripped[i + 1].isalnum()
    assert strip_punctuation(stripped) == stripped
    assert len(stripped) == len(text)


@given(text=st.text("ab[]<> ", max_size=40))
def test_no_whole_bracket_is_left(text: str) -> None:
    left = strip_brackets(text)
    assert strip_brackets(left) == left
    depth = 0
    for one in left.replace("<", "").replace(">", ""):
        depth = max(0, depth) + {"[": 1, "]": -1}.get(one, 0)
        assert one != "]" or depth < 0


@given(text=st.text(max_size=40), name=st.sampled_from(["nfc", "nfkc", "strip-punctuation"]))
def test_spaces_come_out_single(text: str, name: str) -> None:
    once = normalised(text, [name])
    assert once == " ".join(once.split())


def test_every_normaliser_is_there() -> None:
    for name in NORMALISERS:
        assert normalised("Ahoj", [name]).lower() == "ahoj"


@pytest.mark.parametrize(
    ("settings", "text", "reason"),
    [
        ({}, None, "no text: missing or empty"),
        ({"normalise": ("strip-brackets",)}, "[noise]", "no text: nothing of '.noise.' is left"),
        ({"drop_text": ("IGNORE", r"\d")}, "room 7", "unwanted text: 'room 7' holds '7'"),
        ({"keep_text": ("^[a-z ]+$", "^x")}, "Ahoj", "unwanted text: 'Ahoj' matches no pattern"),
    ],
)
def test_texts_that_are_dropped(settings: dict[str, Any], text: str | None, reason: str) -> None:
    with pytest.raises(DataError, match=f"^{reason}"):
        clean_text(text, CleanSettings(**settings))


def test_patterns_see_the_text_before_it_is_normalised() -> None:
    settings = CleanSettings(
        normalise=("lowercase",), keep_text=("[A-Z]",), drop_text=("^[a-z ]+$",)
    )
    assert clean_text("Anna calls", settings) == "anna calls"
    with pytest.raises(DataError, match="unwanted"):
        clean_text("anna calls", settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"normalise": ("lower",)}, "no normaliser 'lower'; there are nfc, .*whisper-basic"),
        ({"keep_text": ("a", "(")}, r"'\(' is no regular expression \(missing \)"),
        ({"drop_text": ("[",)}, "is no regular expression"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CleanSettings(**settings)


def test_lengths_and_paces() -> None:
    settings = CleanSettings(0.5, 2.0, min_chars_per_second=2, max_chars_per_second=10)
    check_length(0.5, settings)
    check_length(2.0, settings)
    check_pace("ab", 1.0, settings)
    check_pace("a" * 10, 1.0, settings)
    with pytest.raises(DataError, match=r"^too short: 0\.499 s, under 0\.5 s"):
        check_length(0.499, settings)
    with pytest.raises(DataError, match=r"^too long: "):
        check_length(2.001, settings)
    with pytest.raises(DataError, match=r"^too few characters per second: 1\.0, under 2"):
        check_pace("ab", 2.0, settings)
    with pytest.raises(DataError, match=r"^too many characters per second: 11\.0, over 10"):
        check_pace("a" * 11, 1.0, settings)
    check_pace("a" * 999, 0.1, CleanSettings())


def test_the_statistics_of_known_sounds() -> None:
    assert audio_statistics(np.zeros(1000, np.int16)) == (FLOOR_DBFS, 1.0, 0.0)
    square = np.tile(np.array([16384, -16384], np.int16), 800)
    assert audio_statistics(square) == (pytest.approx(-6.0206, abs=1e-3), 0.0, 0.0)
    half = np.concatenate([square, np.zeros(1600, np.int16)])
    assert audio_statistics(half).silence == 0.5
    loud = np.array([32767, -32768, -32767, 32766, 0], np.int16)
    assert audio_statistics(loud).clipping == pytest.approx(0.6)
    # What is left over after whole frames does not count.
    assert audio_statistics(np.append(square[: 2 * FRAME], np.int16(32767))).silence == 0
    assert audio_statistics(np.append(square[: 2 * FRAME], np.int16(32767))).clipping == 0


@given(
    length=st.integers(1, 9 * FRAME) | st.integers(99 * FRAME, 110 * FRAME),
    amplitude=st.integers(0, 32767),
    seed=st.integers(0, 9),
)
def test_statistics_are_what_a_plain_computation_gives(
    length: int, amplitude: int, seed: int
) -> None:
    drawn = np.random.default_rng(seed).integers(-amplitude, amplitude + 1, length)
    samples = drawn.astype(np.int16)
    found = audio_statistics(samples)
    frames = [drawn[i : i + FRAME] for i in range(0, length - FRAME + 1, FRAME)] or [drawn]
    heard = np.stack(frames[::4] if length >= 100 * FRAME else frames)
    power = np.mean((heard / 32768) ** 2)
    level = 10 * np.log10(power) if power > 0 else -96.0
    assert found.level == pytest.approx(max(level, -96.0), abs=1e-3)
    assert found.silence == pytest.approx(np.mean(np.abs(heard).max(axis=1) < 328))
    assert found.clipping == pytest.approx(np.mean(np.abs(heard) >= 32767))


def test_sounds_that_are_dropped() -> None:
    settings = CleanSettings(max_silence=0.5, max_clipping=0.01)
    check_sound(audio_statistics(tone(1.0)), settings)
    with pytest.raises(DataError, match=r"^silent: 100\.0% of it stays under -40 dBFS"):
        check_sound(audio_statistics(np.zeros(999, np.int16)), settings)
    clipped = np.clip(tone(1.0).astype(np.int32) * 9, -32768, 32767).astype(np.int16)
    with pytest.raises(DataError, match=r"^clipped: .* at full scale, more than 1\.000%"):
        check_sound(audio_statistics(clipped), settings)
    check_sound(audio_statistics(clipped), CleanSettings())


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(2**64 - 2, 2**64 - 1), st.booleans()), max_size=40
    )
)
def test_the_first_of_equals_stays(rows: list[tuple[int, int, bool]]) -> None:
    hashes = np.array([row[:2] for row in rows], np.uint64).reshape(-1, 2)
    valid = np.array([row[2] for row in rows], bool)
    seen: dict[tuple[int, int], int] = {}
    expected = [seen.setdefault(row[:2], i) if row[2] else -1 for i, row in enumerate(rows)]
    assert first_of_equals(hashes, valid).tolist() == expected


def test_a_hash_is_of_the_samples() -> None:
    samples = tone(0.1)
    assert audio_hash(samples) == audio_hash(np.stack([samples, samples], axis=1)[:, 0])
    assert audio_hash(samples) != audio_hash(samples[:-1])
    assert all(0 <= half < 2**64 for half in audio_hash(samples))
