"""How many images, and whose statistics, does the first look at many candidates need?

    python scripts/ground_truth/screening.py CIFAR_FOLDER WORK

WORK is that of study.py, after its searches. For every seed of the default method (`hard`) and each
number of images for batch statistics (0: the supernet's own) and for judging: Kendall's tau with
the truth within a budget, and the regret of the best network among the quarter that ranks first,
which is what a second look can still find; means over the five budgets. Writes screening.csv.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import kendalltau
from study import HERE, SEEDS, Study, Truth, read_truth
from truth import all_architectures

from fbnas.search import LEAST_USED, Ranked, SharedWeightsJudge, read_supernet

METHOD = "hard"
LOOKS = ((0, 128), (0, 256), (0, 512), (64, 256), (64, 512), (512, 640))


def looks(study: Study, truth: Truth, seed: int) -> list[dict[str, float]]:
    """A row per look of the supernet of a seed."""
    supernet = read_supernet(study.folder(METHOD, seed), study.space, study.data.classes)
    everyone = list(all_architectures(study.space))
    rows = []
    for calibration, held_out in LOOKS:
        images = {"calibration_images": calibration, "held_out_images": held_out}
        ranked = SharedWeightsJudge(supernet, study.data, seed=seed, **images)(everyone)
        found = [compared(ranked, truth, budget_ms) for budget_ms in study.budgets_ms]
        taus, regrets = zip(*found, strict=True)
        means = {"tau": sum(taus) / len(taus), "regret": sum(regrets) / len(regrets)}
        rows.append({"seed": seed, **images, **means})
    return rows


def compared(ranked: list[Ranked], truth: Truth, budget_ms: float) -> tuple[float, float]:
    """Kendall's tau with the truth near a budget, and the least regret in the first quarter."""
    reach = set(truth.within(budget_ms, LEAST_USED))
    order = [name for r in ranked if (name := str(r.architecture)) in reach]
    places = range(len(order), 0, -1)
    tau = kendalltau(places, [truth.accuracy[name] for name in order]).statistic
    first = order[: max(len(order) // 4, 1)]
    return tau, 100 * min(truth.regret(name, budget_ms) for name in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cifar", type=Path, help="holds CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("work", type=Path, help="the searches of study.py")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    study = Study(arguments.cifar, arguments.work)
    truth = read_truth(HERE / "truth.csv", study.space, study.table)
    table = pd.DataFrame([row for seed in SEEDS for row in looks(study, truth, seed)])
    table.to_csv(HERE / "screening.csv", index=False, float_format="%.4g")
    by_look = table.groupby(["calibration_images", "held_out_images"])[["tau", "regret"]]
    print(by_look.agg(["mean", "std"]).round(2).to_string())


if __name__ == "__main__":
    main()
