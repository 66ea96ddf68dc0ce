"""The page's figures as plain plotly JSON; colours are CSS variables, which the page resolves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fbnas.report.run import Matrix, Rows, Run, Search
from fbnas.report.shapes import Shape, describe
from fbnas.report.tables import PSEUDO_BLOCKS, Table
from fbnas.report.words import THIN, digits, ms, percent

# Theta's history is thinned to so many epochs a target, and in all: the page stays under 6 MB.
MAX_FRAMES, MAX_FRAMES_IN_ALL = 50, 250
SERIES = tuple(f"var(--series-{i})" for i in range(1, 7))
SCALE = [[i / 4, f"var(--scale-{i})"] for i in range(5)]


@dataclass(frozen=True)
class Figure:
    """One figure: `label` is its text for those who do not see it, `caption` stands under it.

    `frames` are alternative `z` of the first trace, one a step of the slider, whose names are
    `steps`; the last is shown first.
    """

    name: str
    label: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    frames: tuple[Matrix, ...] = ()
    steps: tuple[str, ...] = ()


def theta(search: Search, target: int, chosen: Sequence[str] = ()) -> Figure:
    """softmax(theta) of one target, blocks by layers, a frame an epoch; dots mark `chosen`."""
    kept = kept_epochs(search)
    frames = tuple(_transposed(search.probabilities(i, target)) for i in kept)
    layers = list(range(len(frames[-1][0])))
    heatmap = {
        "type": "heatmap",
        "z": frames[-1],
        "x": layers,
        "y": list(search.blocks),
        "zmin": 0,
        "zmax": 1,
        "hovertemplate": "layer %{x}, %{y}: %{z:.3f}<extra></extra>",
    }
    data = [heatmap | _heat("p")]
    if len(chosen) == len(layers):
        edge = {"color": "var(--ground)", "width": 2}
        marker = {"symbol": "circle", "size": 12, "color": "var(--mark)", "line": edge}
        data.append(
            {"type": "scatter", "mode": "markers", "name": "chosen", "x": layers, "y": list(chosen)}
            | {"marker": marker, "hoverinfo": "skip", "cliponaxis": False}
        )
    layout = base_layout("layer", "", height=90 + 30 * len(search.blocks))
    layout["xaxis"] |= {"dtick": 1, "showgrid": False, "range": [-0.5, len(layers) - 0.5]}
    layout["yaxis"] |= {"range": [len(search.blocks) - 0.5, -0.5], "type": "category"}
    layout["yaxis"]["showgrid"] = False
    budget = search.epochs[-1]["targets"][target]["budget_ms"]
    caption = f"Probability of each block in each layer, softmax(theta), target {ms(budget)}."
    if len(data) > 1:
        caption += " Dots mark the architecture drawn above."
    label = f"Heatmap of softmax(theta), layers by blocks, for the target of {ms(budget)}"
    steps = tuple(str(search.epochs[i]["epoch"]) for i in kept)
    return Figure(f"theta-{target}", label, caption, data, layout, frames, steps)


def kept_epochs(search: Search) -> list[int]:
    """Return the positions of the epochs whose theta the page shows, first and last among them."""
    most = min(MAX_FRAMES, MAX_FRAMES_IN_ALL // len(search.epochs[-1]["targets"]))
    return _thinned(len(search.epochs), max(most, 2))


def predicted_against_measured(run: Run) -> Figure | None:
    """Whole networks: what the table predicts against what the device measures, both in ms."""
    candidates = run.result.get("candidates") or []
    networks = (run.result.get("calibration") or {}).get("networks") or []
    final = (run.result.get("predicted_latency_ms"), run.result.get("latency_ms"))
    data: list[dict[str, Any]] = []
    if networks:
        raw = [n["predicted_ms"] for n in networks]
        y = [n["measured_ms"] for n in networks]
        data.append(
            _points("plain sum of the table", raw, y, colour="var(--muted)", symbol="circle-open")
        )
        for held_out, name, symbol in (
            (False, "corrected, used for the fit", "circle"),
            (True, "corrected, held out", "diamond"),
        ):
            some = [n for n in networks if bool(n["held_out"]) is held_out]
            if some:
                x, y = [n["corrected_ms"] for n in some], [n["measured_ms"] for n in some]
                data.append(_points(name, x, y, colour=SERIES[0], symbol=symbol))
    if candidates:
        data.append(_candidates(candidates))
    if not data:
        return None
    if final[0] is not None and final[1] is not None:
        data.append(
            _points(
                "final file",
                [final[0]],
                [final[1]["value"]],
                colour="var(--mark)",
                symbol="star",
                size=15,
            )
        )
    noise = run.noise_floor
    caption = "On the diagonal the prediction is exact; whiskers are the spread of the measurement."
    if noise is not None:
        caption += f" The band is the noise floor, ±{percent(noise)} between test and retest."
    if run.result.get("network", "train") != "train":
        caption += " The final file was compressed: the prediction is of the network before."
    label = (
        f"Predicted against measured latency of {len(networks) + len(candidates)} whole networks"
    )
    return _against(data, noise, label, caption)


def runs_predicted_against_measured(runs: Sequence[Run]) -> Figure | None:
    """The candidates and final files of several runs, a colour each."""
    data: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        colour = SERIES[i % len(SERIES)]
        candidates = run.result.get("candidates") or []
        if candidates:
            data.append(_candidates(candidates, colour, f"{run.name}, candidates"))
        predicted, latency = run.result.get("predicted_latency_ms"), run.result.get("latency_ms")
        if predicted is not None and latency:
            name = f"{run.name}, final file"
            x, y = [predicted], [latency["value"]]
            data.append(_points(name, x, y, colour=colour, symbol="star", size=15))
    if not data:
        return None
    noise = max((run.noise_floor for run in runs if run.noise_floor is not None), default=None)
    caption = "On the diagonal the prediction is exact; whiskers are the spread of the measurement."
    if noise is not None:
        caption += f" The band is the largest noise floor of the runs, ±{percent(noise)}."
    caption += " A final file may be compressed: the prediction is of the network before."
    label = f"Predicted against measured latency of {len(runs)} runs"
    return _against(data, noise, label, caption)


def table_heatmap(table: Table, number: int) -> Figure:
    """A latency table's blocks by layer shapes, in ms, as measured (no correction applied)."""
    rows = [row for row in table.rows if row.block not in PSEUDO_BLOCKS]
    shapes: list[Shape] = sorted(dict.fromkeys(row.shape for row in rows), key=_from_stem_to_head)
    blocks = list(dict.fromkeys(row.block for row in rows))
    cells = {(row.block, row.shape): row for row in rows}
    found = [[cells.get((block, shape)) for shape in shapes] for block in blocks]
    z = [[row.latency_ms if row else None for row in line] for line in found]
    spread = [[_hover(row) if row else "not offered" for row in line] for line in found]
    precision, runtime = table.header.get("precision", "?"), table.header.get("runtime", "?")
    caption = (
        f"Latency of every block at every layer shape: {table.path.name}, {runtime}, {precision}."
    )
    heat = {"customdata": spread, "hovertemplate": "%{y}, %{x}<br>%{customdata}<extra></extra>"}
    data, layout = _latency_cells(z, [_tick(s) for s in shapes], blocks, heat)
    label = f"Heatmap of {len(blocks)} blocks by {len(shapes)} layer shapes in milliseconds"
    return Figure(f"table-{number}", label, caption, data, layout)


def layer_heatmap(search: Search, target: int) -> Figure:
    """The latency tensor of a target, blocks by layers, where the table's file is out of reach."""
    latency_ms = search.targets[target].latency_ms
    z = _transposed(latency_ms, places=6)
    heat = {"hovertemplate": "%{y}, layer %{x}: %{z:.4f} ms<extra></extra>"}
    layers = [str(i) for i in range(len(latency_ms))]
    data, layout = _latency_cells(z, layers, list(search.blocks), heat)
    layout["xaxis"] |= {"title": {"text": "layer"}, "tickangle": 0}
    name = search.targets[target].table
    caption = f"Latency of every block in every layer, as the search read it from {name}."
    return Figure(f"table-{target}", "Heatmap of blocks by layers in ms", caption, data, layout)


def _latency_cells(
    z: Matrix, columns: list[str], blocks: list[str], more: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    text = [["" if v is None else digits(v, 2) for v in line] for line in z]
    trace = {"type": "heatmap", "z": z, "x": columns, "y": blocks, "text": text, "zmin": 0}
    trace |= {"texttemplate": "%{text}", "textfont": {"size": 10}, "hoverongaps": False}
    layout = base_layout("", "", height=130 + 30 * len(blocks))
    layout["xaxis"] |= {"type": "category", "showgrid": False, "tickangle": -40}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "type": "category"}
    return [trace | _heat("ms") | more], layout


def _against(data: list[dict[str, Any]], noise: float | None, label: str, caption: str) -> Figure:
    """Lay the points on equal axes, over the diagonal and the band of noise."""
    every = [v for trace in data for v in (*trace["x"], *trace["y"])]
    low, high = 0.95 * min(every), 1.05 * max(every)
    layout = base_layout("predicted (ms)", "measured (ms)", height=560)
    layout["xaxis"]["range"] = layout["yaxis"]["range"] = [low, high]
    data = [*_diagonal(low, high, noise), *data]
    return Figure("predicted-measured", label, caption, data, layout)


def _candidates(
    candidates: Rows, colour: str = SERIES[1], name: str = "candidates"
) -> dict[str, Any]:
    x = [c["predicted_latency_ms"] for c in candidates]
    y = [c["latency_ms"]["value"] for c in candidates]
    trace = _points(name, x, y, colour=colour, symbol="square")
    above = [c["latency_ms"]["high"] - c["latency_ms"]["value"] for c in candidates]
    below = [c["latency_ms"]["value"] - c["latency_ms"]["low"] for c in candidates]
    bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    trace["error_y"] = bars | {"thickness": 1, "width": 3, "color": colour}
    trace["text"] = [wrapped(c["architecture"]) for c in candidates]
    trace["hovertemplate"] = "predicted %{x:.4g} ms, measured %{y:.4g} ms<br>%{text}<extra></extra>"
    return trace


def _diagonal(low: float, high: float, noise: float | None) -> list[dict[str, Any]]:
    line = {"color": "var(--muted)", "width": 1}
    common: dict[str, Any] = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    diagonal = common | {"name": "exact", "x": [low, high], "y": [low, high], "line": line}
    if noise is None:
        return [diagonal]
    y = [low * (1 - noise), high * (1 - noise), high * (1 + noise), low * (1 + noise)]
    band = common | {"name": f"noise ±{percent(noise)}", "x": [low, high, high, low], "y": y}
    return [band | {"fill": "toself", "fillcolor": "var(--band)", "line": {"width": 0}}, diagonal]


def _points(
    name: str, x: list[float], y: list[float], *, colour: str, symbol: str, size: int = 8
) -> dict[str, Any]:
    hover = "predicted %{x:.4g} ms, measured %{y:.4g} ms<extra></extra>"
    marker = {"color": colour, "symbol": symbol, "size": size}
    trace = {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker}
    return trace | {"hovertemplate": hover, "cliponaxis": False}


def base_layout(x_title: str, y_title: str, *, height: int) -> dict[str, Any]:
    """Return the layout that all figures share: quiet axes, transparent ground, legend on top."""
    axis: dict[str, Any] = {
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
    }
    return {
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "var(--sans)", "size": 12, "color": "var(--soft)"},
        "hoverlabel": {"font": {"family": "var(--sans)", "size": 12}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": axis | {"title": {"text": x_title, "standoff": 8}},
        "yaxis": axis | {"title": {"text": y_title, "standoff": 8}},
    }


def _heat(unit: str) -> dict[str, Any]:
    bar = {"title": {"text": unit}, "thickness": 12, "outlinewidth": 0}
    return {"colorscale": SCALE, "xgap": 2, "ygap": 2, "colorbar": bar}


def _thinned(count: int, most: int) -> list[int]:
    """Return at most `most` positions of `count`, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _transposed(matrix: Matrix, *, places: int = 3) -> Matrix:
    columns = zip(*matrix, strict=True)
    return [[None if v is None else round(v, places) for v in column] for column in columns]


def _from_stem_to_head(shape: Shape) -> tuple[int, int, int, int]:
    in_channels, out_channels, stride, height, _ = shape
    return (-height, in_channels, out_channels, stride)


def _tick(shape: Shape) -> str:
    return describe(shape).replace(", stride 1,", ",").replace("stride ", "s").replace(" → ", "→")


def _hover(row: Any) -> str:
    if not row.samples:
        return f"{ms(row.latency_ms)} (identity, not measured)"
    spread = f"{digits(row.low_ms)} to {ms(row.high_ms)}"
    return f"{ms(row.latency_ms)} ({spread}, {row.samples}{THIN}samples)"


def wrapped(blocks: Sequence[str], width: int = 6) -> str:
    """Return block names in lines of `width`, as a hover shows them."""
    return "<br>".join(" ".join(blocks[i : i + width]) for i in range(0, len(blocks), width))
