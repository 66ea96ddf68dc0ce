"""A small network, training and judging it in seconds, for the tests of this folder."""

from dataclasses import dataclass

import torch
from torch import nn

from fbnas.space import NetworkCard
from fbnas.training.data import Data, batches


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
