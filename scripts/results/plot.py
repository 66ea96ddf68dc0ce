"""The plot of the comparison: accuracy of int8 files by their measured latency."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from compare import FAMILY, RANDOM, RANKED, SEARCHED, UNIFORM

mpl.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's colours, which the colour-blind tell apart; every family has a marker besides.
BLUE, SKY, ORANGE, GREY = "#0072B2", "#56B4E9", "#E69F00", "0.6"
FAMILY_STYLES = (("#009E73", "^"), ("#D55E00", "v"), ("#CC79A7", "D"), ("#000000", "P"))


def draw(result: pd.DataFrame, path: Path) -> None:
    """Accuracy of int8 files by their measured latency; mean and deviation over seeds."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    random = result[result.kind == RANDOM]
    axes.scatter(
        random.measured_ms,
        100 * random.accuracy,
        s=14,
        color=GREY,
        label="random networks, each",
        zorder=1,
    )
    uniform = means(result[result.kind == UNIFORM], "name")
    bars(axes, uniform, ORANGE, "s", label="uniform networks, one block everywhere")
    for name, point in uniform.iterrows():
        note(axes, str(name), point)
    families = result[result.kind == FAMILY]
    kinds = families.name.str.rsplit(" ", n=1).str[0]
    for (family, part), (colour, marker) in zip(
        families.groupby(kinds, sort=False), FAMILY_STYLES, strict=False
    ):
        own = means(part, "name").sort_values("ms")
        bars(axes, own, colour, marker, line=":", label=str(family))
    searched = means(result[result.kind == SEARCHED], "fraction").sort_values("ms")
    bars(axes, searched, BLUE, "o", line="-", width=2.2, label="searched: most probable")
    ranked = means(result[result.kind == RANKED], "fraction").sort_values("ms")
    if len(ranked):
        bars(axes, ranked, SKY, "o", line="-", width=2.2, label="searched: first by shared weights")
    axes.set_xlabel("measured latency of the int8 file, ms")
    axes.set_ylabel("test accuracy of the int8 file, %")
    axes.set_title("Mean over seeds; bars: deviation over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def means(part: pd.DataFrame, by: str) -> pd.DataFrame:
    """ms, mean accuracy and its deviation (0 of one seed), in %."""
    groups = part.groupby(by, sort=False)
    return pd.DataFrame(
        {
            "ms": groups.measured_ms.mean(),
            "accuracy": 100 * groups.accuracy.mean(),
            "deviation": 100 * groups.accuracy.std().fillna(0.0),
        }
    )


def bars(
    axes: plt.Axes,
    own: pd.DataFrame,
    colour: str,
    marker: str,
    *,
    line: str = "",
    width: float = 1.2,
    label: str | None = None,
) -> None:
    axes.errorbar(
        own.ms,
        own.accuracy,
        own.deviation,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=width,
        elinewidth=0.8,
        capsize=2,
        label=label,
        zorder=3 if line == "-" else 2,
    )


def note(axes: plt.Axes, text: str, point: pd.Series) -> None:
    """A label right of a point."""
    axes.annotate(
        text,
        (point.ms, point.accuracy),
        xytext=(6, -3),
        textcoords="offset points",
        fontsize=7,
        color=ORANGE,
    )
