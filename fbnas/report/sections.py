"""The parts of the page in their order; a part that the folder knows nothing of is left out."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import yaml

from fbnas.report import curves, figures
from fbnas.report.blocks import block_comparisons
from fbnas.report.devices import Matrix, matrix_figure, matrix_table, predicted_matrix
from fbnas.report.drawing import draw
from fbnas.report.figures import Figure
from fbnas.report.front import judged_front, measured_front
from fbnas.report.given import Given
from fbnas.report.history import history
from fbnas.report.markup import details, facts, note, number, table
from fbnas.report.run import Run
from fbnas.report.summary import verdict
from fbnas.report.waterfall import waterfalls
from fbnas.report.words import DASH, THIN, TIMES, digits, ms, percent, scaled, signed

VERDICT_MARKS = {"met": "✓", "close": "✓", "missed": "✗"}


@dataclass(frozen=True)
class Section:
    """A headed part of the page: HTML, wide figures, figures in pairs, more HTML."""

    name: str
    title: str
    html: str
    figures: tuple[Figure, ...] = ()
    pairs: tuple[Figure, ...] = ()
    below: str = ""


def sections(run: Run, given: Given) -> list[Section]:
    """Return the parts for which the folder, or what was given, holds something."""
    parts = (
        _stages(run),
        _front(run, given),
        _architecture(run),
        _theta(run),
        _search(run),
        _latency(run),
        devices_section([predicted_matrix(run), given.cross_device]),
        _training(run),
        _table(run),
        _environment(run),
    )
    return [part for part in parts if part is not None]


def opening(run: Run) -> str:
    """Return the verdict as a line of HTML, or nothing where no budget was judged."""
    judged = verdict(run)
    mark = VERDICT_MARKS.get(judged.kind)
    if mark is None:
        return ""
    return f'<p class="verdict {judged.kind}"><b aria-hidden="true">{mark}</b> {judged.words}</p>'


def _stages(run: Run) -> Section | None:
    stages: list[dict[str, Any]] = run.result.get("stages") or []
    if not stages:
        return None
    ends = [s["latency_ms"]["high"] for s in stages if s.get("latency_ms")]
    widest = 1.05 * max([*ends, run.target_ms or 0.0, 1e-9])
    accepted = [s for s in stages if s["accepted"]]
    final = accepted[-1] if accepted else None
    rows = []
    for stage in stages:
        bar = _bar(stage["latency_ms"], widest, run.target_ms) if stage.get("latency_ms") else ""
        rows.append(_stage_row(stage, stages[0], bar=bar, final=stage is final))
    columns = ("Stage", "Accuracy", "Latency", "Size", "Parameters", "Multiply-adds", "Verdict")
    caption = (
        "Every stage of the chain, measured on the device. The bar is the latency, its strong end "
        "the spread, the tick the target."
    )
    html = table("stage-table", caption, columns, rows)
    return Section("stages", "From network to file", html, (), waterfalls(stages))


def _front(run: Run, given: Given) -> Section | None:
    measured = measured_front([run], given.baselines)
    found = [*([measured] if measured else []), *judged_front(run)]
    if not found:
        return None
    plots, tables = zip(*found, strict=True)
    return Section("front", "Accuracy against latency", "", plots, (), "".join(tables))


def devices_section(matrices: Sequence[Matrix | None]) -> Section | None:
    """Return the cross-device matrices that are known."""
    known = [matrix for matrix in matrices if matrix is not None]
    if not known:
        return None
    plots = tuple(matrix_figure(matrix, i) for i, matrix in enumerate(known))
    tables = "".join(matrix_table(matrix, i) for i, matrix in enumerate(known))
    return Section("devices", "One device's network on another", "", plots, (), tables)


def _stage_row(stage: dict[str, Any], first: dict[str, Any], *, bar: str, final: bool) -> str:
    latency, start = stage.get("latency_ms"), first.get("latency_ms")
    accuracy, before = stage.get("accuracy_top1"), first.get("accuracy_top1")
    gain = speed = spread = ""
    if stage is not first and accuracy is not None and before is not None:
        gain = note(f"{signed(100 * (accuracy - before))}{THIN}points")
    if stage is not first and latency and start:
        speed = note(f"{digits(start['value'] / latency['value'])}{TIMES} as fast")
    if latency:
        spread = note(f"{digits(latency['low'])} to {digits(latency['high'])}")
    cells = (
        f"{percent(accuracy)}{gain}",
        f"{ms(latency['value'] if latency else None)}{spread}{speed}{bar}",
        scaled(stage.get("model_bytes"), "B"),
        scaled(stage.get("params")),
        scaled(stage.get("macs")),
    )
    kind, mark, word = ("yes", "✓", "accepted") if stage["accepted"] else ("no", "✗", "rejected")
    word += ", final file" if final else ""
    reason = note(escape(str(stage.get("reason") or "")))
    return (
        f"<tr{' class=final' if final else ''}><th scope=row>{escape(str(stage['name']))}</th>"
        f"{''.join(number(cell) for cell in cells)}"
        f'<td class="{kind} words"><span aria-hidden="true">{mark}</span> {word}{reason}</td></tr>'
    )


def _bar(latency: dict[str, Any], widest: float, target: float | None) -> str:
    """Draw a latency, its spread and the target on a common scale from 0."""
    value, low, high = (100 * latency[key] / widest for key in ("value", "low", "high"))
    tick = f'<i class="tick" style="left:{100 * target / widest:.2f}%"></i>' if target else ""
    spread = f"left:{low:.2f}%;width:{max(high - low, 0.5):.2f}%"
    return (
        f'<span class="bar" aria-hidden="true"><i class="fill" style="width:{value:.2f}%"></i>'
        f'<i class="spread" style="{spread}"></i>{tick}</span>'
    )


def _architecture(run: Run) -> Section | None:
    if run.choice is None or run.space is None:
        return None
    return Section("architecture", "The architecture", draw(run))


def _theta(run: Run) -> Section | None:
    if run.search is None:
        return None
    targets = run.search.epochs[-1]["targets"]
    kept = figures.kept_epochs(run.search)
    plots, histories = [], []
    for i, target in enumerate(targets):
        chosen = run.choice.blocks if run.choice and i == run.target_index else ()
        plots.append(figures.theta(run.search, i, chosen))
        shown = history(run.search, i, kept, run.space)
        histories.append(
            f"<h3>Layer by layer</h3>{shown}"
            if i == run.target_index
            else details(f"Layer by layer for the target of {ms(target['budget_ms'])}", shown)
        )
    return Section(
        "theta", "Theta over time", _slider(plots[0].steps), tuple(plots), (), "".join(histories)
    )


def _slider(steps: tuple[str, ...]) -> str:
    """Return the control that moves every theta figure; a native one, so the keyboard works."""
    last = len(steps) - 1
    return (
        '<div class="slider"><label for="epoch">Epoch</label><input id="epoch" type="range" '
        f'min="0" max="{last}" value="{last}" step="1" data-steps="{",".join(steps)}" '
        f'aria-valuetext="epoch {steps[-1]}"><output for="epoch">{steps[-1]}</output></div>'
    )


def _search(run: Run) -> Section | None:
    if run.search is None:
        return None
    rows = []
    for target in run.search.epochs[-1]["targets"]:
        budget_ms = target["budget_ms"]  # None: the search had other budgets
        off = 100 * (target["expected_latency_ms"] / budget_ms - 1) if budget_ms else None
        cells = (
            ms(budget_ms),
            ms(target["expected_latency_ms"]),
            DASH if off is None else f"{signed(off)}{THIN}%",
            f"{target['entropy']:.2f}",
            f"{target['skips']:.2f}",
        )
        rows.append(f"<tr>{''.join(number(cell) for cell in cells)}</tr>")
    columns = ("Target", "E[LAT]", "Off target", "Entropy (nats)", "Expected skips")
    done = bool(run.search.targets)  # theta.json is written at the end
    caption = "Where the search ended." if done else "Where the unfinished search stands."
    ends = table("target-table", caption, columns, rows)
    plots = (curves.expected_latency(run.search),)
    return Section("search", "The search", ends, plots, tuple(curves.search_curves(run.search)))


def _latency(run: Run) -> Section | None:
    figure = figures.predicted_against_measured(run)
    if figure is None:
        return None
    html = _correction(run.result.get("calibration") or {})
    candidates = run.result.get("candidates") or []
    if candidates:
        rows = [_candidate_row(candidate) for candidate in candidates]
        columns = ("Predicted", "Measured", "Spread (ms)", "Architecture")
        caption = "Networks measured before training."
        content = table("candidates", caption, columns, rows)
        html += details("The candidates as a table", content)
    return Section("latency", "Predicted against measured", html, (figure,))


def _correction(calibration: dict[str, Any]) -> str:
    """Say how the table was corrected and what that bought."""
    known = []
    if calibration.get("scale") is not None and calibration.get("base_ms") is not None:
        base = f"{ms(calibration['base_ms'])} + {digits(calibration['scale'])} {TIMES} table"
        known.append(f"Correction: measured ≈ {base}")
    if calibration.get("bias_before") is not None:
        known.append(f"bias before {digits(calibration['bias_before'])}")
    for key, name in (
        ("error_before", "error before"),
        ("error_after", "error after"),
        ("noise_floor", "noise floor"),
    ):
        if calibration.get(key) is not None:
            known.append(f"{name} {percent(calibration[key])}")
    return f"<p>{'; '.join(known)}.</p>" if known else ""


def _candidate_row(candidate: dict[str, Any]) -> str:
    latency = candidate["latency_ms"]
    cells = (
        ms(candidate["predicted_latency_ms"]),
        ms(latency["value"]),
        f"{digits(latency['low'])} to {digits(latency['high'])}",
    )
    blocks = escape(" ".join(candidate["architecture"]))
    return f"<tr>{''.join(number(cell) for cell in cells)}<td class=blocks>{blocks}</td></tr>"


def _training(run: Run) -> Section | None:
    plots = [f for part, rows in run.training.items() for f in curves.training_curves(part, rows)]
    return Section("training", "Training", "", (), tuple(plots)) if plots else None


def _table(run: Run) -> Section | None:
    if run.tables:
        plots = tuple(figures.table_heatmap(table, i) for i, table in enumerate(run.tables))
    elif run.search and run.search.targets:
        plots = (figures.layer_heatmap(run.search, 0),)
    else:
        return None
    headers = "".join(
        details(f"Header of {t.path.name}", facts(f"header-{i}", t.path.name, t.header))
        for i, t in enumerate(run.tables)
    )
    title = "The latency tables" if len(plots) > 1 else "The latency table"
    return Section("table", title, headers, plots, block_comparisons(run.tables))


def _environment(run: Run) -> Section | None:
    result = run.result
    own = {"fbnas": result.get("version"), "seed": result.get("seed"), "space": result.get("space")}
    known = {
        key: value
        for key, value in (own | (result.get("device") or {})).items()
        if value not in (None, "", {}, [])
    }
    options = yaml.safe_dump(run.config, sort_keys=False, width=100, allow_unicode=True)
    config = f'<pre tabindex="0">{escape(options)}</pre>' if run.config else ""
    html = commands([run]) + facts("environment-table", "What it ran on.", known)
    html += details("config.yaml, every option", config)
    return Section("environment", "Environment", html) if html else None


def commands(runs: Sequence[Run]) -> str:
    """Return the command lines to get the runs and this page again, as far as recorded."""
    lines = [run.command_line for run in runs if run.command_line]
    if not lines:
        return ""
    folders = [str(run.folder) for run in runs]
    asked = folders[0] if len(folders) == 1 else f"[{','.join(folders)}]"
    again = shlex.join(["fbnas", "report", f"run={asked}"])
    again += " out=FOLDER" if len(folders) > 1 else ""
    text = escape("\n".join([*lines, again]))
    return f'<p>To reproduce:</p><pre tabindex="0"><code>{text}</code></pre>'
