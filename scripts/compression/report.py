"""The page of the study: the table, the plot, and the verdict, all from its rows."""

import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from plan import RATIOS

from fbnas.commands.composition import compose
from fbnas.latency import Device

sys.path.append(str(Path(__file__).parents[1]))
from steps import circumstances, spread

mpl.use("Agg")
from matplotlib import pyplot as plt

COSTS = {"stored_bytes": "kB as stored", "latency_ms": "ms measured"}
SHOWN = 15  # points of accuracy below the best that the plot shows
ORDERS = ("channel_pruning+qat", "qat+channel_pruning+int8")  # both fine-tune twice


def write_report(rows: pd.DataFrame, out: Path, *, words: str, test_images: int) -> None:
    """Write result.csv, result.md and compression.png.

    Args:
        rows: a row per trial and seed, with latencies where there is a file.
        words: on data and training.
    """
    done = means(rows[rows.refused.isna()])
    refused = rows[rows.refused.notna()].drop_duplicates("trial")
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "result.csv", index=False, float_format="%.6g")
    draw(done, out / "compression.png")
    noise = rows.noise_floor.median()
    page = [
        "# Compression methods and stacks on one network",
        "",
        circumstances(Device()),
        words,
        "",
        "Accuracy, of all test images, and latency are those of the ONNX file. Stored: packed "
        "weights where the method packs, the file where it is int8, else the dense tensors. Noise "
        f"floor of the latencies {100 * noise:.1f} %.",
        "",
        "## Verdict",
        "",
        *(f"- {line}" for line in verdict(done, refused, test_images)),
        "",
        "![accuracy against bytes and against latency](compression.png)",
        "",
        "## All that was tried",
        "",
        *table(done, rows),
        "",
        *(f"- Refused: {row.trial}: {row.refused}" for row in refused.itertuples()),
        "",
    ]
    (out / "result.md").write_text("\n".join(page))
    print("\n".join(page))


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of each trial, in the order in which they were planned."""
    named = ["trial", "kind", "methods", "strength"]
    return rows.groupby(named, sort=False, dropna=False).mean(numeric_only=True).reset_index()


def front(rows: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The rows that no other one beats in accuracy without costing more: Pareto's, cheapest first.

    Args:
        cost: a column, less is better.
    """
    ordered = rows.sort_values([cost, "accuracy"], ascending=[True, False])
    best = ordered.accuracy.cummax().shift(fill_value=-1.0)
    return ordered[ordered.accuracy > best]


def verdict(rows: pd.DataFrame, refused: pd.DataFrame, test_images: int) -> list[str]:
    """What the rows say, in sentences."""
    lines = []
    for cost, unit in COSTS.items():
        names = "; ".join(front(rows, cost).trial)
        lines.append(f"On the front of accuracy against {unit}, cheapest first: {names}.")
    return [*lines, *order(rows, refused, test_images), *default(rows)]


def order(rows: pd.DataFrame, refused: pd.DataFrame, test_images: int) -> list[str]:
    """Which of the two orders is the more accurate, with the error of the test images."""
    before, after = (rows[rows.methods == name].set_index("strength").accuracy for name in ORDERS)
    gain = (before - after).dropna()
    lines = []
    if gain.empty:
        lines.append("The two orders cannot be compared: one of them has no rows.")
    else:
        shares = pd.concat([before[gain.index], after[gain.index]])
        error = (shares * (1 - shares) / test_images).sum() ** 0.5 / len(gain)
        pairs = ", ".join(f"{100 * x:+.2f} points at {name}" for name, x in gain.items())
        winner = ORDERS[0] if gain.mean() > 0 else ORDERS[1]
        told = (
            f"{winner} is the better order"
            if abs(gain.mean()) > 2 * error
            else "so many test images do not tell the orders apart"
        )
        lines.append(
            f"Order: {ORDERS[0]} against {ORDERS[1]} {pairs}, mean {100 * gain.mean():+.2f} "
            f"(standard error {100 * error:.2f}): {told}."
        )
    accuracy = rows.set_index("trial").accuracy
    for ratio in RATIOS:
        pruned, int8 = f"channel_pruning {ratio:g}", f"channel_pruning+int8 {ratio:g}"
        if {pruned, int8} <= set(accuracy.index):
            lost = 100 * (accuracy[int8] - accuracy[pruned])
            lines.append(f"int8 after {pruned} and its fine-tuning: {lost:+.2f} points.")
    for row in refused[refused.methods == "int8+channel_pruning"].head(1).itertuples():
        lines.append(f"int8 first is refused: {row.refused}")
    return lines


def default(rows: pd.DataFrame) -> list[str]:
    """The default of `fbnas run` against the best that it would accept.

    Chosen by validation images, as `fbnas run` decides; test accuracies are told.
    """
    allowed = compose("run", [])["max_accuracy_drop"]
    base = rows[rows.kind == "none"]
    if base.empty:
        return ["The network itself was not tried, so that nothing can be held against it."]
    least = float(base.validation_accuracy.iloc[0]) - allowed
    good = rows[rows.validation_accuracy >= least]
    lines = []
    for cost, unit in COSTS.items():
        best = good.loc[good[cost].idxmin()]
        lines.append(
            f"Least {unit} of those {len(good)} that lose at most {100 * allowed:g} point(s) of "
            f"validation accuracy: {said(best)}."
        )
    for row in rows[rows.kind == "default"].iloc[:1].iloc:
        kept = "within" if row.validation_accuracy >= least else "beyond"
        lines.append(f"The default of `fbnas run`, {kept} that loss: {said(row)}.")
        for cost, unit in COSTS.items():
            better = rows[(rows.accuracy > row.accuracy) & (rows[cost] < row[cost])]
            names = "; ".join(better.sort_values(cost).trial) or "nothing"
            lines.append(f"More accurate at less {unit} than the default: {names}.")
    return lines


def said(row: pd.Series) -> str:
    return (
        f"{row.trial} ({100 * row.accuracy:.2f} % of the test images, "
        f"{row.stored_bytes / 1e3:.1f} kB, {row.latency_ms:.4f} ms)"
    )


def table(done: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    lines = [
        "| methods, strength | test accuracy, % (seeds) | params | M macs | kB dense | kB stored "
        "| kB file | ms (low to high) | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in done.itertuples():
        accuracy = spread(rows[rows.trial == row.trial].accuracy)
        lines.append(
            f"| {row.trial} | {accuracy} | {row.params:,.0f} | {row.macs / 1e6:.2f} "
            f"| {row.dense_bytes / 1e3:.1f} | {row.stored_bytes / 1e3:.1f} "
            f"| {row.file_bytes / 1e3:.1f} | {row.latency_ms:.4f} ({row.low_ms:.4f} to "
            f"{row.high_ms:.4f}) | {row.seconds:.0f} |"
        )
    return lines


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Accuracy against both costs; who is on a front is named beside it, in its order."""
    groups = rows.methods.where(rows.kind == "method", rows.kind)
    colours = plt.get_cmap("tab20").colors
    figure, panels = plt.subplots(2, 1, figsize=(12, 11), layout="constrained")
    for axes, (cost, unit) in zip(panels, COSTS.items(), strict=True):
        scale = 1e-3 if cost == "stored_bytes" else 1.0
        for number, (name, same) in enumerate(rows.groupby(groups, sort=False)):
            alone = same.kind.iloc[0] == "method"
            axes.scatter(
                scale * same[cost],
                100 * same.accuracy,
                label=name,
                color=colours[number % len(colours)],
                s=40 if alone else 80,
                marker="o" if alone else "D",
                edgecolor="black",
                linewidth=0.5,
                zorder=2,
            )
        best = front(rows, cost)
        axes.step(scale * best[cost], 100 * best.accuracy, where="post", color="grey", lw=0.8)
        axes.set_xscale("log")
        for ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            ticks(lambda cost, _: f"{cost:g}")
        axes.set(xlabel=unit, ylabel="test accuracy, %")
        cut = 100 * rows.accuracy.max() - SHOWN
        below = rows[100 * rows.accuracy < cut].trial
        if len(below):
            axes.set_ylim(bottom=cut)
            axes.set_ylabel(f"test accuracy, %; below: {'; '.join(below)}")
        axes.grid(alpha=0.3, which="both")
        name_front(axes, best, scale * best[cost])
    panels[0].legend(fontsize=8, ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1.02))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def name_front(axes: plt.Axes, best: pd.DataFrame, costs: pd.Series) -> None:
    """Names in a column at the right, the most accurate at the top, a line to each point."""
    for place, (row, cost) in enumerate(zip(best.itertuples(), costs, strict=True)):
        height = (place + 0.5) / len(best)
        axes.annotate(
            row.trial,
            (cost, 100 * row.accuracy),
            (1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.5, "relpos": (0, 0.5)},
        )
