"""Several heads on one backbone: stem, layers and head are computed once, each task has scores.

Such a network is an ordinary one, whose scores are those of all heads side by side: all that takes
a network takes it too. Heads are trained together, or one after another on a trained network, whose
other weights then stay bit for bit.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.space.network import Network, initialise_

CLASSIFIER = "classifier."  # how the names of a head's own tensors begin
INPUT = "images"  # of model files, whose outputs have the names of the heads

Heads = Mapping[str, Sequence[str]]  # the names of each head's classes, in the order of the scores


def rows_of(heads: Heads) -> dict[str, slice]:
    """Return where each head's classes lie among those of all."""
    found, first = dict[str, slice](), 0
    for name, class_names in heads.items():
        found[name] = slice(first, first + len(class_names))
        first += len(class_names)
    return found


def check_head_names(names: Iterable[str]) -> None:
    """Refuse names that heads cannot have.

    Raises:
        InputError: fewer than two, or one that a file has no output of.
    """
    names = list(names)
    if len(names) < 2:
        raise InputError(
            f"{len(names)} heads; expected at least two, as in heads={{digit: ..., parity: ...}}."
        )
    for name in names:
        if name == INPUT or not name.replace("-", "_").isidentifier():
            raise InputError(
                f"a head is called '{name}'; expected letters, digits, - and _, beginning with a "
                f"letter, and not {INPUT}: an output of a file is called so."
            )


def renew_classifier_(network: Network, classes: int) -> None:
    """Put a fresh classifier in the place of a trained network's, for other classes."""
    linear = [m for m in network.classifier.modules() if isinstance(m, nn.Linear)]
    fresh = nn.Linear(linear[0].in_features, classes)  # of a factored one the first counts
    network.classifier.set_submodule("linear", initialise_(fresh))


def only_head(network: Network, heads: Heads, name: str) -> Network:
    """Return a copy that answers for one of its heads alone."""
    network, rows = copy.deepcopy(network), rows_of(heads)[name]
    if isinstance(network.classifier, SideBySide):
        network.classifier = network.classifier.classifiers[list(heads).index(name)]
        return network
    last = [m for m in network.classifier.modules() if isinstance(m, nn.Linear)][-1]
    last.weight = nn.Parameter(last.weight.detach()[rows].clone())
    last.bias = nn.Parameter(last.bias.detach()[rows].clone())
    last.out_features = len(last.weight)
    return network


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


class SideBySide(nn.Module):
    """Classifiers trained apart, as one: features to the scores of all, (n, sum of classes)."""

    def __init__(self, classifiers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([classifier(features) for classifier in self.classifiers], 1)


def separate_classifiers(model: nn.Module) -> list[nn.Module]:
    """Return the classifiers that a network has side by side; none where it ends in one alone."""
    joined = [module for module in model.modules() if isinstance(module, SideBySide)]
    return [classifier for module in joined for classifier in module.classifiers]


def join_heads(networks: Mapping[str, Network]) -> Network:
    """Join networks that differ in nothing but their classifiers; names are those of the heads.

    Raises:
        InputError: fewer than two, or backbones that differ.
    """
    check_head_names(networks)
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
    joined = copy.deepcopy(network)
    joined.classifier = SideBySide(each.classifier for each in networks.values())
    return joined


def _backbone(network: Network) -> dict[str, Tensor]:
    """All tensors but the classifier's, by name."""
    tensors = network.state_dict()
    return {name: value for name, value in tensors.items() if not name.startswith(CLASSIFIER)}
