from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from speechllm.data.cleaning import AudioStatistics
from speechllm.data.histograms import EDGES, Measured, add_up, count, measured

values = st.floats(0, 1000)
utterances = st.lists(
    st.builds(Measured, values, st.integers(0, 2000), values, st.floats(-96, 0), values, values),
    max_size=30,
)


@given(utterances)
def test_every_utterance_is_in_the_bin_that_holds_it(given: list[Measured]) -> None:
    counts = count(given)
    assert list(counts) == list(Measured._fields) == list(EDGES)
    for name, edges in EDGES.items():
        own = [getattr(one, name) for one in given]
        tops = [*edges[1:], float("inf")]
        expected = [
            sum(low <= one < high for one in own) for low, high in zip(edges, tops, strict=True)
        ]
        assert counts[name] == expected


@given(utterances, utterances)
def test_counts_add_up(one: list[Measured], other: list[Measured]) -> None:
    assert add_up([count(one), count(other)]) == count([*one, *other])


def test_an_utterance_is_measured() -> None:
    one = measured("12345", 2.0, AudioStatistics(-20.0, 0.25, 0.0))
    assert one == (2.0, 5, 2.5, -20.0, 0.25, 0.0)
    counts = count([one])
    assert counts["seconds"][2] == counts["characters"][0] == counts["silence"][5] == 1
    assert counts["clipping"][0] == 1
    below = count([one._replace(level=-200.0)])
    assert below["level"][0] == 1
