"""The page and the plots of the study, from the tables and whole networks that measure.py left.

    python scripts/additivity/report.py FOLDER scripts/additivity

Writes result.md, result.csv (the same numbers), and SPACE.png: held-out networks, measured against
the sum of blocks and against the corrected table, a panel per runtime and precision.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

from fbnas.latency.agreement import Agreement, agreement
from fbnas.latency.calibration import fit, predict, uncorrected
from fbnas.latency.table import LatencyTable
from fbnas.space import Architecture, SearchSpace

mpl.use("Agg")
from matplotlib import pyplot as plt

COLUMNS = 3
TRUSTED = 1.7  # error after correction, in noise floors: the project's bar for ONNX Runtime


@dataclass(frozen=True)
class Case:
    """A table and the whole networks that it was held against."""

    path: Path
    table: LatencyTable
    networks: pd.DataFrame

    @property
    def space(self) -> str:
        return self.table.header["space"].split()[0]

    @property
    def device(self) -> str:
        """Runtime, provider where it says more, precision."""
        provider = self.table.header.get("provider", "")
        shown = f" {provider}" if self.table.runtime == "pytorch" else ""
        return f"{self.table.runtime}{shown} {self.table.precision}"

    @property
    def noise(self) -> float:
        """Test against retest of the whole networks, a fraction."""
        return float(self.table.header["calibration_noise_floor"])

    @property
    def held_out(self) -> pd.DataFrame:
        return self.networks[self.networks.held_out]

    def before(self) -> Agreement:
        return agreement(self.held_out.predicted_ms.to_numpy(), self.held_out.latency_ms.to_numpy())

    def after(self) -> Agreement:
        """With the correction, whether or not it was applied."""
        return agreement(self.held_out.corrected_ms.to_numpy(), self.held_out.latency_ms.to_numpy())

    def line(self, table: LatencyTable) -> Agreement:
        """What a straight line through the sums of a table's blocks leaves on the same networks."""
        space = SearchSpace.load(self.space)
        latency_ms, base_ms = uncorrected(table).tensor(space, classes=classes_of(self.table))
        blocks = [Architecture(tuple(text.split()), space.name) for text in self.networks.blocks]
        sums_ms = np.array([predict(space, a, latency_ms, base_ms) for a in blocks])
        measured_ms = self.networks.latency_ms.to_numpy()
        judging = self.networks.held_out.to_numpy()
        scale, correction_ms = fit(sums_ms[~judging], measured_ms[~judging])
        return agreement(scale * sums_ms[judging] + correction_ms, measured_ms[judging])


def classes_of(table: LatencyTable) -> int:
    return next(e.shape.out_channels for e in table.entries if e.shape.block == "classifier")


def read(folder: Path) -> list[Case]:
    cases = []
    for path in sorted(folder.glob("*.csv")):
        networks = path.with_suffix(".calibration.csv")
        if networks.is_file() and ".alone" not in path.name:
            cases.append(Case(path, LatencyTable.load(path), pd.read_csv(networks)))
    return cases


def rows(case: Case, seconds: dict[tuple[str, str], float]) -> dict[str, object]:
    table, before, after = case.table, case.before(), case.after()
    kind = "none helped"
    if "correction_scale" in table.header:
        every = any(entry.corrected_ms is not None for entry in table.entries)
        kind = "every row" if every else "a line"
    return {
        "space": case.space,
        "device": case.device,
        "version": table.header["runtime_version"],
        "profile_s": seconds.get(("profile", case.path.name), float("nan")),
        "block_noise": table.noise_floor,
        "quiet": table.quiet == "yes",
        "networks_noise": case.noise,
        "fitted": int((~case.networks.held_out).sum()),
        "held_out": len(case.held_out),
        "bias": before.bias,
        "error_before": before.mean_error,
        "spearman_before": before.spearman,
        "kendall_before": before.kendall,
        "correction": kind,
        "error_after": after.mean_error,
        "spearman_after": after.spearman,
        "kendall_after": after.kendall,
        "error_in_noise": after.mean_error / case.noise if case.noise else float("nan"),
    }


def page(frame: pd.DataFrame, alone: list[str]) -> str:
    lines = []
    for space, part in frame.groupby("space", sort=False):
        lines += [
            f"## Space {space}",
            "",
            "| runtime | profile | noise: blocks, networks | networks fitted, held out | bias | "
            "error as it was | Spearman, Kendall | correction | error after | in noise floors | "
            "Spearman, Kendall |",
            "|---" * 11 + "|",
        ]
        for r in part.itertuples():
            busy = "" if r.quiet else " (busy)"
            cells = [
                f"{r.device} {r.version}",
                f"{r.profile_s:.0f} s",
                f"{percent(r.block_noise)}, {percent(r.networks_noise)}{busy}",
                f"{r.fitted}, {r.held_out}",
                f"{r.bias:.2f}",
                percent(r.error_before),
                f"{r.spearman_before:.3f}, {r.kendall_before:.3f}",
                r.correction,
                percent(r.error_after),
                f"{r.error_in_noise:.1f}",
                f"{r.spearman_after:.3f}, {r.kendall_after:.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"![held-out networks]({space}.png)", ""]
    if alone:
        lines += [
            "## Blocks in context or alone",
            "",
            "What a straight line leaves on the same held-out networks, with blocks measured "
            "behind a 1x1 convolution whose own time is taken off, and each in a run of its own:",
            "",
            "| space, runtime | in context | alone |",
            "|---|---|---|",
            *alone,
            "",
        ]
    return "\n".join(lines)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def draw(cases: list[Case], path: Path) -> None:
    """Held-out networks of one space, a panel per device."""
    height = -(-len(cases) // COLUMNS)
    figure, grid = plt.subplots(
        height, COLUMNS, figsize=(4.2 * COLUMNS, 3.9 * height), layout="constrained", squeeze=False
    )
    for panel in grid.flat[len(cases) :]:
        panel.set_axis_off()
    for panel, case in zip(grid.flat, cases, strict=False):
        found = case.held_out
        values = found[["predicted_ms", "corrected_ms", "latency_ms"]].to_numpy()
        ends = np.array([values.min() * 0.95, values.max() * 1.05])
        panel.fill_between(
            ends, ends * (1 - case.noise), ends * (1 + case.noise), color="0.85", label="noise"
        )
        panel.plot(ends, ends, color="0.5", linewidth=0.8, linestyle="--")
        panel.scatter(
            found.predicted_ms,
            found.latency_ms,
            s=18,
            facecolors="none",
            edgecolors="tab:orange",
            label=f"sum of blocks: {percent(case.before().mean_error)} off",
        )
        panel.scatter(
            found.corrected_ms,
            found.latency_ms,
            s=9,
            color="tab:blue",
            label=f"corrected: {percent(case.after().mean_error)} off",
        )
        panel.set(title=case.device, xlim=ends, ylim=ends, xlabel="predicted, ms")
        panel.set_ylabel("measured, ms")
        panel.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    cases = read(arguments.folder)
    seconds: dict[tuple[str, str], float] = {}
    log = arguments.folder / "seconds.csv"
    if log.is_file():
        for row in pd.read_csv(log).itertuples():
            seconds[row.step, row.table] = row.seconds
    frame = pd.DataFrame([rows(case, seconds) for case in cases])
    frame.to_csv(arguments.out / "result.csv", index=False, float_format="%.4g")
    alone = []
    for case in cases:
        other = case.path.with_suffix(".alone.csv")
        if other.is_file():
            there = case.line(LatencyTable.load(other)).mean_error
            here = case.line(case.table).mean_error
            alone.append(f"| {case.space}, {case.device} | {percent(here)} | {percent(there)} |")
    for space in frame.space.unique():
        draw([case for case in cases if case.space == space], arguments.out / f"{space}.png")
    report = page(frame, alone)
    (arguments.out / "result.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
