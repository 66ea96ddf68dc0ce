"""Several heads on one backbone: stem, layers and head are computed once, each task has scores.

A further task's classifier is trained on the features of a trained network, whose other weights
stay bit for bit, so one file answers both tasks for little more than the cost of one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.space.network import Network, initialise_

CLASSIFIER = "classifier."  # how the names of a head's own tensors begin


def renew_classifier_(network: Network, classes: int) -> None:
    """Put a fresh classifier in the place of a trained network's, for other classes."""
    linear = [m for m in network.classifier.modules() if isinstance(m, nn.Linear)]
    fresh = nn.Linear(linear[0].in_features, classes)  # of a factored one the first counts
    network.classifier.set_submodule("linear", initialise_(fresh))


class FrozenBackbone(nn.Module):
    """A network of which only the classifier is trained.

    All else needs no gradient and stays in eval mode, statistics of batch normalisation included.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        network.classifier.requires_grad_(True)

    def train(self, mode: bool = True) -> "FrozenBackbone":
        super().train(mode)
        self.network.eval()
        self.network.classifier.train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.network(images)
        return scores


class SeveralHeads(nn.Module):
    """One backbone and a classifier per task: (n, c, R, R) images to scores of each, in turn."""

    def __init__(self, backbone: Network, classifiers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(classifiers)
        self.input_shape = backbone.input_shape
        self.stem, self.layers, self.head = backbone.stem, backbone.layers, backbone.head
        self.classifiers = nn.ModuleList(classifiers.values())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.stem(images)
        for layer in self.layers:
            features = layer(features)
        features = self.head(features)
        return tuple(classifier(features) for classifier in self.classifiers)


def join_heads(networks: Mapping[str, Network]) -> SeveralHeads:
    """Join networks that differ in nothing but their classifiers; names are those of the heads.

    Raises:
        InputError: fewer than two, or backbones that differ.
    """
    if len(networks) < 2:
        raise InputError(
            f"{len(networks)} heads; expected at least two, as in heads={{digit: runs/a, "
            "parity: runs/b}."
        )
    (first, network), *others = networks.items()
    expected = _backbone(network)
    for name, other in others:
        found = _backbone(other)
        same = found.keys() == expected.keys() and other.input_shape == network.input_shape
        if not same or not all(torch.equal(found[key], expected[key]) for key in found):
            raise InputError(
                f"the heads {first} and {name} have different backbones; expected heads on one: "
                "train the second by fbnas train backbone=FOLDER OF THE FIRST."
            )
    return SeveralHeads(network, {name: each.classifier for name, each in networks.items()})


def _backbone(network: Network) -> dict[str, Tensor]:
    """All tensors but the classifier's, by name."""
    tensors = network.state_dict()
    return {name: value for name, value in tensors.items() if not name.startswith(CLASSIFIER)}
