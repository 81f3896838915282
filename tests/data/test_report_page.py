from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from speechllm.data.histograms import EDGES
from speechllm.data.report_page import bars, labels, report_page


def values() -> dict:
    histograms = {
        name: {"edges": edges, "counts": [0, 3, *[0] * (len(edges) - 3), 1]}
        for name, edges in EDGES.items()
    }
    return {
        "name": "a <b>",
        "settings": {"codec": "opus", "seed": 1, "max_seconds": None},
        "shards": 2,
        "utterances": 1234,
        "hours": 1.5,
        "bytes": 10,
        "kept": 1000,
        "encoded": 234,
        "sample_rates": {"16000": 1234},
        "dropped": {"too long": 5, "unwanted text": 2},
        "histograms": histograms,
    }


def test_a_page_is_whole_and_escapes() -> None:
    page = report_page(values())
    assert "<h1>a &lt;b&gt;</h1>" in page
    assert "<b>" not in page
    for piece in ("1,234", "encoded to opus", "too long", "unwanted text", "left out", ">7<"):
        assert piece in page
    assert "max_seconds" not in page
    for drawing in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(drawing)


def test_bars_are_as_high_as_their_counts() -> None:
    drawing = ElementTree.fromstring(bars([0, 2, 4, 0, 1, 0], list("abcdef")))
    rects = drawing.findall("rect")
    heights = [float(rect.get("height") or -1) for rect in rects]
    assert len(heights) == 4  # empty ends are left out, empty bins within are not
    assert heights[0] == pytest.approx(heights[1] / 2)
    assert heights[2] == 0
    titles = [rect[0].text for rect in rects]
    assert titles == ["b: 2 (28.6%)", "c: 4 (57.1%)", "d: 0 (0.0%)", "e: 1 (14.3%)"]


def test_no_utterances_are_no_error() -> None:
    assert len(ElementTree.fromstring(bars([0, 0], ["a", "b"])).findall("rect")) == 1


@pytest.mark.parametrize("name", EDGES)
def test_every_bin_has_a_label(name: str) -> None:
    assert len(labels(name)) == len(EDGES[name]) == len(set(labels(name)))


def test_labels() -> None:
    assert labels("seconds")[:2] == ["0 to 1", "1 to 2"]
    assert labels("seconds")[-1] == "40 and more"
    assert labels("silence")[1] == "5 to 10 %"
