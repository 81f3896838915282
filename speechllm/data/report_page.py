"""The report of a build as one page of HTML that needs nothing else: tables and bar charts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from speechllm.data.histograms import EDGES

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 180, 64, 34, 16
_LABELS = 9  # at most so many along an axis
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2430; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; }
table { border-collapse: collapse; }
td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; font-weight: 400; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
th { color: #5b6675; } svg { max-width: 100%; height: auto; } code { font-size: .9em; }
rect { fill: #3f6fb5; } rect:hover { fill: #1f4a8a; }
text { font: 11px system-ui, sans-serif; fill: #5b6675; } line { stroke: #c9d1dc; }
"""
_TITLES = {
    "seconds": "Duration (seconds)",
    "characters": "Text length (characters)",
    "characters_per_second": "Characters per second",
    "level": "Level (dBFS, root mean square)",
    "silence": "Share of 20 ms frames whose peak is under -40 dBFS",
    "clipping": "Share of samples at full scale",
}


def report_page(values: Mapping[str, Any]) -> str:
    """values: what `report.json` holds."""
    parts = [f"<h1>{_escape(values['name'])}</h1>", _totals(values)]
    parts += ["<h2>Left out, by reason</h2>", _counts(values["dropped"], "nothing was left out")]
    for name, title in _TITLES.items():
        histogram = values["histograms"][name]
        parts += [f"<h2>{_escape(title)}</h2>", bars(histogram["counts"], labels(name))]
    parts += ["<h2>Sample rates (Hz)</h2>", _counts(values["sample_rates"], "none")]
    settings = {
        name: value for name, value in values["settings"].items() if value not in (None, [])
    }
    parts += ["<h2>Settings</h2>", _table([(name, str(value)) for name, value in settings.items()])]
    name = _escape(values["name"])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def labels(name: str) -> list[str]:
    """What stands under the bars of a histogram: the range of each."""
    if name == "clipping":
        return ["none", "< 0.001 %", "< 0.01 %", "< 0.1 %", "< 1 %", "< 10 %", "more"]
    unit = 100 if name == "silence" else 1
    scaled = [round(edge * unit, 9) for edge in EDGES[name]]
    percent = " %" if name == "silence" else ""
    inner = [f"{low:g} to {high:g}{percent}" for low, high in pairwise(scaled)]
    return [*inner, f"{scaled[-1]:g}{percent} and more"]


def bars(counts: Sequence[int], ranges: Sequence[str]) -> str:
    """A bar chart; the exact number of each bar shows when the pointer is on it."""
    last = max((i for i, count in enumerate(counts) if count), default=0)
    first = min((i for i, count in enumerate(counts) if count), default=0)
    shown = list(zip(counts, ranges, strict=True))[first : last + 1]
    highest, total = max(1, max(counts)), max(1, sum(counts))
    step = (_WIDTH - _LEFT) / len(shown)
    scale = (_HEIGHT - _BOTTOM - _TOP) / highest
    base = _HEIGHT - _BOTTOM
    drawn = [
        f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH}" y2="{base}"/>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end">{highest:,}</text>',
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>',
    ]
    every = -(-len(shown) // _LABELS)
    for i, (count, name) in enumerate(shown):
        height = count * scale
        tip = f"{_escape(name)}: {count:,} ({count / total:.1%})"
        drawn.append(
            f'<rect x="{_LEFT + i * step + 0.5:.1f}" y="{base - height:.1f}" '
            f'width="{max(1.0, step - 1):.1f}" height="{height:.1f}"><title>{tip}</title></rect>'
        )
        if i % every == 0:
            middle = _LEFT + (i + 0.5) * step
            short = name.partition(" to ")[0] if len(shown) > 1 else name
            drawn.append(
                f'<text x="{middle:.1f}" y="{base + 16}" text-anchor="middle">'
                f"{_escape(short)}</text>"
            )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">' + "".join(drawn) + "</svg>"


def _totals(values: Mapping[str, Any]) -> str:
    rows = [
        ("shards", f"{values['shards']:,}"),
        ("utterances", f"{values['utterances']:,}"),
        ("hours", f"{values['hours']:,.2f}"),
        ("bytes", f"{values['bytes']:,}"),
        ("audio kept as it came", f"{values['kept']:,}"),
        (f"encoded to {values['settings']['codec']}", f"{values['encoded']:,}"),
        ("left out", f"{sum(values['dropped'].values()):,}"),
    ]
    return _table(rows)


def _counts(counts: Mapping[str, int], nothing: str) -> str:
    if not counts:
        return f"<p>{_escape(nothing)}</p>"
    return _table([(name, f"{count:,}") for name, count in counts.items()])


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = [f'<tr><th>{_escape(k)}</th><td class="n">{_escape(v)}</td></tr>' for k, v in rows]
    return "<table>" + "".join(lines) + "</table>"


def _escape(text: str) -> str:
    return html.escape(text)
