"""How near does each way of choosing come to the best network of the whole space?

    python scripts/ground_truth/study.py search CIFAR_FOLDER WORK [--part 0/2] [--methods hard,all]
    python scripts/ground_truth/study.py judge CIFAR_FOLDER WORK

`search` runs every method with every seed, one search for five budgets each, into WORK (a search
that is whole is not run again; parts may run side by side). `judge` reads what they found, lets the
shared weights rank the space, looks every choice up in truth.csv, and writes study.csv, ranks.csv,
study.md and study.png beside this file.

Regret: accuracy of the best network within the budget, less that of the chosen one, both as trained
alone (test images, means over seeds of truth.csv). The budgets are those of a planned
microcontroller (`device=roofline`), whose table is the same on every machine.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn import functional as F
from truth import HERE, all_architectures, small_cifar

from fbnas.files import read_json, write_json
from fbnas.latency import LatencyTable, profile
from fbnas.latency.calibration import predict
from fbnas.latency.roofline import Roofline
from fbnas.search import (
    LEAST_USED,
    SearchSettings,
    SharedWeightsJudge,
    Target,
    build_objective,
    latency_range,
    loop,
    most_probable_within,
    read_result,
    read_supernet,
    search,
)
from fbnas.search.loop import Loop
from fbnas.space import Architecture, SearchSpace
from fbnas.training import Data

FRACTIONS = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the way from the fastest to the slowest network
SEEDS = (0, 1, 2, 3, 4)
EPOCHS = 60  # the default of search=fast
TOP = 10  # of the most probable, from which the shared weights choose
FEW = 4  # of the best ranked, which are trained to keep the best by validation images
MICROCONTROLLER = Roofline(
    name="microcontroller", gmacs_per_s=0.2, bandwidth_gb_per_s=0.2, overhead_us=20.0
)
COMMON = {"epochs": EPOCHS, "augment": {"flip": True}, "device": "cpu"}
PUBLISHED = {
    "weights_on": "gates",
    "theta_step": "all",
    "tau": 5.0,
    "tau_final": None,
    "theta_lr": 0.01,
    "theta_weight_decay": 5e-4,
    "warmup_fraction": 10 / 90,
    "clip_norm": None,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fbnet": ("fbnet_additive", PUBLISHED),
    "hard": ("target", {"weights_on": "path"}),
    "hard, not clipped": ("target", {"weights_on": "path", "clip_norm": None}),
    "hard, lr 0.05": ("target", {"weights_on": "path", "weights_lr": 0.05}),
    "hard, taught by the largest": ("target", {"weights_on": "path"}),
    "two_paths": ("target", {"weights_on": "path", "theta_step": "two_paths"}),
    "all": ("target", {"weights_on": "path", "theta_step": "all", "tau": 2.0, "tau_final": 0.3}),
    "hard, weights on uniform paths": ("target", {"weights_on": "uniform"}),
    "fbnet, target objective": ("target", PUBLISHED),
}
BLIND = ("fbnet_additive",)  # to the budget: one theta serves all


class Taught(Loop):
    """Each weights step trains the largest network too, and the path by its answers.

    The sandwich of Yu et al. 2020 (BigNAS, arXiv 2003.11142), with one path between its halves: the
    largest learns the labels, the path the probabilities that the largest gives.
    """

    def weights_step(self, images: Tensor, labels: Tensor, gates: Tensor | list[int]) -> None:
        largest = [self.supernet.space.blocks.index("k5_e6")] * len(self.supernet.layers)
        self.weights_optimiser.zero_grad(set_to_none=True)
        told = self.supernet(images, largest)
        scores = self.supernet(images, gates)
        loss = self.task.loss(scores.detach(), labels)  # what is shown, as of other methods
        soft = F.kl_div(scores.log_softmax(1), told.detach().softmax(1), reduction="batchmean")
        self.fabric.backward(self.task.loss(told, labels) + soft)
        self.count("weights", loss, scores, labels)
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.supernet.parameters(), self.settings.clip_norm)
        self.weights_optimiser.step()


@dataclass(frozen=True)
class Truth:
    """What every network does alone, and its latency, by its blocks."""

    accuracy: dict[str, float]  # test, mean over seeds
    validation: list[dict[str, float]]  # of each seed
    seconds: float
    latency_ms: dict[str, float]
    spreads: tuple[float, float]  # of networks' means, of a network's seeds

    def within(self, budget_ms: float, least: float = 0.0) -> list[str]:
        names = self.latency_ms.items()
        return [name for name, ms in names if least * budget_ms <= ms <= budget_ms]

    def regret(self, name: str, budget_ms: float) -> float:
        best = max(self.accuracy[other] for other in self.within(budget_ms))
        return best - self.accuracy[name]


def read_truth(path: Path, space: SearchSpace, table: LatencyTable) -> Truth:
    rows = pd.read_csv(path)
    by_network = rows.groupby("blocks").accuracy
    latency_ms, base_ms = table.tensor(space, classes=10)
    everyone = {str(a): a for a in all_architectures(space)}
    missing = [n for n, many in by_network.count().reindex(list(everyone)).items() if not many > 0]
    if missing:
        raise SystemExit(f"{path} misses {len(missing)} networks, as {missing[0]}: run truth.py")
    return Truth(
        accuracy=dict(by_network.mean()),
        validation=[
            dict(zip(part.blocks, part.validation_accuracy, strict=True))
            for _, part in rows.groupby("seed")
        ],
        seconds=float(rows.seconds.median()),
        latency_ms={n: predict(space, a, latency_ms, base_ms) for n, a in everyone.items()},
        spreads=(float(by_network.mean().std()), float(by_network.var().mean() ** 0.5)),
    )


class Study:
    """The space, its table and budgets, the images."""

    def __init__(self, cifar: Path, work: Path) -> None:
        self.space = SearchSpace.load(HERE / "space.yaml")
        self.data: Data = small_cifar(cifar, self.space)
        self.work = work
        self.table = profile(
            self.space, MICROCONTROLLER, HERE / "table.csv", classes=self.data.classes
        )
        fastest_ms, slowest_ms = latency_range(*self.table.tensor(self.space, classes=10))
        self.budgets_ms = [fastest_ms + f * (slowest_ms - fastest_ms) for f in FRACTIONS]

    def folder(self, method: str, seed: int) -> Path:
        return self.work / method.replace(", ", "-").replace(" ", "_") / f"seed={seed}"

    def search(self, method: str, seed: int) -> None:
        out = self.folder(method, seed)
        objective, own = METHODS[method]
        blind = objective in BLIND
        started = time.monotonic()
        loop.Loop = Taught if "taught" in method else Loop  # type: ignore[misc]
        search(
            self.space,
            self.data,
            [Target(self.table, ms) for ms in self.budgets_ms[: 1 if blind else None]],
            objective=build_objective(objective),
            settings=SearchSettings(**{**COMMON, **own}),
            seed=seed,
            out=out,
            resume=True,
        )
        write_json(out / "seconds.json", time.monotonic() - started)

    def chosen(
        self, method: str, seed: int, truth: Truth
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return a row per budget and rule, and a row per way in which shared weights rank."""
        out, classes = self.folder(method, seed), self.data.classes
        _, learned, _ = read_result(out)
        scores = self._scores(out, seed)
        who = {"method": method, "seed": seed}
        latency_ms, base_ms = self.table.tensor(self.space, classes=classes)
        rows, ranks = [], []
        thetas = learned * len(FRACTIONS) if len(learned) == 1 else learned
        for fraction, budget_ms, found in zip(FRACTIONS, self.budgets_ms, thetas, strict=True):
            probable = most_probable_within(
                found.distribution.probabilities(),
                latency_ms,
                budget_ms=budget_ms,
                base_ms=base_ms,
                count=TOP,
                space=self.space,
                least_used=LEAST_USED,
            )
            reach = truth.within(budget_ms, LEAST_USED)
            for rule, name in self._rules(probable, reach, scores, truth, seed).items():
                rows.append(
                    {
                        **who,
                        "fraction": fraction,
                        "rule": rule,
                        "regret": truth.regret(name, budget_ms),
                        "used": truth.latency_ms[name] / budget_ms,
                        "blocks": name,
                    }
                )
            ranks += _ranks({**who, "within": fraction}, reach, scores, truth)
        ranks += _ranks({**who, "within": "all"}, list(truth.accuracy), scores, truth)
        return rows, ranks

    def _scores(self, out: Path, seed: int) -> dict[tuple[str, str], dict[str, float]]:
        """What the shared weights make of every network, by what they judge and batch statistics.

        More is better. Judged once, and kept beside the search.
        """
        file = out / "judged.json"
        if not file.is_file():
            supernet = read_supernet(out, self.space, self.data.classes)
            found = {}
            for bn, images in (("recalibrated", 512), ("of the supernet", 0)):
                judge = SharedWeightsJudge(
                    supernet, self.data, seed=seed, calibration_images=images
                )
                found[bn] = [
                    (str(r.architecture), -r.cross_entropy, r.accuracy)
                    for r in judge(all_architectures(self.space))
                ]
            write_json(file, found)
        scores = {}
        for bn, networks in read_json(file).items():
            scores[bn, "cross-entropy"] = {name: loss for name, loss, _ in networks}
            scores[bn, "accuracy"] = {name: accuracy for name, _, accuracy in networks}
        return scores

    def _rules(
        self,
        probable: list[Architecture],
        reach: list[str],
        scores: dict[tuple[str, str], dict[str, float]],
        truth: Truth,
        seed: int,
    ) -> dict[str, str]:
        best = scores["recalibrated", "accuracy"]
        few = sorted(reach, key=best.__getitem__)[-FEW:]
        validation = truth.validation[seed % len(truth.validation)]
        return {
            "most probable": str(probable[0]),
            f"best ranked of the {TOP} most probable": max(
                map(str, probable), key=best.__getitem__
            ),
            "best ranked of all": max(reach, key=best.__getitem__),
            f"{FEW} best ranked of all, trained": max(few, key=validation.__getitem__),
            **{
                f"best of all by {by}, batch statistics {bn}": max(reach, key=score.__getitem__)
                for (bn, by), score in scores.items()
                if score is not best
            },
        }


def _ranks(
    where: dict[str, Any],
    names: list[str],
    scores: dict[tuple[str, str], dict[str, float]],
    truth: Truth,
) -> list[dict[str, Any]]:
    known = [truth.accuracy[name] for name in names]
    return [
        {
            **where,
            "by": by,
            "bn": bn,
            "kendall": float(kendalltau([score[name] for name in names], known).statistic),
        }
        for (bn, by), score in scores.items()
    ]


def random_search(truth: Truth, budget_ms: float, count: int, repeats: int = 600) -> float:
    """Mean regret of training `count` random networks at the budget, keeping the best."""
    reach, chance, found = truth.within(budget_ms, LEAST_USED), random.Random(0), 0.0
    for i in range(repeats):
        validation = truth.validation[i % len(truth.validation)]
        drawn = chance.sample(reach, min(count, len(reach)))
        found += truth.regret(max(drawn, key=validation.__getitem__), budget_ms)
    return found / repeats


def words(study: Study, rows: pd.DataFrame, ranks: pd.DataFrame, truth: Truth) -> str:
    """The summary: mean regret and its spread over seeds, beside what chance gives."""
    between, within = truth.spreads
    reach = [truth.within(budget_ms, LEAST_USED) for budget_ms in study.budgets_ms]
    lines = [
        f"{len(truth.accuracy)} networks, {len(truth.validation)} seeds each: their mean "
        f"accuracies lie from {100 * min(truth.accuracy.values()):.1f} to "
        f"{100 * max(truth.accuracy.values()):.1f} %, with a standard deviation of "
        f"{100 * between:.2f} points; one network's seeds have {100 * within:.2f}. At 0.9 to 1.0 "
        f"of the five budgets lie {', '.join(str(len(names)) for names in reach)} networks, with "
        + ", ".join(
            f"{100 * pd.Series([truth.accuracy[n] for n in names]).std():.2f}" for names in reach
        )
        + " points.",
        "",
        "| method | rule | regret, points: mean over budgets and seeds (spread of seeds' means) | "
        "budget used | search, s |",
        "|---|---|---|---|---|",
    ]
    table = []
    for (method, rule), part in rows.groupby(["method", "rule"], sort=False):
        means = part.groupby("seed").regret.mean()
        spread = means.std() if len(means) > 1 else float("nan")
        table.append(
            (
                100 * means.mean(),
                f"| {method} | {rule} | {100 * means.mean():.2f} ({100 * spread:.2f}) | "
                f"{part.used.mean():.2f} | {part.seconds.median():.0f} |",
            )
        )
    chance = [random_search(truth, budget_ms, 1) for budget_ms in study.budgets_ms]
    mean = 100 * sum(chance) / len(chance)
    table.append((mean, f"| chance | a random network in reach | {mean:.2f} | | |"))
    for method, spent in rows.groupby("method").seconds.median().items():
        count = max(round(spent / len(FRACTIONS) / truth.seconds), 1)
        regrets = [random_search(truth, budget_ms, count) for budget_ms in study.budgets_ms]
        mean = 100 * sum(regrets) / len(regrets)
        table.append(
            (
                mean,
                f"| chance | best by validation of {count} random ones a budget, as dear as "
                f"{method} | {mean:.2f} | | {spent:.0f} |",
            )
        )
    lines += [line for _, line in sorted(table)]
    lines += [
        "",
        "Kendall's tau of the shared weights' ranking with the truth (mean over seeds; within a "
        "budget: over budgets too):",
        "",
        "| method | judged by | batch statistics | within a budget | all networks |",
        "|---|---|---|---|---|",
    ]
    for (method, by, bn), part in ranks.groupby(["method", "by", "bn"], sort=False):
        everyone = part["within"] == "all"
        lines.append(
            f"| {method} | {by} | {bn} | {part[~everyone].kendall.mean():.2f} | "
            f"{part[everyone].kendall.mean():.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: pd.DataFrame, chance: float, path: Path) -> None:
    """Each seed's mean regret, per method and rule, beside chance."""
    import matplotlib.pyplot as plt

    means = rows.groupby(["method", "rule", "seed"], sort=False).regret.mean().mul(100)
    means = means.sort_index()
    order = means.groupby(["method", "rule"]).mean().sort_values(ascending=False).index
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(order) + 1.2))
    for place, pair in enumerate(order):
        values = means[pair]
        axes.plot(values, [place] * len(values), "o", color="#4477aa", alpha=0.5, markersize=4)
        axes.plot(values.mean(), place, "|", color="#aa3377", markersize=11, markeredgewidth=2)
    axes.axvline(chance, color="#777777", linestyle="--", linewidth=1)
    axes.text(chance, len(order), " a random network", color="#777777", va="top", fontsize=8)
    axes.set_yticks(range(len(order)), [f"{method}: {rule}" for method, rule in order], fontsize=7)
    axes.set_xlabel("regret, points of accuracy (dots: seeds, bar: their mean)")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("search", "judge"))
    parser.add_argument("cifar", type=Path, help="holds CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("work", type=Path, help="the searches; made where it is not there")
    parser.add_argument("--part", default="0/1", help="this part of so many, from 0")
    parser.add_argument("--methods", default=";".join(METHODS), help="some, parted by ;")
    parser.add_argument("--truth", type=Path, default=HERE / "truth.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(arguments.cifar, arguments.work)
    methods = arguments.methods.split(";")
    work = [(method, seed) for seed in SEEDS for method in methods]
    if arguments.what == "search":
        part, parts = map(int, arguments.part.split("/"))
        for method, seed in work[part::parts]:
            if not (study.folder(method, seed) / "seconds.json").is_file():
                print(f"{method}, seed {seed}", flush=True)
                study.search(method, seed)
        return
    truth = read_truth(arguments.truth, study.space, study.table)
    rows, ranks = [], []
    for method, seed in work:
        file = study.folder(method, seed) / "seconds.json"
        if file.is_file():
            chosen, order = study.chosen(method, seed, truth)
            rows += [{**row, "seconds": read_json(file)} for row in chosen]
            ranks += order
    table, order = pd.DataFrame(rows), pd.DataFrame(ranks)
    table.to_csv(HERE / "study.csv", index=False, float_format="%.5g")
    order.to_csv(HERE / "ranks.csv", index=False, float_format="%.4g")
    report = words(study, table, order, truth)
    (HERE / "study.md").write_text(report)
    chance = [random_search(truth, budget_ms, 1) for budget_ms in study.budgets_ms]
    plot(table, 100 * sum(chance) / len(chance), HERE / "study.png")
    print(report)


if __name__ == "__main__":
    main()
