"""A page with one plot: a bar per layer, in the order of the network. SVG, no scripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fbnas.files import atomic_write
from fbnas.report.scatter import POLICY, STYLE, round_axis

NAME_WIDTH, WIDTH, ROW, TOP, BOTTOM = 250, 420, 20, 8, 44
BARS = """
.bar { fill: var(--two); } .bar.marked { fill: var(--one); } rect:hover { stroke: var(--ink); }
"""


@dataclass(frozen=True)
class Bar:
    """A value, what it is of, what hovering says, and whether it is drawn in the other colour."""

    label: str
    value: float
    tip: str
    marked: bool = False


def write_bars(
    path: Path | str, bars: Sequence[Bar], *, title: str, axis: str, words: Sequence[str]
) -> Path:
    """Write a page with a horizontal bar for each value, and return its path.

    Args:
        axis: what is drawn, and its unit.
        words: a paragraph each, below the plot.
    """
    low, high, ticks = round_axis(
        min(0.0, *(bar.value for bar in bars)), max(0.0, *(bar.value for bar in bars))
    )
    height = TOP + ROW * len(bars)
    parts = []
    for tick in ticks:
        x = _x(tick, low, high)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{height}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height + 18}" text-anchor="middle">{tick:.4g}</text>')
    parts += [_bar(bar, TOP + ROW * i, low, high) for i, bar in enumerate(bars)]
    middle = NAME_WIDTH + WIDTH / 2
    parts.append(f'<text x="{middle}" y="{height + 38}" text-anchor="middle">{escape(axis)}</text>')
    size = f"{NAME_WIDTH + WIDTH + 24} {height + BOTTOM}"
    below = "".join(f"<p>{escape(text)}</p>" for text in words)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">
<title>{escape(title)}</title><style>{STYLE}{BARS}</style></head><body>
<h1>{escape(title)}</h1>
<svg viewBox="0 0 {size}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>
{below}
</body></html>
"""
    atomic_write(path, page)
    return Path(path)


def _x(value: float, low: float, high: float) -> float:
    return NAME_WIDTH + WIDTH * (value - low) / (high - low)


def _bar(bar: Bar, top: float, low: float, high: float) -> str:
    left, right = sorted((_x(0.0, low, high), _x(bar.value, low, high)))
    kind = "bar marked" if bar.marked else "bar"
    return (
        f'<text x="{NAME_WIDTH - 8}" y="{top + 14:.1f}" text-anchor="end">{escape(bar.label)}'
        f'</text><rect class="{kind}" x="{left:.1f}" y="{top + 3:.1f}" '
        f'width="{max(right - left, 1.0):.1f}" height="{ROW - 6}"><title>{escape(bar.tip)}</title>'
        "</rect>"
    )
