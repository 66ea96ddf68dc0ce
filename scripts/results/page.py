"""The page of the comparison, from a row per trained network and seed.

Columns of `result`: those of compare.py, and noise_floor, fp32_accuracy, params, macs, blocks.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from compare import AS_FAST, RANDOM, RANKED, SEARCHED, Compared, compared, points, verdicts
from plot import draw

sys.path.append(str(Path(__file__).parents[1]))
from steps import spread


def words(result: pd.DataFrame, seconds: pd.DataFrame, about: list[str]) -> str:
    everything = compared(result)
    ranked = compared(result, RANKED) if (result.kind == RANKED).any() else []
    noise = result.noise_floor.max()
    off = [end for c in [*everything, *ranked] for end in c.random_off]
    lines = [
        "# Searched networks against random, uniform and well-known ones",
        "",
        *about,
        "",
        "## Verdict",
        "",
        "Two networks of each search are searched ones: the most probable, and the first of 200 by "
        "the shared weights, which `fbnas run` takes. A gain is their accuracy less that of others "
        "of their measured latency, by seed: better or worse where the mean over seeds is more "
        "than its deviation over seeds.",
        "",
        "The most probable:",
        "",
        *verdicts(everything),
        "",
        *(["The first by the shared weights:", "", *verdicts(ranked), ""] if ranked else []),
        "## At each budget",
        "",
        "Test accuracy of int8 files, %, mean ± deviation (seeds); gains in points. Random "
        f"networks differ from the searched one's latency by {100 * min(off):+.1f} to "
        f"{100 * max(off):+.1f} % (noise floor {100 * noise:.1f} %); where they are faster, that "
        "favours search. The best uniform network is the best of those that take at most "
        f"{100 * (AS_FAST - 1):.0f} % more than the searched one or the budget, chosen by these "
        "very test images, which favours it. Families are interpolated along latency between "
        "their widths, and the best of them at the searched network's latency counts.",
        "",
        "The most probable:",
        "",
        *each_budget(everything),
        *(["", "The first by the shared weights:", "", *each_budget(ranked)] if ranked else []),
    ]
    return "\n".join(
        [
            *[*lines, "", "![accuracy by measured latency](results.png)", ""],
            *["## Every network", "", *every_network(result), ""],
            *["## Hours", "", *hours(seconds, result), ""],
        ]
    )


def each_budget(everything: list[Compared]) -> list[str]:
    """A line per budget: the searched networks, the others, and the gains."""
    lines = [
        "| budget, ms | measured, ms | searched | random | gain | best uniform | gain | "
        "best family | gain |",
        "|---" * 9 + "|",
    ]
    for c in everything:
        random, uniform, family = (points(g) for g in c.gains().values())
        at = f"{c.uniform_name}: {spread(c.uniform)}" if len(c.uniform) else "none as fast"
        frontier = c.frontier.dropna()
        lines.append(
            f"| {c.budget_ms:.4f} | {c.measured_ms:.4f} | {spread(c.own)} | {spread(c.random)} | "
            f"{random} | {at} | {uniform} | "
            f"{spread(frontier) if len(frontier) else 'none as fast'} | {family} |"
        )
    return lines


def every_network(result: pd.DataFrame) -> list[str]:
    """A line per name, random networks of a budget together; means over all in it and seeds."""
    lines = [
        "| network | measured, ms | int8 accuracy, % | fp32 accuracy, % | M parameters | "
        "M multiply-adds |",
        "|---" * 6 + "|",
    ]
    named = np.where(result.kind == RANDOM, result.name.str.rpartition(" ")[0], result.name)
    for name, part in result.groupby(named, sort=False):
        lines.append(
            f"| {name} | {part.measured_ms.mean():.4f} | {spread(part.accuracy)} | "
            f"{spread(part.fp32_accuracy)} | {part.params.mean() / 1e6:.3f} | "
            f"{part.macs.mean() / 1e6:.2f} |"
        )
    lines += ["", "The searched networks:", ""]
    searched = result[result.kind.isin([SEARCHED, RANKED])]
    return lines + [f"- seed {r.seed}, {r.budget_ms:.4f} ms, {r.kind}: `{r.blocks}`"
                    for r in searched.itertuples()]  # fmt: skip


def hours(seconds: pd.DataFrame, result: pd.DataFrame) -> list[str]:
    """Of each step, of all processes together."""
    found = seconds.groupby("step", sort=False).seconds.sum() / 3600
    found["train"] = result.seconds.sum() / 3600
    lines = ["| step | process hours |", "|---|---|"]
    lines += [f"| {step} | {own:.2f} |" for step, own in found.items()]
    lines.append(f"| all | {found.sum():.2f} |")
    words = (
        "Trainings are summed over the networks on this page. Of the other steps, processes that "
        "came to their end count; one that was stopped left no hours."
    )
    return [*lines, "", words]


def write_page(result: pd.DataFrame, seconds: pd.DataFrame, about: list[str], folder: Path) -> None:
    """Write result.csv, results.png and result.md into `folder`, and print the page."""
    folder.mkdir(parents=True, exist_ok=True)
    result.to_csv(folder / "result.csv", index=False, float_format="%.6g")
    draw(result, folder / "results.png")
    page = words(result, seconds, about)
    (folder / "result.md").write_text(page)
    print(page)
