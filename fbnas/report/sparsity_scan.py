"""A page with one plot: accuracy against sparsity, a line per layer. SVG, no scripts."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.report.scatter import POLICY, STYLE

WIDTH, HEIGHT, LEFT, TOP = 560, 400, 64, 12
COLOURS = {"convolution": "one", "linear": "two", "depthwise": "three"}
LINES = """
:root { --three: #3d7a1f; } @media (prefers-color-scheme: dark) { :root { --three: #8fce6a; } }
polyline[class] { fill: none; stroke-width: 1.5; } polyline.one { stroke: var(--one); }
polyline.two { stroke: var(--two); } polyline.three { stroke: var(--three); }
polyline[class]:hover { stroke-width: 4; } li.three::marker { color: var(--three); }
table { border-collapse: collapse; } th, td { padding: .15rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } td, th { border-top: 1px solid var(--line); }
"""


@dataclass(frozen=True)
class Layer:
    """A layer's line: (sparsity, accuracy) by sparsity, and where it leaves the tolerance."""

    name: str
    kind: str
    weights: int
    points: tuple[tuple[float, float], ...]
    tolerated: float
    threshold: float
    threshold_std: float


def read_scan(path: Path) -> tuple[list[Layer], float]:
    """Read the layers of a sparsity_scan.csv and its tolerance.

    Raises:
        InputError: not such a file.
    """
    lines = path.read_text().splitlines()
    try:
        name, _, tolerance = lines[0].removeprefix("# ").partition(": ")
        if name != "tolerance":
            raise KeyError("tolerance")
        rows = list(csv.DictReader(lines[1:]))
        layers = [
            Layer(
                name,
                own[0]["kind"],
                int(own[0]["weights"]),
                tuple((float(row["sparsity"]), float(row["accuracy"])) for row in own),
                *(float(own[0][key]) for key in ("tolerated", "threshold", "threshold_std")),
            )
            for name, own in _by_layer(rows).items()
        ]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: {error} is missing or no number; expected the sparsity_scan.csv that "
            "method=sparsity writes."
        ) from error
    return layers, float(tolerance)


def write_scan_page(page: Path, layers: Sequence[Layer], *, tolerance: float) -> Path:
    """Write the page; hovering a line shows its layer."""
    whole = layers[0].points[0][1]
    kinds = [kind for kind in COLOURS if any(layer.kind == kind for layer in layers)]
    items = "".join(
        f'<li class="{COLOURS[kind]}">{escape(sentence(kind, layers))}</li>' for kind in kinds
    )
    title = f"Sensitivity of {len(layers)} layers, each pruned alone"
    plot = _ground() + _tolerance(whole - tolerance) + "".join(map(_line, layers))
    head = "".join(
        f"<th>{name}</th>" for name in ("layer", "kind", "weights", "tolerated", "threshold, std")
    )
    rows = "".join(
        f"<tr><td>{escape(x.name)}</td><td>{x.kind}</td><td>{x.weights:,}</td>"
        f"<td>{x.tolerated:.3f}</td><td>{x.threshold_std:.3f}</td></tr>"
        for x in sorted(layers, key=lambda layer: layer.tolerated)
    )
    size = f"{LEFT + WIDTH + 24} {TOP + HEIGHT + 60}"
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">
<title>{escape(title)}</title><style>{STYLE}{LINES}</style></head><body>
<h1>{escape(title)}</h1>
<svg viewBox="0 0 {size}" role="img" aria-label="{escape(title)}">{plot}</svg>
<ul>{items}</ul>
<p>Validation accuracy without fine-tuning, {100 * whole:.1f} % before any pruning. The dashed line
is {100 * tolerance:g} points below: where a layer's line crosses it lies its threshold. Hover a
line to see its layer.</p>
<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>
</body></html>
"""
    atomic_write(page, text)
    return page


def draw_scan(folder: Path) -> list[str]:
    """Draw a folder's sparsity_scan.csv, if any, as sparsity_scan.html; return what it says."""
    source = folder / "sparsity_scan.csv"
    if not source.is_file():
        return []
    layers, tolerance = read_scan(source)
    page = write_scan_page(folder / "sparsity_scan.html", layers, tolerance=tolerance)
    kinds = [kind for kind in COLOURS if any(layer.kind == kind for layer in layers)]
    return [f"{page}: sparsity within the tolerance of {100 * tolerance:g} points:"] + [
        f"  {sentence(kind, layers)}" for kind in kinds
    ]


def sentence(kind: str, layers: Sequence[Layer]) -> str:
    """Say how sensitive the layers of a kind are."""
    own = [layer.tolerated for layer in layers if layer.kind == kind]
    if len(own) == 1:
        return f"{kind}: {own[0]:.3f}, one layer"
    return (
        f"{kind}: median of {len(own)} layers {median(own):.3f}, {min(own):.3f} to {max(own):.3f}"
    )


def _by_layer(rows: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["layer"], []).append(row)
    if not found:
        raise KeyError("layer")
    return found


def _x(sparsity: float) -> float:
    return LEFT + WIDTH * sparsity


def _y(accuracy: float) -> float:
    return TOP + HEIGHT * (1 - accuracy)


def _ground() -> str:
    parts = []
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = _x(tick), _y(tick)
        parts.append(
            f'<path class="grid" d="M{x:.1f} {TOP}V{TOP + HEIGHT}M{LEFT} {y:.1f}H{LEFT + WIDTH}"/>'
            f'<text x="{x:.1f}" y="{TOP + HEIGHT + 20}" text-anchor="middle">{tick:g}</text>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    middle = TOP + HEIGHT / 2
    parts.append(
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 44}" text-anchor="middle">sparsity of '
        f'the layer</text><text x="16" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle})">accuracy</text>'
    )
    return "".join(parts)


def _tolerance(accuracy: float) -> str:
    return f'<path class="equal" d="M{LEFT} {_y(accuracy):.1f}H{LEFT + WIDTH}"/>'


def _line(layer: Layer) -> str:
    places = " ".join(f"{_x(s):.1f},{_y(accuracy):.1f}" for s, accuracy in layer.points)
    tip = f"{layer.name}, {layer.kind}, {layer.weights:,} weights\ntolerated {layer.tolerated:.3f}"
    return (
        f'<polyline class="{COLOURS[layer.kind]}" points="{places}"><title>{escape(tip)}</title>'
        "</polyline>"
    )
