"""What changes by epoch: the search's and the training's curves."""

from collections.abc import Sequence
from typing import Any

from fbnas.report.figures import SERIES, Figure, base_layout
from fbnas.report.run import Rows, Run, Search
from fbnas.report.words import ms, percent

Trace = dict[str, Any]
FEW = 15  # up to so many epochs every one has its tick


def expected_latency(search: Search) -> Figure:
    """E[LAT] of every target against its budget, by epoch."""
    rows, x = search.epochs, _epochs(search.epochs)
    data: list[Trace] = []
    label = []
    for i, last in enumerate(rows[-1]["targets"]):
        colour, budget = SERIES[i % len(SERIES)], last["budget_ms"]
        name = f"E[LAT] for {ms(budget)}"
        y = [row["targets"][i]["expected_latency_ms"] for row in rows]
        data.append(_line(name, x, y, colour, unit=" ms"))
        label.append(f"expected latency ends at {ms(y[-1])} for a target of {ms(budget)}")
        if budget is None:  # the search had other budgets
            continue
        dashed = {"color": colour, "dash": "dash", "width": 1.5}
        data.append(
            {"type": "scatter", "mode": "lines", "name": f"target {ms(budget)}", "line": dashed}
            | {"x": [x[0], x[-1]], "y": [budget, budget], "hoverinfo": "skip"}
        )
    caption = "Expected latency of theta, base + Σ softmax(theta) · latency, against the target."
    if rows[0]["phase"] == "warmup":
        caption += " Shaded: the warm-up, in which theta sleeps."
    layout = _by_epoch(rows, "expected latency (ms)", height=330) | _warmup(rows)
    return Figure("expected-latency", "; ".join(label), caption, data, layout)


def search_curves(search: Search) -> list[Figure]:
    """Losses, accuracies, entropy of theta and expected skips, by epoch."""
    layers = len(search.epochs[-1]["targets"][0]["logits"])
    return [
        _search_figure(search, "search-loss", "cross-entropy", _shares(search, "loss")),
        _search_figure(search, "search-accuracy", "accuracy", _shares(search, "accuracy")),
        _search_figure(
            search, "entropy", "entropy of theta (nats per layer)", _by_target(search, "entropy")
        ),
        _search_figure(
            search, "skips", f"expected skips, of {layers} layers", _by_target(search, "skips")
        ),
    ]


def training_curves(part: str, rows: Rows) -> list[Figure]:
    """Loss and accuracy of one training by epoch; the epoch that was kept is marked."""
    what = "training" if part == "train" else f"fine-tuning of {part}"
    best = max(rows, key=lambda row: row["validation_accuracy"])
    kept = (
        f"Kept: epoch {best['epoch']}, {percent(best['validation_accuracy'])} on validation images."
    )
    figures = []
    for key, title in (("loss", "cross-entropy"), ("accuracy", "accuracy")):
        data = [
            _line("training", _epochs(rows), [row[key] for row in rows], SERIES[0]),
            _line(
                "validation", _epochs(rows), [row[f"validation_{key}"] for row in rows], SERIES[1]
            ),
            {"type": "scatter", "mode": "markers", "name": "kept", "x": [best["epoch"]]}
            | {"y": [best[f"validation_{key}"]], "hoverinfo": "skip", "cliponaxis": False}
            | {"marker": {"symbol": "star", "size": 12, "color": SERIES[1]}},
        ]
        caption = f"{title.capitalize()} of {what}. {kept}"
        layout = _by_epoch(rows, title)
        figures.append(Figure(f"{part}-{key}", caption, caption, data, layout))
    return figures


def validation_curves(runs: Sequence[Run]) -> tuple[Figure, ...]:
    """Validation accuracy and loss by epoch of those of the runs that were trained."""
    figures = []
    for key, title in (("accuracy", "accuracy"), ("loss", "cross-entropy")):
        data = [
            _line(
                run.name,
                _epochs(run.training["train"]),
                [row[f"validation_{key}"] for row in run.training["train"]],
                SERIES[i % len(SERIES)],
            )
            for i, run in enumerate(runs)
            if "train" in run.training
        ]
        longest = max((run.training.get("train", []) for run in runs), key=len)
        caption = f"{title.capitalize()} on validation images, as the networks were trained."
        figures.append(Figure(f"train-{key}", caption, caption, data, _by_epoch(longest, title)))
    return tuple(figures)


def _search_figure(search: Search, name: str, title: str, data: list[Trace]) -> Figure:
    captions = {
        "search-loss": "Cross-entropy of the supernet, on the weights' and on theta's images.",
        "search-accuracy": "Accuracy of the supernet, on the weights' and on theta's images.",
        "entropy": "High while theta is undecided, 0 when every layer has settled on one block.",
        "skips": "Skips cost nothing and train for free: a steep rise here is a collapse.",
    }
    layout = _by_epoch(search.epochs, title) | _warmup(search.epochs)
    return Figure(name, f"{title} by epoch of the search", captions[name], data, layout)


def _shares(search: Search, key: str) -> list[Trace]:
    rows = search.epochs
    return [
        _line(part, _epochs(rows), [row.get(f"{part}_{key}") for row in rows], colour)
        for part, colour in (("weights", SERIES[0]), ("theta", SERIES[1]))
    ]


def _by_target(search: Search, key: str) -> list[Trace]:
    rows = search.epochs
    traces = []
    for i, last in enumerate(rows[-1]["targets"]):
        y = [row["targets"][i][key] for row in rows]
        name = f"target {ms(last['budget_ms'])}"
        traces.append(_line(name, _epochs(rows), y, SERIES[i % len(SERIES)]))
    return traces


def _line(name: str, x: list[int], y: list[Any], colour: str, *, unit: str = "") -> Trace:
    mode = "lines+markers" if len(x) <= 2 * FEW else "lines"
    trace = {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y}
    hover = f"epoch %{{x}}: %{{y:.4g}}{unit}<extra>{name}</extra>"
    return trace | {"line": {"color": colour, "width": 2}, "hovertemplate": hover}


def _by_epoch(rows: Rows, y_title: str, *, height: int = 290) -> dict[str, Any]:
    layout = base_layout("epoch", y_title, height=height) | {"showlegend": True}
    layout["xaxis"] |= {"dtick": 1} if len(rows) <= FEW else {"tickformat": "d"}
    if y_title == "accuracy":
        layout["yaxis"]["tickformat"] = ".0%"
    return layout


def _warmup(rows: Rows) -> dict[str, Any]:
    """Shade the epochs in which theta slept."""
    asleep = [row["epoch"] for row in rows if row["phase"] == "warmup"]
    if not asleep:
        return {}
    place = {"x0": asleep[0] - 0.5, "x1": asleep[-1] + 0.5, "y0": 0, "y1": 1, "yref": "paper"}
    look = {"type": "rect", "fillcolor": "var(--shade)", "line": {"width": 0}, "layer": "below"}
    return {"shapes": [place | look]}


def _epochs(rows: Rows) -> list[int]:
    return [row["epoch"] for row in rows]
