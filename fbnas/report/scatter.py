"""A page with one plot: what was predicted against what was measured. SVG, no scripts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fbnas.files import atomic_write

SIDE, MARGIN = 560, 64
TICKS = 6
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --ink: #16191f; --soft: #59606c; --line: #e2e5ea; --ground: #fff;
  --one: #c2570c; --two: #0b5cad; --band: rgba(11, 92, 173, .12); }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ebef; --soft: #a9b0bc; --line: #2d333d;
  --ground: #12151a; --one: #f0954f; --two: #6fb0f2; --band: rgba(125, 184, 245, .16); } }
body { margin: 2rem auto; max-width: 46rem; padding: 0 1rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.25rem; } svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
li.one::marker { color: var(--one); } li.two::marker { color: var(--two); }
.grid { stroke: var(--line); } .equal { stroke: var(--soft); stroke-dasharray: 5 4; }
.band { fill: var(--band); } .one { fill: none; stroke: var(--one); stroke-width: 1.5; }
.two { fill: var(--two); stroke: none; } circle:hover { stroke: var(--ink); stroke-width: 3; }
ul { padding-left: 1.2rem; } li { margin: .2rem 0; }
"""


@dataclass(frozen=True)
class Point:
    """A network: what it is, and its latency as predicted and as measured, in ms."""

    label: str
    predicted_ms: float
    measured_ms: float


def write_scatter(
    path: Path | str,
    series: dict[str, Sequence[Point]],
    *,
    title: str,
    noise_floor: float,
) -> Path:
    """Write a page with measured against predicted latency, and return its path.

    The band around the line of equality is the noise floor; hovering a point shows its label.

    Args:
        series: at most two, by the line that explains them; the second is drawn filled.
        noise_floor: a fraction.
    """
    points = [point for found in series.values() for point in found]
    values = [ms for p in points for ms in (p.predicted_ms, p.measured_ms)]
    low, high, ticks = round_axis(min(values), max(values))
    kinds = dict(zip(series, ("one", "two") if len(series) > 1 else ("two",), strict=True))
    plot = [*_ground(low, high, ticks, noise_floor)]
    for name, found in series.items():
        plot += [_circle(point, kinds[name], low, high) for point in found]
    legend = "".join(f'<li class="{kinds[name]}">{escape(name)}</li>' for name in series)
    size = SIDE + MARGIN + 24
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<svg viewBox="0 0 {size} {size}" role="img" aria-label="{escape(title)}">{"".join(plot)}</svg>
<ul>{legend}</ul>
<p>The dashed line is equality, the band around it the noise floor of {100 * noise_floor:.1f} %.
Hover a point to see its network.</p>
</body></html>
"""
    atomic_write(path, page)
    return Path(path)


def round_axis(lowest: float, highest: float) -> tuple[float, float, list[float]]:
    """Return both ends and round ticks that enclose the values."""
    span = (highest - lowest) or highest or 1.0
    rough = span / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.floor(lowest / step)
    last = max(math.ceil(highest / step), first + 1)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def _x(ms: float, low: float, high: float) -> float:
    return MARGIN + SIDE * (ms - low) / (high - low)


def _y(ms: float, low: float, high: float) -> float:
    return 12 + SIDE * (high - ms) / (high - low)


def _ground(low: float, high: float, ticks: Sequence[float], noise_floor: float) -> list[str]:
    parts = []
    left, right, top, bottom = MARGIN, MARGIN + SIDE, 12, 12 + SIDE
    for tick in ticks:
        x, y = _x(tick, low, high), _y(tick, low, high)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}M{left} {y:.1f}H{right}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:.4g}</text>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    corners = [
        (low, low * (1 + noise_floor)),
        (high, high * (1 + noise_floor)),
        (high, high * (1 - noise_floor)),
        (low, low * (1 - noise_floor)),
    ]
    shape = " ".join(
        f"{_x(a, low, high):.1f},{min(max(_y(b, low, high), top), bottom):.1f}" for a, b in corners
    )
    parts.append(f'<polygon class="band" points="{shape}"/>')
    parts.append(f'<path class="equal" d="M{left} {bottom}L{right} {top}"/>')
    middle = MARGIN + SIDE / 2
    parts.append(f'<text x="{middle}" y="{bottom + 44}" text-anchor="middle">predicted, ms</text>')
    parts.append(
        f'<text x="16" y="{12 + SIDE / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {12 + SIDE / 2})">measured, ms</text>'
    )
    return parts


def _circle(point: Point, kind: str, low: float, high: float) -> str:
    tip = (
        f"{point.label}\npredicted {point.predicted_ms:.4g} ms, measured {point.measured_ms:.4g} ms"
    )
    x, y = _x(point.predicted_ms, low, high), _y(point.measured_ms, low, high)
    return (
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(tip)}</title>'
        "</circle>"
    )
