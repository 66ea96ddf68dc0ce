"""Does every network that a search selects use its budget, and does it take what was predicted?

    python scripts/targets/measure.py WORK CIFAR_FOLDER [--spaces quickstart,fbnet_cifar]
        [--seeds 0,1,2] [--fractions 0.2,0.35,0.5,0.65,0.8] [--images 1000] [--epochs 16]
        [--steps table,search,measure]

One search per space and seed, with a target per fraction of the way from the fastest to the slowest
network of this machine's table (ONNX Runtime, fp32, one thread). Each target's network is selected
as `fbnas search` does. Then the networks of all seeds are exported as `fbnas export` does and
measured against each other as `fbnas evaluate` measures one. CIFAR_FOLDER holds train.parquet and
test.parquet.

A target holds where the prediction is at most T, and at least 0.9 T if the space has such networks,
and where the measurement is within 5 %, or twice the noise floor, of the prediction.

WORK keeps tables, searches, model files and selected.csv: the same command continues. A table that
is found in WORK is used again, however old: delete it to profile anew. OUT gets result.csv,
result.md and predicted_measured.png.
"""

import argparse
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch

from fbnas.commands.evaluate import LEAST_TOLERANCE
from fbnas.latency import Device, LatencyTable
from fbnas.latency.profiling import require_same_device
from fbnas.search import LEAST_USED, SearchSettings, best_within, highest_within
from fbnas.space import Architecture, SearchSpace
from fbnas.training import Data, load_data

sys.path.append(str(Path(__file__).parents[1]))
from steps import (
    append_rows,
    calibrated_table,
    circumstances,
    exported,
    is_known,
    rows_of,
    searched,
    table_words,
    target_at,
)

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
ROUNDING = 1e-9


@dataclass(frozen=True)
class Case:
    """A space, its images, and the recipe of its search."""

    space: SearchSpace
    data: Data
    settings: SearchSettings
    folder: Path


def case_of(name: str, arguments: argparse.Namespace) -> Case:
    space, folder = SearchSpace.load(name), arguments.work / name
    if name == "quickstart":  # configs/experiment/quickstart.yaml
        data = load_data("digits", resize=True, space=space)
        settings = SearchSettings(epochs=arguments.quickstart_epochs, batch_size=32)
    else:
        path, limit = str(arguments.cifar), arguments.images
        data = load_data("huggingface", path=path, resize=True, space=space, limit=limit)
        settings = SearchSettings(epochs=arguments.epochs, batch_size=arguments.batch)
    return Case(space, data, settings, folder)


def table_of(case: Case, device: Device, arguments: argparse.Namespace) -> LatencyTable:
    """The table given for the space, or this machine's own, profiled and calibrated."""
    for path in arguments.table:
        given = LatencyTable.load(path)
        if case.space.name in given.header["space"].split():
            require_same_device(given, device)
            return given
    return calibrated_table(
        case.folder / "table.csv",
        case.space,
        device,
        classes=case.data.classes,
        networks=arguments.networks,
        held_out=arguments.held_out,
    )


def select(case: Case, table: LatencyTable, seed: int, fractions: list[float]) -> list[dict]:
    """Search for all fractions at once; a row per target."""
    started = time.monotonic()
    targets = [target_at(table, case.space, case.data.classes, f) for f in fractions]
    learned = searched(
        case.folder / f"search_{seed}",
        case.space,
        case.data,
        targets,
        settings=case.settings,
        seed=seed,
    )
    seconds = time.monotonic() - started
    rows = []
    for fraction, one in zip(fractions, learned, strict=True):
        assert one.budget_ms is not None
        best = best_within(one.distribution, one.limits, count=1)[0]
        rows.append(
            {
                "space": case.space.name,
                "seed": seed,
                "fraction": fraction,
                "budget_ms": one.budget_ms,
                "predicted_ms": best.provenance["predicted_latency_ms"],
                "most_ms": highest_within(
                    one.limits[0], one.limits[1:], enough=LEAST_USED * one.budget_ms
                ),
                "search_seconds": seconds,
                "blocks": str(best),
            }
        )
    return rows


def measured(case: Case, rows: pd.DataFrame, device: Device) -> pd.DataFrame:
    """All selected networks of a space against each other; equal ones are measured once."""
    names = list(dict.fromkeys(rows.blocks))
    architectures = [Architecture(tuple(n.split()), case.space.name) for n in names]
    files = exported(architectures, case.space, device, case.folder / "models", case.data)
    found = device.measure_quietly(files, f"Timing {len(files)} networks of {case.space.name}")
    timings = dict(zip(names, found.whole, strict=True))
    return rows.assign(
        measured_ms=[timings[name].latency_ms for name in rows.blocks],
        low_ms=[timings[name].low_ms for name in rows.blocks],
        high_ms=[timings[name].high_ms for name in rows.blocks],
        noise_floor=found.noise_floor,
    )


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Add what the claim is about: used, error, tolerance and whether it holds."""
    used = rows.predicted_ms / rows.budget_ms
    error = rows.measured_ms / rows.predicted_ms - 1
    tolerance = (2 * rows.noise_floor).clip(lower=LEAST_TOLERANCE)
    reachable = rows.most_ms >= LEAST_USED * rows.budget_ms
    in_budget = used <= 1 + ROUNDING
    is_used = (used >= LEAST_USED - ROUNDING) | ~reachable
    return rows.assign(
        used=used,
        error=error,
        tolerance=tolerance,
        uses_budget=in_budget & is_used,
        as_predicted=error.abs() <= tolerance,
        holds=in_budget & is_used & (error.abs() <= tolerance),
    )


def words(rows: pd.DataFrame, tables: dict[str, LatencyTable], device: Device) -> str:
    lines = ["# Targets, predictions and measurements", "", circumstances(device)]
    for space, part in rows.groupby("space", sort=False):
        bias, worst = part.error.mean(), part.error.abs().max()
        lines += [
            f"## Space {space}",
            "",
            f"{table_words(tables[str(space)])}.",
            "",
            f"{int(part.holds.sum())} of {len(part)} targets hold: {int(part.uses_budget.sum())} "
            f"use their budget, {int(part.as_predicted.sum())} take what was predicted. Measured / "
            f"predicted - 1: mean {100 * bias:+.1f} %, standard deviation "
            f"{100 * part.error.std():.1f} %, at worst {100 * worst:.1f} %. "
            f"{part.blocks.nunique()} different networks.",
            "",
            "| seed | fraction | T, ms | predicted / T | measured, ms (interval) | "
            "measured / predicted - 1 | twice noise floor | measured / T | holds |",
            "|---" * 9 + "|",
        ]
        for r in part.itertuples():
            lines.append(
                f"| {r.seed} | {r.fraction:g} | {r.budget_ms:.4f} | {r.used:.4f} | "
                f"{r.measured_ms:.4f} ({r.low_ms:.4f} to {r.high_ms:.4f}) | {100 * r.error:+.1f} % "
                f"| {200 * r.noise_floor:.1f} % | {r.measured_ms / r.budget_ms:.3f} | "
                f"{'yes' if r.holds else 'no'} |"
            )
        lines.append("")
    return "\n".join([*lines, "![predicted against measured](predicted_measured.png)", ""])


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Predicted against measured, a panel per space; grey: what is allowed."""
    spaces = list(dict.fromkeys(rows.space))
    figure, panels = plt.subplots(
        1, len(spaces), figsize=(5.2 * len(spaces), 4.8), layout="constrained", squeeze=False
    )
    for axes, space in zip(panels[0], spaces, strict=True):
        part = rows[rows.space == space]
        ends = pd.Series([part.predicted_ms.min() * 0.9, part.predicted_ms.max() * 1.1])
        tolerance = float(part.tolerance.max())
        axes.fill_between(ends, ends * (1 - tolerance), ends * (1 + tolerance), color="0.9")
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        for seed, own in part.groupby("seed"):
            errors = [own.measured_ms - own.low_ms, own.high_ms - own.measured_ms]
            axes.errorbar(
                own.predicted_ms,
                own.measured_ms,
                errors,
                fmt="o",
                markersize=4,
                label=f"seed {seed}",
            )
        for budget_ms in part.budget_ms.unique():
            axes.axvline(budget_ms, color="tab:red", linewidth=0.6, linestyle=":")
        axes.set_title(f"{space} (grey: {100 * tolerance:.0f} %; dotted: the budgets)", fontsize=10)
        axes.set_xlabel("predicted, ms")
        axes.set_ylabel("measured, ms")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", type=Path, help="folder for tables, searches and model files")
    add("cifar", type=Path, help="folder with train.parquet and test.parquet of CIFAR-10")
    add("--out", type=Path, default=HERE, help="folder for the result (default: beside this)")
    add("--spaces", default="quickstart,fbnet_cifar", help="separated by commas")
    add("--seeds", default="0,1,2", help="of the searches")
    add("--fractions", default="0.2,0.35,0.5,0.65,0.8", help="a target each")
    add("--table", action="append", default=[], help="a table to use for its space; repeatable")
    add("--networks", type=int, default=20, help="that a fresh table's correction is fitted on")
    add("--held-out", type=int, default=10, help="that judge it")
    add("--images", type=int, default=1000, help="of CIFAR-10, a fifth of them to validate")
    add("--epochs", type=int, default=16, help="of a search in fbnet_cifar")
    add("--batch", type=int, default=16, help="images a step in fbnet_cifar")
    add("--quickstart-epochs", type=int, default=60, help="of a search in quickstart")
    add("--threads", type=int, default=2, help="of torch")
    add("--device", default="epyc", help="name of this machine")
    add("--steps", default="table,search,measure", help="table and measure want a quiet machine")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    device = Device(name=arguments.device)
    fractions = [float(f) for f in arguments.fractions.split(",")]
    selected = arguments.work / "selected.csv"
    steps = arguments.steps.split(",")
    tables, cases = {}, {}
    for name in arguments.spaces.split(","):
        case = cases[name] = case_of(name, arguments)
        table = tables[name] = table_of(case, device, arguments)
        for seed in map(int, arguments.seeds.split(",") if "search" in steps else ()):
            if is_known(rows_of(selected), space=name, seed=seed):
                continue
            print(f"{name}, seed {seed}: searching for {len(fractions)} targets", flush=True)
            append_rows(selected, select(case, table, seed, fractions))
    if "measure" not in steps:
        return
    rows = rows_of(selected)
    found = judged(
        pd.concat([measured(c, rows[rows.space == name], device) for name, c in cases.items()])
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    found.to_csv(arguments.out / "result.csv", index=False, float_format="%.6g")
    draw(found, arguments.out / "predicted_measured.png")
    report = words(found, tables, device)
    (arguments.out / "result.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
