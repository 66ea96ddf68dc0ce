"""Deep Compression of the paper's two LeNets on real images, and of an FBNet: sizes and accuracies.

    python scripts/deep_compression/measure.py WORK --mnist FOLDER --fashion FOLDER

README.md says where the images come from. What is trained is kept in WORK: the script goes on where
it was stopped, and writes result.csv, layers.csv and result.md beside itself.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lenet import PAPER, LayerDensities, idx_data, lenet
from torch import nn

from fbnas.compression import (
    WeightSharing,
    compress_,
    describe,
    pack,
    unpack,
    unpack_,
    write_packed,
)
from fbnas.files import atomic_write, read_json, write_json
from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training.data import Data, load_data
from fbnas.training.evaluation import evaluate
from fbnas.training.loop import train
from fbnas.training.settings import TrainingSettings

HERE = Path(__file__).parent
SHAPE = (1, 28, 28)
COMMON = {"batch_size": 128, "label_smoothing": 0.0, "weight_decay": 1e-4}
# Epochs and rates: of the training, of each of the steps of pruning, of the shared values. The last
# is small because the gradient of a value is the sum over all weights that share it.
RECIPES: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "train": {"epochs": 15, "lr": 0.1, "ema": 0.99},
        "prune": {"epochs": 5, "lr": 0.05, "ema": 0.99},
        "share": {"epochs": 3, "lr": 0.0003, "ema": 0.99},
        "steps": 4,
    },
    "lenet_5": {
        "train": {"epochs": 6, "lr": 0.05, "ema": 0.99},
        "prune": {"epochs": 2, "lr": 0.02, "ema": 0.99},
        "share": {"epochs": 1, "lr": 0.0001, "ema": 0.99},
        "steps": 3,
    },
}


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    for source in ("mnist", "fashion"):
        folder = getattr(arguments, source)
        for name in arguments.networks if folder else ():
            data = idx_data(source, folder)
            for seed in range(arguments.seeds):
                study(arguments.work / f"{source}_{name}_{seed}", name, data, seed)
    write_results(arguments.work)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--networks", nargs="*", default=list(PAPER), choices=list(PAPER))
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


def study(folder: Path, name: str, data: Data, seed: int) -> None:
    """Train, prune, share and pack one network, unless that was done."""
    if (folder / "facts.json").is_file():
        return
    paper, recipe, started = PAPER[name], RECIPES[name], time.perf_counter()
    torch.manual_seed(seed)
    network = lenet(name)
    trainer(data, recipe["train"], seed)(network)
    accuracy = {"trained": tested(network, data)}
    compress_(
        network,
        LayerDensities(paper.density, recipe["steps"]),
        input_shape=SHAPE,
        train=trainer(data, recipe["prune"], seed),
    )
    accuracy["pruned"] = tested(network, data)
    pruned = copy.deepcopy(network)
    sharing = WeightSharing(conv_bits=paper.conv_bits, linear_bits=paper.linear_bits)
    compress_(pruned, sharing, input_shape=SHAPE, seed=seed)
    accuracy["shared, before fine-tuning"] = tested(pruned, data)
    train_values = trainer(data, recipe["share"], seed)
    compress_(network, sharing, input_shape=SHAPE, train=train_values, seed=seed)
    accuracy["shared"] = tested(network, data)
    for coder in ("huffman", "arithmetic"):
        write_packed(network, folder / f"{coder}.packed", coder)
    seconds = time.perf_counter() - started
    read_back = lenet(name)
    unpack_(read_back, (folder / "arithmetic.packed").read_bytes())
    accuracy["read back"] = tested(read_back, data)
    write_json(folder / "facts.json", {"accuracy": accuracy, "seconds": seconds})
    print(folder.name, {k: round(v, 4) for k, v in accuracy.items()}, round(seconds), flush=True)


def trainer(data: Data, settings: dict[str, Any], seed: int) -> Callable[[nn.Module], Any]:
    def run(network: nn.Module) -> Any:
        return train(network, data, settings=TrainingSettings(**COMMON, **settings), seed=seed)

    return run


def tested(network: nn.Module, data: Data) -> float:
    return evaluate(network, data.test, mean=data.mean, std=data.std)[1]


def write_results(work: Path) -> None:
    pass


if __name__ == "__main__":
    main()
