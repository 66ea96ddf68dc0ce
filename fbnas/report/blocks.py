"""What blocks cost against one another in latency tables: wider kernels, and all against k3_e1."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from fbnas.report.figures import SERIES, Figure, base_layout
from fbnas.report.tables import PSEUDO_BLOCKS, Table
from fbnas.report.words import TIMES, digits

REFERENCE = "k3_e1"
NARROW, WIDE = "k3_", "k5_"

Ratios = dict[str, list[float]]  # a ratio per shape, by what is compared


def block_comparisons(tables: Sequence[Table]) -> tuple[Figure, ...]:
    """Return 5x5 against 3x3, and every block against k3_e1, where the tables hold such blocks."""
    kernels = [_ratios(table, _pairs_of_kernels(table)) for table in tables]
    against = [_ratios(table, _pairs_of_reference(table)) for table in tables]
    found = (
        (
            "depthwise",
            f"5{TIMES}5 over 3{TIMES}3",
            kernels,
            f"Latency of 5{TIMES}5 depthwise blocks over 3{TIMES}3 ones, expansion and shape equal",
        ),
        (
            "relative",
            f"latency over {REFERENCE}",
            against,
            f"Latency of every block over that of {REFERENCE} at the same shape",
        ),
    )
    return tuple(
        _figure(name, title, what, tables, ratios)
        for name, title, ratios, what in found
        if any(ratios)
    )


def _pairs_of_kernels(table: Table) -> dict[str, tuple[str, str]]:
    blocks = _blocks(table)
    pairs = ((b.removeprefix(NARROW), (b, WIDE + b.removeprefix(NARROW))) for b in blocks)
    return {
        f"{_spoken(rest)}": pair
        for rest, pair in pairs
        if pair[0].startswith(NARROW) and pair[1] in blocks
    }


def _pairs_of_reference(table: Table) -> dict[str, tuple[str, str]]:
    others = [b for b in _blocks(table) if b not in (REFERENCE, "skip")]
    return {block: (REFERENCE, block) for block in others}


def _blocks(table: Table) -> list[str]:
    return [b for b in dict.fromkeys(row.block for row in table.rows) if b not in PSEUDO_BLOCKS]


def _ratios(table: Table, pairs: dict[str, tuple[str, str]]) -> Ratios:
    """The second block's latency over the first's at every shape that has both."""
    ms = {(row.block, row.shape): row.latency_ms for row in table.rows}
    shapes = dict.fromkeys(row.shape for row in table.rows)
    found = {
        name: [
            ms[second, shape] / ms[first, shape]
            for shape in shapes
            if ms.get((first, shape), 0.0) > 0 and (second, shape) in ms
        ]
        for name, (first, second) in pairs.items()
    }
    return {name: ratios for name, ratios in found.items() if ratios}


def _figure(
    name: str, title: str, what: str, tables: Sequence[Table], found: Sequence[Ratios]
) -> Figure:
    data: list[dict[str, Any]] = []
    said = []
    for i, (table, ratios) in enumerate(zip(tables, found, strict=True)):
        middles = [median(r) for r in ratios.values()]
        above = [max(r) - m for r, m in zip(ratios.values(), middles, strict=True)]
        below = [m - min(r) for r, m in zip(ratios.values(), middles, strict=True)]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        bars |= {"thickness": 1.2, "width": 4, "color": "var(--soft)"}
        device = " ".join(
            filter(None, (table.header.get("runtime"), table.header.get("precision")))
        )
        label = device or table.path.name
        hover = f"%{{x}}: %{{y:.3g}} times<extra>{label}</extra>"
        data.append(
            {"type": "bar", "name": label, "x": list(ratios), "y": middles, "error_y": bars}
            | {"marker": {"color": SERIES[i % len(SERIES)]}, "hovertemplate": hover}
        )
        said += [f"{label}, {x}: {digits(m)}" for x, m in zip(ratios, middles, strict=True)]
    layout = base_layout("", title, height=330) | {"showlegend": len(tables) > 1}
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout["yaxis"] |= {"rangemode": "tozero"}
    line = {"color": "var(--soft)", "width": 1, "dash": "dash"}
    equal = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 1, "y1": 1, "line": line}
    layout["shapes"] = [equal]
    caption = f"{what}: the median over shapes; whiskers are the least and the most. Dashes: equal."
    return Figure(name, f"{what}. {'; '.join(said)}", caption, data, layout)


def _spoken(rest: str) -> str:
    """e3 as expansion 3, e1_g2 as expansion 1, 2 groups."""
    expansion, _, groups = rest.partition("_g")
    words = f"expansion {expansion.removeprefix('e')}" if expansion[:1] == "e" else rest
    return f"{words},<br>{groups} groups" if groups else words
