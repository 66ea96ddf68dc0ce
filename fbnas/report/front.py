"""Fronts of accuracy against latency: measured files, and networks judged by shared weights."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fbnas.report.figures import SERIES, Figure, base_layout, wrapped
from fbnas.report.given import Baseline
from fbnas.report.markup import details, number, table
from fbnas.report.run import Run, Search
from fbnas.report.words import ms, percent

# kind in front.json: its name in the legend, its colour, its symbol, its size
KINDS: dict[str, tuple[str, str, str, int]] = {
    "random": ("random, within the budgets", "var(--muted)", "circle-open", 7),
    "uniform": ("one block in every layer", SERIES[2], "diamond-open", 9),
    "published": ("published", SERIES[4], "triangle-up", 10),
    "candidate": ("candidates", SERIES[1], "square", 8),
    "target": ("chosen for a target", "var(--mark)", "star", 14),
}


OWN = "stages of this run"
FEW = 12  # points that can have their names beside them
LETTER, LINE = 0.009, 0.05  # of a name: its part of the plot's width and height


@dataclass(frozen=True)
class Spot:
    """A network on the plane of latency (ms) and accuracy (0 to 1); `hover` is HTML."""

    group: str
    name: str
    latency_ms: float
    accuracy: float
    blocks: tuple[str, ...] = ()
    note: str = ""

    @property
    def hover(self) -> str:
        lines = [f"<b>{escape(self.name)}</b>", escape(self.note), wrapped(self.blocks)]
        return "<br>".join(line for line in lines if line)


def judged_front(run: Run) -> list[tuple[Figure, str]]:
    """The search's networks and baselines by its shared weights: a figure and a table per device.

    Latency is what the target's table predicts; targets of one table share a figure.
    """
    search, front = run.search, run.front
    if search is None or front is None:
        return []
    found: list[tuple[Figure, str]] = []
    for device, first in search.first_of_table.items():
        mine = [i for i, target in enumerate(search.targets) if target.table == device]
        spots = [
            Spot(
                row["kind"],
                row["name"],
                search.predicted_ms(row["architecture"], first),
                row["accuracy"],
                tuple(row["architecture"]),
                _asked(search, row),
            )
            for row in front["networks"]
            if row.get("target", first) in mine
        ]
        budgets = [search.targets[i].budget_ms for i in mine]
        where = f" ({device.rpartition('/')[2]})" if len(search.first_of_table) > 1 else ""
        caption = (
            f"Accuracy by the search's shared weights on {front['images']} training images that "
            "the weights did not see (theta did), against the latency that the table "
            f"predicts{where}. It ranks networks; trained alone they get better. The line joins "
            "those that none beats in both, dashes are the budgets. Hover, or use the arrow keys, "
            "for the blocks."
        )
        figure = _front(f"front-{len(found)}", spots, KINDS, caption, "predicted (ms)")
        figure.layout["yaxis"]["title"]["text"] = "accuracy by shared weights"
        _draw_budgets(figure, spots, [b for b in budgets if b is not None])
        found.append((figure, _table(f"front-table-{len(found)}", "judged networks", spots, KINDS)))
    return found


def measured_front(
    runs: Sequence[Run], baselines: Sequence[Baseline] = ()
) -> tuple[Figure, str] | None:
    """Every file that runs measured, and the baselines that were given; None where none is."""
    spots = [spot for run in runs for spot in _files(run, several=len(runs) > 1)]
    spots += [
        Spot("baselines", b.name, b.latency_ms, b.accuracy, tuple(b.architecture.split()))
        for b in baselines
    ]
    if len(spots) < 2:
        return None
    names = [run.name for run in runs] if len(runs) > 1 else [OWN]
    kinds: dict[str, tuple[str, str, str, int]] = {
        name: (name, SERIES[i % len(SERIES)], "circle", 10) for i, name in enumerate(names)
    }
    kinds["rejected"] = ("rejected stages", "var(--muted)", "x", 9)
    kinds["baselines"] = ("baselines", "var(--soft)", "diamond-open", 10)
    caption = (
        "Test accuracy and measured latency of every file. The line joins those that none beats in "
        "both. Hover, or use the arrow keys, for the blocks."
    )
    if baselines:
        caption += " Baselines are as they were given, not measured by this run."
    figure = _front("front-measured", spots, kinds, caption, "measured (ms)")
    figure.layout["yaxis"]["title"]["text"] = "test accuracy"
    if len(spots) <= FEW:
        _name_spots(figure)
    budgets = dict.fromkeys(run.target_ms for run in runs if run.target_ms is not None)
    _draw_budgets(figure, spots, list(budgets))
    return figure, _table("front-measured-table", "measured files", spots, kinds)


def _asked(search: Search, row: dict[str, Any]) -> str:
    """Which target a network belongs to, in words; nothing for one that belongs to none."""
    return f"target {ms(search.targets[row['target']].budget_ms)}" if "target" in row else ""


def best_of(spots: Iterable[Spot]) -> list[Spot]:
    """Return the spots that no other beats in both latency and accuracy, fastest first."""
    best: list[Spot] = []
    for spot in sorted(spots, key=lambda s: (s.latency_ms, -s.accuracy)):
        if not best or spot.accuracy > best[-1].accuracy:
            best.append(spot)
    return best


def _name_spots(figure: Figure) -> None:
    """Write names beside the points, above and below by turns, where they collide with none."""
    points = [trace for trace in figure.data if trace["mode"] == "markers"]
    every = sorted((x, i, k) for i, t in enumerate(points) for k, x in enumerate(t["x"]))
    heights = [y for trace in points for y in trace["y"]]
    across = every[-1][0] - every[0][0] or 1.0
    up = max(heights) - min(heights) or 1.0
    named: list[tuple[float, float, float]] = []  # place, and half the length of the name
    for trace in points:
        trace |= {"mode": "markers+text", "texttemplate": ["" for _ in trace["x"]]}
        trace["textposition"] = ["top center" for _ in trace["x"]]
    for turn, (at, i, k) in enumerate(every):
        trace, above = points[i], turn % 2 == 0
        x, half = at / across, LETTER * len(trace["customdata"][k]) / 2
        y = trace["y"][k] / up + (LINE if above else -LINE)
        if all(abs(x - a) > half + h or abs(y - b) > LINE for a, b, h in named):
            named.append((x, y, half))
            trace["texttemplate"][k] = "%{customdata}"
            trace["textposition"][k] = f"{'top' if above else 'bottom'} center"


def _files(run: Run, *, several: bool) -> list[Spot]:
    """The measured stages of a run, or its one file."""
    result, blocks = run.result, tuple(run.result.get("architecture") or ())
    stages: list[dict[str, Any]] = result.get("stages") or [
        {"name": "the file", "accepted": True}
        | {key: result.get(key) for key in ("latency_ms", "accuracy_top1")}
    ]
    spots = []
    for stage in stages:
        latency, accuracy = stage.get("latency_ms"), stage.get("accuracy_top1")
        if not latency or accuracy is None:
            continue
        own = run.name if several else OWN
        group = own if stage["accepted"] else "rejected"
        name = f"{run.name}: {stage['name']}" if several else str(stage["name"])
        spots.append(
            Spot(group, name, latency["value"], accuracy, blocks, str(stage.get("reason") or ""))
        )
    return spots


def _front(
    name: str,
    spots: Sequence[Spot],
    kinds: dict[str, tuple[str, str, str, int]],
    caption: str,
    x_title: str,
) -> Figure:
    best = best_of(spots)
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "front", "hoverinfo": "skip"}
        | {"x": [s.latency_ms for s in best], "y": [s.accuracy for s in best]}
        | {"line": {"color": "var(--muted)", "width": 1.5, "shape": "hv"}}
    ]
    for kind, (title, colour, symbol, size) in kinds.items():
        some = [spot for spot in spots if spot.group == kind]
        if some:
            data.append(_trace(title, some, colour, symbol, size))
    layout = base_layout(x_title, "accuracy", height=460)
    layout["yaxis"]["tickformat"] = ".1~%"
    said = "; ".join(f"{s.name}, {ms(s.latency_ms)}, {percent(s.accuracy)}" for s in best)
    label = f"Accuracy against latency of {len(spots)} networks; the front, fastest first: {said}"
    return Figure(name, label, caption, data, layout)


def _trace(
    title: str, spots: Sequence[Spot], colour: str, symbol: str, size: int
) -> dict[str, Any]:
    marker = {
        "color": colour,
        "symbol": symbol,
        "size": size,
        "line": {"width": 1.5, "color": colour},
    }
    hover = "%{x:.4g} ms, %{y:.1%}<br>%{text}<extra></extra>"
    trace: dict[str, Any] = {"type": "scatter", "mode": "markers", "name": title}
    trace |= {"marker": marker}
    trace |= {"x": [s.latency_ms for s in spots], "y": [s.accuracy for s in spots]}
    trace |= {"customdata": [s.name for s in spots], "text": [s.hover for s in spots]}
    return trace | {"hovertemplate": hover, "cliponaxis": False}


def _draw_budgets(figure: Figure, spots: Sequence[Spot], budgets: Sequence[float]) -> None:
    """Draw a line per budget, on an axis that has room for all of them."""
    figure.layout["shapes"] = [_budget(budget) for budget in budgets]
    every = [*(spot.latency_ms for spot in spots), *budgets]
    room = 0.05 * (max(every) - min(every))
    figure.layout["xaxis"]["range"] = [min(every) - room, max(every) + room]


def _budget(budget_ms: float) -> dict[str, Any]:
    line = {"color": "var(--soft)", "width": 1.2, "dash": "dash"}
    place = {"x0": budget_ms, "x1": budget_ms, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "line", "layer": "below", "line": line} | place


def _table(
    name: str, what: str, spots: Sequence[Spot], kinds: dict[str, tuple[str, str, str, int]]
) -> str:
    best = best_of(spots)
    rows = [
        f"<tr><th scope=row>{escape(spot.name)}</th><td>{escape(kinds[spot.group][0])}</td>"
        f"{number(ms(spot.latency_ms))}{number(percent(spot.accuracy))}"
        f"<td>{'yes' if spot in best else 'no'}</td>"
        f"<td class=blocks>{escape(' '.join(spot.blocks))}</td></tr>"
        for spot in sorted(spots, key=lambda s: s.latency_ms)
    ]
    columns = ("Network", "Kind", "Latency", "Accuracy", "On the front", "Blocks")
    caption = "The networks of the plot, fastest first."
    return details(f"The {what} as a table", table(name, caption, columns, rows))
