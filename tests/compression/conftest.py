"""One small network, trained on digits for a few seconds, for every test of this folder."""

import pytest
import torch
from digits_network import Trained, accuracy, fit

from fbnas.space import Architecture, NetworkCard, SearchSpace, Stage, Stem, build_network
from fbnas.training.data import load_data

BLOCKS = ("k3_e3", "k5_e1_g2", "k3_e6", "k5_e3", "k3_e1_g2")


@pytest.fixture(scope="session")
def trained() -> Trained:
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
    assert accuracy(network, data) > 0.9
    return Trained(
        network, NetworkCard(space, architecture, data.class_names, data.mean, data.std), data
    )
