"""Tickets against their control, and ways to choose the same number of zeros.

    python scripts/sparsity/study.py tickets digits OUT.csv [--seeds 3]
    python scripts/sparsity/study.py scopes digits OUT.csv [--seeds 3]
    ... cifar OUT.csv --path FOLDER        CIFAR-10's parquet files, 3,000 training images at 16x16

`tickets`: LotteryTicket(control=True), rewound to the initialisation and to the weights after an
epoch. `scopes`: Sparsity by each scope, fine-tuned, with the scan of each layer. digits: the
fully connected LeNet-300-100 of Frankle & Carbin 2019 for tickets, a small convolutional network
for scopes; CIFAR-10: the convolutional network for both. A row per seed and round, or per seed and
scope; validation accuracy, which also chose the epoch that is kept. Rows are appended as they come.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbnas.compression import LotteryTicket, Sparsity, compress_
from fbnas.compression.lottery import initialise_anew_
from fbnas.training import load_data, train
from fbnas.training.data import Data
from fbnas.training.settings import TrainingSettings

SETTINGS = TrainingSettings(epochs=15, lr=0.05)
TUNING = replace(SETTINGS, epochs=5, lr=0.01)
SPARSITIES = (0.8, 0.9, 0.95)


def data_of(name: str, path: str | None) -> Data:
    if name == "digits":
        return load_data("digits")
    return load_data("huggingface", path=path, resize=True, resolution=16, limit=3750)


def lenet(data: Data) -> nn.Module:
    pixels = data.channels * data.resolution**2
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, data.classes),
    )  # fmt: skip


def convolutional(data: Data) -> nn.Module:
    def layer(before: int, after: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *layer(data.channels, 16, 1), *layer(16, 32, 2), *layer(32, 32, 2), nn.Flatten(),
        nn.Linear(32 * (data.resolution // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, data.classes),
    )  # fmt: skip


def trainer(data: Data, seed: int, settings: TrainingSettings) -> Callable[..., Any]:
    def fit(network: nn.Module, epochs: int = settings.epochs) -> Any:
        return train(network, data, settings=replace(settings, epochs=epochs), seed=seed)

    return fit


def tickets(data: Data, out: Path, seeds: int) -> None:
    network = (lenet if data.name == "digits" else convolutional)(data)
    shape = (data.channels, data.resolution, data.resolution)
    for seed in range(seeds):
        for rewind_epochs in (0, 1):
            rounds, fraction = (6, 0.4) if data.name == "digits" else (4, 0.5)
            method = LotteryTicket(rounds, fraction, control=True, rewind_epochs=rewind_epochs)
            fit = trainer(data, seed, SETTINGS)
            report = compress_(
                network, method, input_shape=shape, train_anew=fit, data=data, seed=seed
            )
            for x in report.changes:
                add(out, data.name, seed, rewind_epochs, x.number, round(x.sparsity, 4),
                    x.accuracy, x.control_accuracy)  # fmt: skip
            initialise_anew_(network, 0)  # without zeros


def scopes(data: Data, out: Path, seeds: int) -> None:
    shape = (data.channels, data.resolution, data.resolution)
    for seed in range(seeds):
        whole = convolutional(data)
        initialise_anew_(whole, seed)
        train(whole, data, settings=SETTINGS, seed=seed)
        trained = {name: value.clone() for name, value in whole.state_dict().items()}
        for sparsity in SPARSITIES:
            for scope in ("layer", "global", "sensitivity"):
                for steps in (1, 3):
                    whole.load_state_dict(trained)
                    fit = trainer(data, seed, TUNING)
                    report = compress_(
                        whole, Sparsity(sparsity, scope, steps), input_shape=shape, train=fit,
                        data=data, folder=out.parent / f"{data.name}_{seed}",
                    )  # fmt: skip
                    add(out, data.name, seed, sparsity, scope, steps, report.before.accuracy,
                        report.after.accuracy)  # fmt: skip


def add(out: Path, *values: Any) -> None:
    line = ",".join("" if value is None else f"{value}" for value in values)
    print(line, flush=True)
    with out.open("a") as file:
        file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("tickets", "scopes"))
    parser.add_argument("data", choices=("digits", "cifar"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--path")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = {
        "tickets": "data,seed,rewind_epochs,round,sparsity,accuracy,control_accuracy",
        "scopes": "data,seed,sparsity,scope,steps,accuracy_before,accuracy",
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(head[given.study] + "\n")
    study = {"tickets": tickets, "scopes": scopes}[given.study]
    study(data_of(given.data, given.path), given.out, given.seeds)


if __name__ == "__main__":
    main()
