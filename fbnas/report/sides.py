"""Several runs side by side: the parts of their page, and what its opening sentence says."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from fbnas.report.blocks import block_comparisons
from fbnas.report.curves import validation_curves
from fbnas.report.devices import device_name, measured_matrix
from fbnas.report.drawing import draw
from fbnas.report.figures import runs_predicted_against_measured
from fbnas.report.front import measured_front
from fbnas.report.given import Given
from fbnas.report.markup import number, table
from fbnas.report.run import Run
from fbnas.report.sections import VERDICT_MARKS, Section, commands, devices_section
from fbnas.report.summary import joined, verdict
from fbnas.report.waterfall import stage_bars
from fbnas.report.words import DASH, duration, ms, percent, scaled

UNTOLD = ("command_line", "out", "overwrite", "resume")  # options that say nothing of a network


def named_apart(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with names of which no two are equal."""
    count = Counter(run.name for run in runs)
    return [replace(run, label=str(run.folder)) if count[run.name] > 1 else run for run in runs]


def comparison(runs: Sequence[Run]) -> str:
    """Say in one sentence which run is the fastest and which the most accurate."""
    timed = [run for run in runs if run.result.get("latency_ms")]
    sure = [run for run in runs if run.result.get("accuracy_top1") is not None]
    parts = []
    fastest = min(timed, key=lambda run: run.result["latency_ms"]["value"]) if timed else None
    best = max(sure, key=lambda run: run.result["accuracy_top1"]) if sure else None
    if fastest:
        latency = ms(fastest.result["latency_ms"]["value"])
        parts.append(f"{fastest.name} is the fastest with {latency}")
    if best:
        who = "it" if best is fastest else best.name
        accuracy = percent(best.result["accuracy_top1"])
        parts.append(f"{who} is the most accurate with {accuracy} top-1")
    met = [run for run in timed if verdict(run).kind in ("met", "close")]
    judged = [run for run in timed if verdict(run).kind != "open"]
    if judged:
        parts.append(f"{len(met)} of {len(judged)} met the budget")
    return f"Of {len(runs)} runs {joined(parts)}." if parts else f"{len(runs)} runs side by side."


def side_by_side(runs: Sequence[Run], given: Given, out: Path) -> list[Section]:
    """Return the parts for which the folders, or what was given, hold something."""
    parts = (
        _runs(runs, out),
        _front(runs, given),
        _stages(runs),
        _architectures(runs),
        _latency(runs),
        devices_section([measured_matrix(runs), given.cross_device]),
        _training(runs),
        _tables(runs),
        _environment(runs),
    )
    return [part for part in parts if part is not None]


def _runs(runs: Sequence[Run], out: Path) -> Section:
    columns = (
        *("Run", "Asked", "Predicted", "Measured", "Accuracy", "Size"),
        *("Parameters", "Multiply-adds", "Time", "Verdict"),
    )
    rows = [_row(run, out) for run in runs]
    html = table("runs-table", "What every folder came to.", columns, rows)
    return Section("runs", "The runs", html)


def _row(run: Run, out: Path) -> str:
    result, judged = run.result, verdict(run)
    latency, seconds = result.get("latency_ms"), result.get("seconds")
    page = run.folder / "report.html"
    name = escape(run.name)
    if page.is_file():
        name = f'<a href="{escape(os.path.relpath(page, out))}">{name}</a>'
    spread = f"<small>{ms(latency['low'])} to {ms(latency['high'])}</small>" if latency else ""
    cells = (
        ms(run.target_ms),
        ms(None if run.has_several_targets else result.get("predicted_latency_ms")),
        f"{ms(latency['value'] if latency else None)}{spread}",
        percent(result.get("accuracy_top1")),
        scaled(result.get("model_bytes"), "B"),
        scaled(result.get("params")),
        scaled(result.get("macs")),
        DASH if seconds is None else duration(seconds),
    )
    mark = VERDICT_MARKS.get(judged.kind, "")
    kind = {"open": "soft", "missed": "no"}.get(judged.kind, "yes")
    words = f'<span aria-hidden="true">{mark}</span> {judged.words or DASH}'
    known = "".join(map(number, cells))
    return f'<tr><th scope=row>{name}</th>{known}<td class="{kind} words">{words}</td></tr>'


def _front(runs: Sequence[Run], given: Given) -> Section | None:
    found = measured_front(runs, given.baselines)
    if found is None:
        return None
    plot, below = found
    return Section("front", "Accuracy against latency", "", (plot,), (), below)


def _stages(runs: Sequence[Run]) -> Section | None:
    plots = stage_bars(runs)
    return Section("stages", "From network to file", "", (), plots) if plots else None


def _architectures(runs: Sequence[Run]) -> Section | None:
    drawn = [run for run in runs if run.choice and run.space]
    html = "".join(
        f"<h3>{escape(run.name)}</h3>{draw(run, f'layers-{i}', explained=run is drawn[-1])}"
        for i, run in enumerate(drawn)
    )
    return Section("architectures", "The architectures", html) if html else None


def _latency(runs: Sequence[Run]) -> Section | None:
    figure = runs_predicted_against_measured(runs)
    return Section("latency", "Predicted against measured", "", (figure,)) if figure else None


def _training(runs: Sequence[Run]) -> Section | None:
    if not any("train" in run.training for run in runs):
        return None
    return Section("training", "Training", "", (), validation_curves(runs))


def _tables(runs: Sequence[Run]) -> Section | None:
    every = {
        (t.header.get("runtime"), t.header.get("precision"), t.header.get("space")): t
        for run in runs
        for t in run.tables
    }
    plots = block_comparisons(list(every.values()))
    return Section("table", "What blocks cost", "", (), plots) if plots else None


def _environment(runs: Sequence[Run]) -> Section:
    told = [{"device": device_name(run), **_flat(run.config)} for run in runs]
    keys = [key for key in dict.fromkeys(k for each in told for k in each) if key not in UNTOLD]
    differ = [key for key in keys if len({repr(each.get(key)) for each in told}) > 1]
    rows = [
        f"<tr><th scope=row>{escape(key)}</th>"
        + "".join(f"<td>{escape(str(each.get(key, DASH)))}</td>" for each in told)
        + "</tr>"
        for key in differ
    ]
    columns = ("Option", *(escape(run.name) for run in runs))
    caption = "What the runs were told differently." if rows else "All options are equal."
    html = commands(runs) + table("differences", caption, columns, rows)
    return Section("environment", "Environment", html)


def _flat(options: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Options by dotted name: search.epochs."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat
