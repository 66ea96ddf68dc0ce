"""By what gradient, and at what rate, do shared weights learn best?

    python scripts/weight_sharing/measure.py [--orders 6] [--epochs 5] [--out DIR]

The network for digits that the tests ship (93.0 % of the validation images) shares 4 or 8 values a
layer, which are fine-tuned by each gradient at several rates, falling as a cosine, in --orders
orders of the images. Validation accuracy; one thread.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from fbnas.compression import WeightSharing, held, load_any
from fbnas.compression.weight_sharing import share_
from fbnas.latency import Device
from fbnas.training import Data, batches, load_data
from fbnas.training.evaluation import evaluate

sys.path.append(str(Path(__file__).parents[1]))
from steps import circumstances

HERE = Path(__file__).parent
NETWORK = HERE.parents[1] / "tests" / "compression" / "digits_network"
RATES: dict[str, Sequence[float]] = {
    "mean": (0.02, 0.05),
    "scaled_sum": (0.005, 0.02, 0.05),
    "sum": (0.0005, 0.002),
}


def fit(network: nn.Module, data: Data, *, seed: int, epochs: int, rate: float) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, nesterov=True)
    steps = epochs * (len(data.train) // 64)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(epochs):
        for images, labels in batches(
            data.train, 64, generator=generator, mean=data.mean, std=data.std, drop_last=True
        ):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            falling.step()
    network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--orders", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network, card = load_any(NETWORK)
    data = load_data("digits", space=card.space)

    def accuracy(of: nn.Module) -> float:
        return 100 * evaluate(of, data.validation, mean=data.mean, std=data.std)[1]

    lines = [
        "| values | gradient | rate | before, % | after, % (deviation) |",
        "|---|---|---|---|---|",
    ]
    rows = []
    for bits in (2, 3):
        shared = copy.deepcopy(network)
        share_(shared, WeightSharing(conv_bits=bits, linear_bits=bits))
        before = accuracy(shared.eval())
        for gradient, rates in RATES.items():
            for rate in rates:
                found = []
                for seed in range(arguments.orders):
                    tuned = copy.deepcopy(shared)
                    with held(tuned, gradient=gradient):
                        fit(tuned, data, seed=seed, epochs=arguments.epochs, rate=rate)
                    found.append(accuracy(tuned))
                after = pd.Series(found)
                rows.append((2**bits, gradient, rate, before, after.mean(), after.std()))
                lines.append(
                    f"| {2**bits} | {gradient} | {rate:g} | {before:.2f} | {after.mean():.2f} "
                    f"({after.std():.2f}) |"
                )
                print(lines[-1], flush=True)
    names = ["values", "gradient", "rate", "before", "after", "deviation"]
    table = pd.DataFrame(rows, columns=names)
    table.to_csv(arguments.out / "result.csv", index=False, float_format="%.4g")
    words = f"{arguments.epochs} epochs, {arguments.orders} orders of the images."
    text = "\n".join([words, "", circumstances(Device()), *lines])
    (arguments.out / "result.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
