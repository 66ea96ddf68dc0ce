"""A small network, training and judging it in seconds, for the tests of this folder.

Run as a script, it trains the shipped one anew.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fbnas.space import (
    Architecture,
    NetworkCard,
    SearchSpace,
    Stage,
    Stem,
    build_network,
    save_network,
)
from fbnas.training.data import Data, batches, load_data

FOLDER = Path(__file__).parent / "digits_network"
BLOCKS = ("k3_e3", "k5_e1_g2", "k3_e6", "k5_e3", "k3_e1_g2")


@dataclass(frozen=True)
class Trained:
    network: nn.Module
    card: NetworkCard
    data: Data


def fit(network: nn.Module, data: Data, *, epochs: int, rate: float = 0.05) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network gains nothing from more
    network.train()
    for _ in range(epochs):
        shown = batches(
            data.train, 64, generator=generator, mean=data.mean, std=data.std, drop_last=True
        )
        for images, labels in shown:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    network.eval()
    torch.set_num_threads(threads)


def accuracy(network: nn.Module, data: Data) -> float:
    correct = 0
    with torch.no_grad():
        for images, labels in batches(data.validation, 256, mean=data.mean, std=data.std):
            correct += int((network(images).argmax(1) == labels).sum())
    return correct / len(data.validation)


def ship() -> None:
    """Train the network of the tests for eight epochs and write it to FOLDER."""
    torch.manual_seed(0)
    data = load_data("digits")
    space = SearchSpace(
        name="tiny",
        resolution=8,
        input_channels=1,
        stem=Stem(16, 1),
        stages=(Stage(16, 1, 1), Stage(32, 4, 2)),
        head=64,
    )
    architecture = Architecture(BLOCKS, "tiny")
    network = build_network(space, architecture, classes=data.classes)
    fit(network, data, epochs=8)
    card = NetworkCard(space, architecture, data.class_names, data.mean, data.std)
    save_network(FOLDER, network, card)
    print(f"{FOLDER}: {accuracy(network, data):.3f} of the validation images")


if __name__ == "__main__":
    ship()
