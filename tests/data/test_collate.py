import numpy as np
import torch

import pytest

from speechllm.data.collate import collate
from speechllm.types import IGNORE, AudioSegment, Example, SpecMasks, TextSegment

END = 9


def audio(samples: int, value: int = 1) -> AudioSegment:
    return AudioSegment(np.full(samples, value, dtype=np.int16))


def tokens_of(samples: int) -> int:
    return -(-samples // 100)


def speech(key: str, samples: int, target: tuple[int, ...], value: int = 1) -> Example:
    return Example(
        key,
        (
            TextSegment((1, 2)),
            audio(samples, value),
            TextSegment((3,)),
            TextSegment((*target, END), trained=True),
        ),
    )


@pytest.mark.parametrize("pad_left", [False, True])
def test_two_utterances(pad_left: bool) -> None:
    batch = collate(
        [speech("a", 250, (4, 5), value=7), speech("b", 100, (6,), value=8)],
        tokens_of,
        pad_id=0,
        pad_left=pad_left,
    )
    pad = [0] * 3
    short, short_audio, short_there, short_labels = (
        [1, 2, 0, 3, 6, END],
        [0, 0, 1, 0, 0, 0],
        [1] * 6,
        [IGNORE] * 4 + [6, END],
    )

    def padded(row: list[int], filler: list[int]) -> list[int]:
        return filler + row if pad_left else row + filler

    assert batch.keys == ["a", "b"]
    assert batch.tokens_BS.tolist() == [[1, 2, 0, 0, 0, 3, 4, 5, END], padded(short, pad)]
    assert batch.audio_mask_BS.int().tolist() == [
        [0, 0, 1, 1, 1, 0, 0, 0, 0],
        padded(short_audio, pad),
    ]
    assert batch.attention_mask_BS.tolist() == [[1] * 9, padded(short_there, pad)]
    assert batch.labels_BS.tolist() == [
        [IGNORE] * 6 + [4, 5, END],
        padded(short_labels, [IGNORE] * 3),
    ]
    assert batch.audio_lengths_A.tolist() == [250, 100]
    assert batch.audio_AN.dtype == torch.int16
    assert batch.audio_AN.tolist() == [[7] * 250, [8] * 100 + [0] * 150]
    assert batch.num_target_tokens == 5
    assert (batch.lengths, batch.audio_samples, batch.most_audio_tokens) == ((9, 6), (250, 100), 3)
    assert batch.pad_left is pad_left


def flat(mask: torch.Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("pad_left", [False, True])
def test_places_say_what_masks_and_labels_say(pad_left: bool) -> None:
    untrained_start = Example("s", (TextSegment((1,)), TextSegment((2, END), trained=True)))
    trained_start = Example("t", (TextSegment((7, 8), trained=True), audio(430)))
    examples = [speech("a", 250, (4, 5)), trained_start, speech("b", 100, (6,)), untrained_start]
    batch = collate(examples, tokens_of, pad_id=0, pad_left=pad_left)
    assert batch.audio_places_K.tolist() == flat(batch.audio_mask_BS)
    assert batch.audio_sources_K.tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 10]
    predicted = (batch.labels_BS[:, 1:] != IGNORE) & (batch.attention_mask_BS[:, :-1] > 0)
    before = torch.nn.functional.pad(predicted, (0, 1))
    assert batch.label_places_L.tolist() == flat(before)
    assert batch.targets_L.tolist() == batch.labels_BS[:, 1:][predicted].tolist()
    assert batch.num_target_tokens == 3 + 1 + 2 + 2
    assert list(batch.lengths) == batch.attention_mask_BS.sum(1).tolist()


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ((TextSegment((1, 2)), audio(100)), (1, 2)),
        ((TextSegment((1, 2)), TextSegment((3,)), audio(100)), (1, 2, 3)),
        ((TextSegment((1, 2)), TextSegment((3, END), trained=True)), (1,)),
        ((TextSegment((1, 2)),), (1,)),
        ((audio(100), TextSegment((1, 2))), ()),
        ((TextSegment((1, END), trained=True), audio(100)), ()),
    ],
)
def test_the_opening_is_text_whose_outputs_are_of_no_use(segments, expected) -> None:  # type: ignore[no-untyped-def]
    batch = collate([Example("a", segments)], tokens_of, pad_id=0)
    assert batch.opening == expected
    longer = Example("b", (TextSegment((1, 2, 3, 4)), audio(100)))
    assert collate([longer, Example("a", segments)], tokens_of, pad_id=0).opening == expected
    other = Example("b", (TextSegment((5,)), audio(100)))
    assert collate([other, Example("a", segments)], tokens_of, pad_id=0).opening == ()


def test_the_end_token_is_trained_also_where_it_is_the_padding() -> None:
    batch = collate([speech("a", 900, (4,)), speech("b", 100, (5, 6))], tokens_of, pad_id=END)
    for row in batch.labels_BS:
        assert (row == END).sum() == 1
    assert batch.labels_BS[1].tolist() == [IGNORE] * 4 + [5, 6, END] + [IGNORE] * 7
    assert batch.attention_mask_BS[1].sum() == 7


def test_several_turns_and_several_audios() -> None:
    talk = Example(
        "talk",
        (
            TextSegment((1,)),
            audio(100),
            TextSegment((2,), trained=True),
            audio(150, value=5),
            TextSegment((3, END), trained=True),
        ),
    )
    text_only = Example("text", (TextSegment((1,)), TextSegment((4, END), trained=True)))
    batch = collate([text_only, talk], tokens_of, pad_id=0)
    assert batch.tokens_BS.tolist() == [[1, 4, END, 0, 0, 0, 0], [1, 0, 2, 0, 0, 3, END]]
    assert batch.audio_mask_BS.int().tolist() == [[0] * 7, [0, 1, 0, 1, 1, 0, 0]]
    assert batch.labels_BS[1].tolist() == [IGNORE, IGNORE, 2, IGNORE, IGNORE, 3, END]
    assert batch.audio_lengths_A.tolist() == [100, 150]
    assert batch.audio_AN[1, :150].tolist() == [5] * 150


def test_text_alone() -> None:
    text = Example("text", (TextSegment((1,)), TextSegment((4, END), trained=True)))
    batch = collate([text], tokens_of, pad_id=0)
    assert batch.audio_AN.shape == (0, 0)
    assert not batch.audio_mask_BS.any()


def test_audio_places_are_as_many_as_the_counter_says() -> None:
    random = np.random.default_rng(0)
    examples = [speech(str(k), int(n), (4,)) for k, n in enumerate(random.integers(1, 3000, 20))]
    batch = collate(examples, tokens_of, pad_id=0)
    counted = [tokens_of(int(n)) for n in batch.audio_lengths_A]
    assert batch.audio_mask_BS.sum(1).tolist() == counted


def test_masks_stand_at_their_segments_filled_up_with_empty_ones() -> None:
    one = SpecMasks(np.array([[1, 4], [2, 3]]), np.zeros((0, 2), np.float32))
    other = SpecMasks(np.array([[5, 9]]), np.array([[0.25, 0.5]], np.float32))
    segments = [AudioSegment(np.ones(200, np.int16), masks) for masks in (one, None, other)]
    batch = collate([Example(str(i), (s,)) for i, s in enumerate(segments)], tokens_of, pad_id=0)
    assert batch.masks is not None
    assert batch.masks.times_G2.tolist() == [
        [[1, 4], [2, 3]], [[0, 0], [0, 0]], [[5, 9], [0, 0]],
    ]  # fmt: skip
    assert batch.masks.bands_H2.tolist() == [[[0, 0]], [[0, 0]], [[0.25, 0.5]]]
    assert batch.masks.bands_H2.dtype == torch.float32
    moved = batch.to(torch.device("meta"))
    assert moved.masks is not None
    assert moved.masks.times_G2.device.type == "meta"
    assert collate([speech("a", 250, (4,))], tokens_of, pad_id=0).masks is None
