"""How well do totals alone rank networks? Each device of a file of measured networks, some splits.

    python scripts/totals/measure.py ../shared/data/whole_network_latency/fbnet_cifar.csv.gz out/

Per device, number of networks and split: Spearman on 1,000 held-out networks of the estimate with
the prior (multiply-adds), without it, of plain ridge regression (strength 1), of multiply-adds
alone, and of the estimate from suggested instead of random networks, and from 4,000. Writes
result.csv and result.md.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr

from fbnas.latency.effects import Entries, entries_of, prior_order
from fbnas.latency.measurements import read_measurements
from fbnas.latency.suggestion import suggest
from fbnas.latency.totals import estimate
from fbnas.space import SearchSpace

COUNTS = (30, 100, 200)
HELD_OUT = 1000
NORMAL_95 = 1.96
HEADINGS = (
    "device",
    "suggested",
    "that against 4,000",
    "random",
    "without prior",
    "plain ridge",
    "multiply-adds alone",
    "random against the better of the last two",
    "mean error",
    "in the 95 % interval",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--space", default="fbnet_cifar")
    parser.add_argument("--splits", type=int, default=10)
    arguments = parser.parse_args()
    columns = [c for c in pd.read_csv(arguments.file, nrows=1).columns if c != "blocks"]
    space = SearchSpace.load(arguments.space)
    rows = []
    for split in track(range(arguments.splits), "Splits", console=Console(stderr=True)):
        rows += one_split(arguments.file, space, columns, split)
    arguments.out.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(arguments.out / "result.csv", index=False, float_format="%.4f")
    report = words(frame)
    (arguments.out / "result.md").write_text(report)
    print(report)


def one_split(file: Path, space: SearchSpace, columns: list[str], split: int) -> list[dict]:
    """Return a row per device and number of networks."""
    entries = entries_of(space)
    first = read_measurements(file, space, columns[0])
    order = np.random.default_rng(split).permutation(len(first))
    pool, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    counts = entries.counts(first.paths)
    macs = prior_order(entries, "macs")
    where = {tuple(path): i for i, path in enumerate(first.paths.tolist())}
    chosen = suggest(entries, max(COUNTS), among=first.paths[pool], seed=split)
    suggested = np.array([where[tuple(path)] for path in chosen.tolist()])
    rows = []
    for column in columns:
        latency_ms = read_measurements(file, space, column).latency_ms
        truth_ms = latency_ms[held_out]
        judge = Judge(entries, first.paths, latency_ms, held_out)
        everything = judge.score(pool)
        for count in COUNTS:
            seen = pool[:count]
            random, left_out, covered = judge.score(seen)
            from_suggested = judge.score(suggested[:count])
            rows.append(
                {
                    "split": split,
                    "device": column.removesuffix("_ms"),
                    "networks": count,
                    "random": random,
                    "error": left_out,
                    "covered": covered,
                    "suggested": from_suggested[0],
                    "without_prior": judge.score(seen, "none")[0],
                    "ridge": spearman(
                        ridge(counts[seen], latency_ms[seen], counts[held_out]), truth_ms
                    ),
                    "macs_alone": spearman(counts[held_out] @ macs, truth_ms),
                    "from_all": everything[0],
                }
            )
    return rows


@dataclass(frozen=True)
class Judge:
    """Fits on some of a device's networks and looks at the held-out ones."""

    entries: Entries
    paths: np.ndarray
    latency_ms: np.ndarray
    held_out: np.ndarray

    def score(self, seen: np.ndarray, prior: str = "macs") -> tuple[float, float, float]:
        """Return Spearman, mean error, and how many totals lie in their 95 % interval."""
        found = estimate(self.entries, self.paths[seen], self.latency_ms[seen], prior=prior)
        mean, spread = found.predict(self.paths[self.held_out])
        width = NORMAL_95 * np.hypot(spread, found.noise_ms)
        truth_ms = self.latency_ms[self.held_out]
        error = float(np.mean(np.abs(mean / truth_ms - 1)))
        return spearman(mean, truth_ms), error, float(np.mean(np.abs(mean - truth_ms) < width))


def ridge(seen: np.ndarray, latency_ms: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Plain ridge regression on counts of entries, strength 1, with an intercept."""
    centre = seen.mean(axis=0)
    gram = (seen - centre).T @ (seen - centre) + np.eye(seen.shape[1])
    weights = np.linalg.solve(gram, (seen - centre).T @ (latency_ms - latency_ms.mean()))
    return (new - centre) @ weights


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


def words(frame: pd.DataFrame) -> str:
    """The result as a page: means over splits, and the least favourable split."""
    lines = []
    frame = frame.assign(
        margin=frame["random"] - frame[["ridge", "macs_alone"]].max(axis=1),
        gap=frame["suggested"] - frame["from_all"],
    )
    for count, part in frame.groupby("networks"):
        means = part.groupby("device", sort=False).mean(numeric_only=True)
        worst = part.groupby("device", sort=False)[["suggested", "margin", "gap"]].min()
        splits = part["split"].nunique()
        lines += [
            f"## From {count} networks (means of {splits} splits; worst split in brackets)",
            "",
            f"| {' | '.join(HEADINGS)} |",
            "|---" * len(HEADINGS) + "|",
        ]
        for (device, m), (_, w) in zip(means.iterrows(), worst.iterrows(), strict=True):
            cells = [
                str(device),
                f"{m.suggested:.3f} ({w.suggested:.3f})",
                f"{m.gap:+.3f} ({w.gap:+.3f})",
                *(f"{m[name]:.3f}" for name in ("random", "without_prior", "ridge", "macs_alone")),
                f"{m.margin:+.3f} ({w.margin:+.3f})",
                f"{100 * m.error:.1f} %",
                f"{100 * m.covered:.0f} %",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        gain = means["random"].mean() - means[["without_prior", "ridge"]].mean().max()
        lines += ["", f"The prior raises the mean Spearman over devices by {gain:.3f}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
