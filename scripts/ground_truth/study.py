"""How near does each way of choosing come to the best network of the whole space?

    python scripts/ground_truth/study.py CIFAR_FOLDER scripts/ground_truth [--seeds 5]
        [--methods hard,two_paths]

Needs truth.csv (truth.py) and makes table.csv of this machine where there is none. Every method is
one search for five budgets. Regret: accuracy of the best network within the budget, less that of
the chosen one, both as trained alone (means over seeds of truth.csv). A row per method, seed and
budget is appended to study.csv, so the same command continues; study.md is the summary.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import kendalltau
from truth import HERE, all_architectures, small_cifar

from fbnas.latency import Device, LatencyTable, profile
from fbnas.latency.calibration import predict
from fbnas.search import (
    LEAST_USED,
    SearchResult,
    SearchSettings,
    Target,
    latency_range,
    most_probable_within,
    rank_by_shared_weights,
    search,
)
from fbnas.space import Architecture, SearchSpace
from fbnas.training import Data

FRACTIONS = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the way from the fastest to the slowest network
EPOCHS = 40
TOP = 10  # of the most probable, from which the shared weights choose
COMMON = {"epochs": EPOCHS, "batch_size": 64, "augment": {"flip": True}, "device": "cpu"}
PUBLISHED = {
    "weights_on": "gates",
    "theta_step": "all",
    "tau": 5.0,
    "tau_final": None,
    "theta_lr": 0.01,
    "theta_weight_decay": 5e-4,
    "warmup_fraction": 10 / 90,
}
METHODS = {
    "fbnet": PUBLISHED,
    "hard": {},
    "two_paths": {"theta_step": "two_paths"},
    "all": {"theta_step": "all", "tau": 5.0, "tau_final": None},
    "hard, weights on uniform paths": {"weights_on": "uniform"},
}


@dataclass(frozen=True)
class Truth:
    """Accuracy alone, mean over seeds, and latency of every network, by its blocks."""

    accuracy: dict[str, float]
    validation: dict[str, float]
    seconds: float
    latency_ms: dict[str, float]

    def within(self, budget_ms: float, least: float = 0.0) -> list[str]:
        names = self.latency_ms.items()
        return [name for name, ms in names if least * budget_ms <= ms <= budget_ms]

    def best(self, budget_ms: float) -> float:
        return max(self.accuracy[name] for name in self.within(budget_ms))


def truth_of(path: Path, space: SearchSpace, table: LatencyTable) -> Truth:
    rows = pd.read_csv(path)
    means = rows.groupby("blocks")[["accuracy", "validation_accuracy"]].mean()
    latency_ms, base_ms = table.tensor(space, classes=10)
    everyone = {str(a): a for a in all_architectures(space)}
    return Truth(
        dict(means.accuracy),
        dict(means.validation_accuracy),
        float(rows.seconds.median()),
        {name: predict(space, everyone[name], latency_ms, base_ms) for name in means.index},
    )


def searched(
    method: str, seed: int, space: SearchSpace, data: Data, targets: list[Target]
) -> SearchResult:
    settings = SearchSettings(**{**COMMON, **METHODS[method]})
    return search(space, data, targets, settings=settings, seed=seed)


def judged(found: SearchResult, index: int, truth: Truth, data: Data, seed: int) -> list[dict]:
    """A row per rule for one target: what it chose, its regret, how well shared weights rank."""
    target, space = found.targets[index], found.supernet.space
    budget_ms = target.budget_ms
    assert budget_ms is not None
    latency_ms, base_ms = target.table.tensor(space, classes=data.classes)
    probable = most_probable_within(
        found.distributions[index].probabilities(),
        latency_ms,
        budget_ms=budget_ms,
        base_ms=base_ms,
        count=TOP,
        space=space,
        least_used=LEAST_USED,
    )
    reach = truth.within(budget_ms, LEAST_USED)
    everyone = [Architecture(tuple(name.split()), space.name) for name in reach]
    ranked = rank_by_shared_weights(found.supernet, everyone, data, seed=seed)
    order = {str(r.architecture): -r.cross_entropy for r in ranked}
    accuracy = {str(r.architecture): r.accuracy for r in ranked}
    known = [truth.accuracy[name] for name in reach]
    by_loss, by_accuracy = (
        float(kendalltau([ranks[name] for name in reach], known).statistic)
        for ranks in (order, accuracy)
    )
    chosen = {
        "most probable": str(probable[0]),
        f"best ranked of {TOP} most probable": max(map(str, probable), key=order.__getitem__),
        "best ranked of all in reach": str(ranked[0].architecture),
    }
    return [
        {
            "fraction": FRACTIONS[index],
            "rule": rule,
            "regret": truth.best(budget_ms) - truth.accuracy[name],
            "used": truth.latency_ms[name] / budget_ms,
            "kendall_cross_entropy": by_loss,
            "kendall_accuracy": by_accuracy,
            "blocks": name,
        }
        for rule, name in chosen.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cifar", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    space = SearchSpace.load(HERE / "space.yaml")
    data = small_cifar(arguments.cifar, space)
    table = profile(space, Device(), arguments.folder / "table.csv", classes=data.classes)
    truth = truth_of(arguments.folder / "truth.csv", space, table)
    fastest_ms, slowest_ms = latency_range(*table.tensor(space, classes=data.classes))
    budgets_ms = [fastest_ms + f * (slowest_ms - fastest_ms) for f in FRACTIONS]
    out = arguments.folder / "study.csv"
    done = set()
    if out.is_file():
        known = pd.read_csv(out)
        done = set(zip(known.method, known.seed, strict=True))
    for seed in range(arguments.seeds):
        for method in METHODS:
            if (method, seed) in done or method not in arguments.methods.split(","):
                continue
            started = time.monotonic()
            targets = [Target(table, budget_ms) for budget_ms in budgets_ms]
            found = searched(method, seed, space, data, targets)
            seconds = time.monotonic() - started
            rows = [
                {"method": method, "seed": seed, **row, "seconds": seconds}
                for index in range(len(targets))
                for row in judged(found, index, truth, data, seed)
            ]
            frame = pd.DataFrame(rows)
            frame.to_csv(out, mode="a", header=not out.is_file(), index=False, float_format="%.5g")
            print(frame.groupby("rule").regret.mean().to_string(), flush=True)
    report = words(pd.read_csv(out), truth, budgets_ms)
    (arguments.folder / "study.md").write_text(report)
    print(report)


def words(rows: pd.DataFrame, truth: Truth, budgets_ms: list[float]) -> str:
    """The summary: mean regret and its spread over seeds, beside what chance gives."""
    lines = [
        "| method | rule | regret, % points: mean (spread of seeds' means) | budget used | "
        "Kendall of shared weights: cross-entropy, accuracy | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for (method, rule), part in rows.groupby(["method", "rule"], sort=False):
        means = part.groupby("seed").regret.mean()
        spread = means.std() if len(means) > 1 else float("nan")
        lines.append(
            f"| {method} | {rule} | {100 * means.mean():.2f} ({100 * spread:.2f}) | "
            f"{part.used.mean():.2f} | {part.kendall_cross_entropy.mean():.2f}, "
            f"{part.kendall_accuracy.mean():.2f} | {part.seconds.median():.0f} |"
        )
    chance = []
    for budget_ms in budgets_ms:
        reach = truth.within(budget_ms, LEAST_USED)
        chance.append(truth.best(budget_ms) - sum(truth.accuracy[n] for n in reach) / len(reach))
    mean = 100 * sum(chance) / len(chance)
    lines.append(f"| chance | a random network at 0.9 to 1.0 of the budget | {mean:.2f} | | | |")
    seconds = rows.groupby("method").seconds.median()
    for method, spent in seconds.items():
        count = max(round(spent / len(budgets_ms) / truth.seconds), 1)
        regrets = [random_search(truth, budget_ms, count) for budget_ms in budgets_ms]
        lines.append(
            f"| chance | best by validation of {count} random ones, as dear as {method} | "
            f"{100 * sum(regrets) / len(regrets):.2f} | | | {spent:.0f} |"
        )
    return "\n".join(lines) + "\n"


def random_search(truth: Truth, budget_ms: float, count: int, repeats: int = 500) -> float:
    """Mean regret of training `count` random networks at the budget and keeping the best."""
    reach = truth.within(budget_ms, LEAST_USED)
    generator = torch.Generator().manual_seed(0)
    found = 0.0
    for _ in range(repeats):
        drawn = [reach[i] for i in torch.randperm(len(reach), generator=generator)[:count]]
        best = max(drawn, key=truth.validation.__getitem__)
        found += truth.best(budget_ms) - truth.accuracy[best]
    return found / repeats


if __name__ == "__main__":
    main()
