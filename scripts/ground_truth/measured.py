"""Does search beat random networks of the same measured latency on this machine?

    python scripts/ground_truth/measured.py table CIFAR_FOLDER WORK              # quiet
    python scripts/ground_truth/measured.py search CIFAR_FOLDER WORK [--part 0/2]
    python scripts/ground_truth/measured.py report CIFAR_FOLDER WORK

`table` profiles the space through ONNX Runtime, corrects the table by whole networks, and times all
324 networks against each other. `search` runs the default recipe with three seeds, for five budgets
each. `report` chooses as `fbnas run` does (the best by the shared weights of all networks at 0.9 to
1.0 of the budget) and as `fbnas search` does (the most probable), draws ten random networks
measured within 3 % of the chosen one, looks all up in truth.csv (every network trained alike, three
seeds), and writes measured.csv and measured.md beside this file.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from study import COMMON, FRACTIONS
from truth import HERE, all_architectures, small_cifar

sys.path.insert(0, str(HERE.parent))

from steps import calibrated_table, circumstances, exported, part_of, searched, target_at

from fbnas.latency import Device, LatencyTable
from fbnas.latency.calibration import predict
from fbnas.search import (
    LEAST_USED,
    Learned,
    SearchSettings,
    SharedWeightsJudge,
    most_probable_within,
    read_supernet,
)
from fbnas.space import SearchSpace
from fbnas.training import Data

SEEDS = (0, 1, 2)
RANDOM = 10
SAME = 0.03  # of the chosen network's measured latency
DEVICE = Device()
FITTED, JUDGED = 20, 20
RULES = ("most probable", "best by the shared weights")


def timed(work: Path, space: SearchSpace, data: Data) -> pd.DataFrame:
    """Measured latency of every network, timed against each other once."""
    path = work / "networks.csv"
    if not path.is_file():
        networks = all_architectures(space)
        files = exported(networks, space, DEVICE, work / "networks", data)
        found = DEVICE.measure_quietly(files, "Timing all networks")
        rows = [
            {"blocks": str(a), "ms": timing.latency_ms}
            for a, timing in zip(networks, found.whole, strict=True)
        ]
        pd.DataFrame(rows).assign(noise_floor=found.noise_floor).to_csv(path, index=False)
    return pd.read_csv(path)


def choices(
    work: Path, seed: int, learned: list[Learned], space: SearchSpace, data: Data
) -> list[tuple[str, ...]]:
    """Of each target what each of `RULES` chooses."""
    judge = SharedWeightsJudge(read_supernet(work / f"seed={seed}", space, 10), data, seed=seed)
    ranked = [str(r.architecture) for r in judge(all_architectures(space))]
    everyone = {str(a): a for a in all_architectures(space)}
    chosen = []
    for target in learned:
        budget_ms = target.budget_ms
        assert budget_ms is not None
        (probable,) = most_probable_within(
            target.distribution.probabilities(),
            target.latency_ms,
            budget_ms=budget_ms,
            base_ms=target.base_ms,
            count=1,
            space=space,
            least_used=LEAST_USED,
        )
        within = (
            name
            for name in ranked
            if LEAST_USED * budget_ms
            <= predict(space, everyone[name], target.latency_ms, target.base_ms)
            <= budget_ms
        )
        chosen.append((str(probable), next(within)))
    return chosen


def compared(
    work: Path, space: SearchSpace, data: Data, table: LatencyTable
) -> tuple[pd.DataFrame, float]:
    """A row per seed, budget and rule: the chosen network against random ones of its latency."""
    networks = timed(work, space, data)
    ms = dict(zip(networks.blocks, networks.ms, strict=True))
    truth = pd.read_csv(HERE / "truth.csv").groupby("blocks").accuracy.mean()
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        learned = search_once(work, seed, space, data, table)
        for fraction, pair in zip(
            FRACTIONS, choices(work, seed, learned, space, data), strict=True
        ):
            for rule, name in zip(RULES, pair, strict=True):
                alike = [n for n in ms if n != name and abs(ms[n] / ms[name] - 1) <= SAME]
                chance = random.Random(f"{seed} {fraction} {rule}")
                drawn = truth[chance.sample(alike, min(RANDOM, len(alike)))]
                rows.append(
                    {
                        "seed": seed,
                        "fraction": fraction,
                        "rule": rule,
                        "ms": ms[name],
                        "accuracy": truth[name],
                        "alike": len(alike),
                        "random_mean": drawn.mean(),
                        "random_best": drawn.max(),
                        "all_alike_mean": truth[alike].mean(),
                        "better_than": (truth[alike] < truth[name]).mean(),
                        "blocks": name,
                    }
                )
    return pd.DataFrame(rows), float(networks.noise_floor.iloc[0])


def search_once(
    work: Path, seed: int, space: SearchSpace, data: Data, table: LatencyTable
) -> list[Learned]:
    targets = [target_at(table, space, data.classes, fraction) for fraction in FRACTIONS]
    settings = SearchSettings(**COMMON)
    return searched(work / f"seed={seed}", space, data, targets, settings=settings, seed=seed)


def words(rows: pd.DataFrame, noise_floor: float, table: LatencyTable) -> str:
    truth = pd.read_csv(HERE / "truth.csv").groupby("blocks").accuracy
    lines = [
        circumstances(DEVICE),
        f"{table.header['calibration']}. All networks timed together: noise floor "
        f"{100 * noise_floor:.1f} %. One network's seeds differ by "
        f"{100 * truth.var().mean() ** 0.5:.2f} points (standard deviation), a mean of three by "
        f"{100 * (truth.var().mean() / 3) ** 0.5:.2f}.",
        "",
        "| rule | at | chosen, ms | chosen, % | ten random of that latency: mean, best, % | of "
        "all of that latency it beats |",
        "|---|---|---|---|---|---|",
    ]
    for rule, fraction in [(rule, fraction) for rule in RULES for fraction in FRACTIONS]:
        part = rows[(rows.rule == rule) & (rows.fraction == fraction)]
        lines.append(
            f"| {rule} | {fraction} | {part.ms.mean():.4f} | {100 * part.accuracy.mean():.2f} | "
            f"{100 * part.random_mean.mean():.2f}, {100 * part.random_best.mean():.2f} | "
            f"{100 * part.better_than.mean():.0f} % of {part.alike.mean():.0f} |"
        )
    lines.append("")
    for rule in RULES:
        part = rows[rows.rule == rule]
        gain = (part.accuracy - part.random_mean).groupby(part.seed).mean()
        lines.append(
            f"{rule}: {100 * gain.mean():+.2f} points over the mean of random, per search seed "
            + ", ".join(f"{100 * g:+.2f}" for g in gain)
            + f"; {100 * (part.accuracy - part.random_best).mean():+.2f} against the best of ten.\n"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("table", "search", "report"))
    parser.add_argument("cifar", type=Path, help="holds CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("work", type=Path, help="tables, searches; made where it is not there")
    parser.add_argument("--part", default="0/1", help="this part of so many, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    space = SearchSpace.load(HERE / "space.yaml")
    data = small_cifar(arguments.cifar, space)
    arguments.work.mkdir(parents=True, exist_ok=True)
    table = calibrated_table(
        arguments.work / "table.csv",
        space,
        DEVICE,
        classes=data.classes,
        networks=FITTED,
        held_out=JUDGED,
    )
    if arguments.what == "table":
        print(f"{len(timed(arguments.work, space, data))} networks timed")
    elif arguments.what == "search":
        for seed in part_of(SEEDS, arguments.part):
            search_once(arguments.work, seed, space, data, table)
    else:
        rows, noise_floor = compared(arguments.work, space, data, table)
        rows.to_csv(HERE / "measured.csv", index=False, float_format="%.5g")
        report = words(rows, noise_floor, table)
        (HERE / "measured.md").write_text(report)
        print(report)


if __name__ == "__main__":
    main()
