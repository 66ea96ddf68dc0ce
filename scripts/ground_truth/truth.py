"""The truth: every network of space.yaml trained alone, with several seeds, on real images.

    python scripts/ground_truth/truth.py CIFAR_FOLDER scripts/ground_truth/truth.csv [--part 0/2]

CIFAR_FOLDER holds train.parquet and test.parquet. A row per training is appended as it ends, so
the same command continues; parts of the work may run side by side, each into the same file. Seeds
are the outer loop: after the first third every network has one.
"""

import argparse
import itertools
import time
from pathlib import Path

import pandas as pd
import torch

from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import Data, TrainingSettings, evaluate, load_data, train

HERE = Path(__file__).parent
SETTINGS = TrainingSettings(epochs=6, batch_size=64, ema=0.99, augment={"flip": True}, device="cpu")
LIMIT = 4000  # training images, of which a fifth validates
SEEDS = (0, 1, 2)
COLUMNS = ("blocks", "seed", "accuracy", "validation_accuracy", "seconds")


def small_cifar(folder: Path, space: SearchSpace) -> Data:
    """The first `LIMIT` images of CIFAR-10 in a seeded, stratified order, at 16x16."""
    return load_data("huggingface", path=str(folder), resize=True, space=space, limit=LIMIT)


def all_architectures(space: SearchSpace) -> list[Architecture]:
    """Every network of a space, in lexical order of its blocks."""
    choices = itertools.product(*(layer.blocks for layer in space.layers))
    return [Architecture(tuple(blocks), space.name) for blocks in choices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cifar", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", default="0/1", help="this part of so many, from 0")
    parser.add_argument("--most", type=int, default=0, help="end after so many trainings; 0: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    space = SearchSpace.load(HERE / "space.yaml")
    data = small_cifar(arguments.cifar, space)
    part, parts = map(int, arguments.part.split("/"))
    work = [(seed, a) for seed in SEEDS for a in all_architectures(space)]
    # A stride that is prime to the size mixes slow and fast networks: time left can be estimated.
    mixed = [work[i * 89 % len(work)] for i in range(len(work))]
    mixed.sort(key=lambda item: item[0])
    done = set()
    if arguments.out.is_file():
        known = pd.read_csv(arguments.out)
        done = set(zip(known.blocks, known.seed, strict=True))
    else:
        arguments.out.write_text(",".join(COLUMNS) + "\n")
    left = [(s, a) for s, a in mixed[part::parts] if (" ".join(a.blocks), s) not in done]
    for number, (seed, architecture) in enumerate(left, start=1):
        if number > arguments.most > 0:
            break
        started = time.monotonic()
        torch.manual_seed(seed)
        network = build_network(space, architecture, data.classes)
        result = train(network, data, settings=SETTINGS, seed=seed)
        _, accuracy = evaluate(result.network, data.test, mean=data.mean, std=data.std)
        seconds = time.monotonic() - started
        row = (" ".join(architecture.blocks), seed, f"{accuracy:.4f}",
               f"{result.validation_accuracy:.4f}", f"{seconds:.1f}")  # fmt: skip
        with arguments.out.open("a") as file:
            file.write(",".join(map(str, row)) + "\n")
        print(f"{number}/{len(left)} seed {seed} {architecture}: {accuracy:.4f}, {seconds:.1f} s",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
