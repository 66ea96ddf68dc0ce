"""The stages of a run as waterfalls: what each did to latency, bytes and accuracy."""

from collections.abc import Callable, Sequence
from typing import Any

from fbnas.report.figures import SERIES, Figure, base_layout
from fbnas.report.run import Run
from fbnas.report.words import THIN, ms, percent, scaled, signed

Stages = Sequence[dict[str, Any]]
ROW = 52  # pixels


def waterfalls(stages: Stages) -> tuple[Figure, ...]:
    """Return a figure each for latency, bytes and accuracy, where at least two stages have it.

    A stage's bar leads from the best stage before it, on which it was built, to what it came to;
    a rejected one goes nowhere.
    """
    figures = []
    for name, title, value, write in _KINDS:
        known = [stage for stage in stages if value(stage) is not None]
        if len(known) > 1 and known[0] is stages[0]:
            figures.append(_waterfall(name, title, known, value, write))
    return tuple(figures)


def stage_bars(runs: Sequence[Run]) -> tuple[Figure, ...]:
    """Return the stages of several runs beside one another: latency, bytes and accuracy.

    A run has the colour of its place among `runs`; those without stages are left out.
    """
    figures = []
    for name, title, value, write in _KINDS:
        data = []
        for i, run in enumerate(runs):
            known = [s for s in run.result.get("stages") or () if value(s) is not None]
            if not known:
                continue
            y = [str(s["name"]) for s in known]
            kept = [s["accepted"] for s in known]
            x = [value(s) for s in known]
            text = [write(v) for v in x if v is not None]
            trace: dict[str, Any] = {"name": run.name, "x": x, "y": y, "text": text}
            trace |= {"marker": {"color": SERIES[i % len(SERIES)]}}
            trace |= {"hovertemplate": "%{y}: %{text}"}
            if name == "accuracy":
                trace |= {"type": "scatter", "mode": "markers", "cliponaxis": False}
                trace["marker"] |= {"size": 11, "symbol": ["circle" if k else "x" for k in kept]}
            else:
                trace |= {"type": "bar", "orientation": "h", "textposition": "outside"}
                shapes = ["" if k else "/" for k in kept]
                trace["marker"]["pattern"] = {"shape": shapes, "solidity": 0.4}
                trace["cliponaxis"] = False
            data.append(trace)
        rows = {y for trace in data for y in trace["y"]}
        if not rows:
            continue
        height = 110 + len(rows) * max(40, 22 * len(runs))
        layout = base_layout(title, "", height=height) | {"showlegend": True}
        layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
        layout["xaxis"]["nticks"] = 5
        layout["margin"]["r"] = 60
        if name == "accuracy":
            layout["xaxis"]["tickformat"] = ".1%"
        mark = "crossed" if name == "accuracy" else "hatched"
        caption = f"{title[0].upper()}{title[1:]} by stage, of every run; {mark}: rejected."
        figures.append(Figure(f"stages-{name}", caption, caption, data, layout))
    return tuple(figures)


def _waterfall(
    name: str,
    title: str,
    stages: Stages,
    value: Callable[[dict[str, Any]], float | None],
    write: Callable[[float], str],
) -> Figure:
    rows: list[tuple[dict[str, Any], float | None, float]] = []
    before: float | None = None
    for stage in stages:
        at = value(stage)
        assert at is not None
        rows.append((stage, before, at))
        before = at if stage["accepted"] or before is None else before
    assert before is not None
    y = [str(stage["name"]) for stage in stages] + ["final file"]
    start = rows[0][2]
    share = name != "accuracy"  # a change is a share of what was, or points of accuracy
    bases = [0.0 if was is None and share else was or at for _, was, at in rows]
    bases.append(0.0 if share else before)
    ends = [*(at for *_, at in rows), before]
    texts = [write(start)]
    texts += [f"{write(at)}  {_change(was, at, share)}" for _, was, at in rows[1:] if was]
    texts.append(f"{write(before)}  {_change(start, before, share)}")
    colours = [_colour(stage, was, at, share) for stage, was, at in rows] + [SERIES[0]]
    data: list[dict[str, Any]] = []
    if share:
        lengths = [end - base for base, end in zip(bases, ends, strict=True)]
        shapes = ["/" if not s["accepted"] else "" for s in stages] + [""]
        marker = {"color": colours, "pattern": {"shape": shapes, "solidity": 0.4}}
        data.append(
            {"type": "bar", "orientation": "h", "y": y, "base": bases, "x": lengths}
            | {"marker": marker, "hoverinfo": "skip", "width": 0.4}
        )
    else:
        for row, base, end, colour in zip(y, bases, ends, colours, strict=True):
            line = {"color": colour, "width": 4}
            data.append(
                {"type": "scatter", "mode": "lines", "x": [base, end], "y": [row, row]}
                | {"line": line, "hoverinfo": "skip"}
            )
        symbols = ["circle" if s["accepted"] else "x" for s in stages] + ["star"]
        dots: dict[str, Any] = {"color": colours, "symbol": symbols, "size": 11}
        data.append(
            {"type": "scatter", "mode": "markers", "x": ends, "y": y}
            | {"marker": dots, "hoverinfo": "skip", "cliponaxis": False}
        )
    layout = base_layout(title, "", height=70 + ROW * len(y)) | {"showlegend": False}
    low, high = min(*bases, *ends), max(*bases, *ends)
    room = 0.06 * (high - low) or 0.01
    layout["xaxis"]["range"] = [0 if share else low - room, high + room]
    layout["xaxis"]["nticks"] = 5
    if not share:
        layout["xaxis"]["tickformat"] = ".1%"
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    layout["margin"] |= {"t": 16, "r": 24}
    layout["annotations"] = [
        _text(row, text, low if not share else 0) for row, text in zip(y, texts, strict=True)
    ]
    said = "; ".join(f"{row}: {text}" for row, text in zip(y, texts, strict=True))
    caption = f"{title[0].upper()}{title[1:]} by stage, each from the best before it."
    return Figure(f"stages-{name}", f"{caption} {said}", caption, data, layout)


def _text(row: str, text: str, x: float) -> dict[str, Any]:
    """A line of text above a bar."""
    place = {"x": x, "y": row, "xanchor": "left", "yanchor": "bottom", "yshift": 11}
    return place | {"text": text, "showarrow": False, "font": {"size": 11.5}}


def _change(was: float, at: float, share: bool) -> str:
    if share:
        return f"{signed(100 * (at / was - 1), 0)}{THIN}%"
    return f"{signed(100 * (at - was))}{THIN}points"


def _colour(stage: dict[str, Any], was: float | None, at: float, share: bool) -> str:
    if was is None:
        return SERIES[0]
    if not stage["accepted"]:
        return "var(--muted)"
    better = at <= was if share else at >= was
    return "var(--good)" if better else "var(--bad)"


def _latency(stage: dict[str, Any]) -> float | None:
    latency = stage.get("latency_ms")
    return latency["value"] if latency else None


def _kilobytes(stage: dict[str, Any]) -> float | None:
    size = stage.get("model_bytes")
    return None if size is None else size / 1000


_KINDS: tuple[tuple[str, str, Callable[[Any], float | None], Callable[[float], str]], ...] = (
    ("latency", "latency (ms)", _latency, ms),
    ("bytes", "size of the file (kB)", _kilobytes, lambda v: scaled(1000 * v, "B")),
    ("accuracy", "test accuracy", lambda stage: stage.get("accuracy_top1"), percent),
)
