"""Architectures ranked by how well the shared weights do on images they were not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fbnas.progress import progress
from fbnas.search.supernet import Supernet
from fbnas.space.architecture import Architecture
from fbnas.training.data import Data, Images, Subset, batches, split_for_search
from fbnas.training.evaluation import evaluate, recalibrate_bn

BATCH = 256


@dataclass(frozen=True)
class Ranked:
    """An architecture with its cross-entropy (nats) and accuracy (0 to 1) by the shared weights."""

    architecture: Architecture
    cross_entropy: float
    accuracy: float


def rank_by_shared_weights(
    supernet: Supernet,
    architectures: Sequence[Architecture],
    data: Data,
    *,
    weights_fraction: float = 0.8,
    seed: int = 0,
    calibration_images: int = 512,
    held_out_images: int = 2048,
) -> list[Ranked]:
    """Rank by cross-entropy on theta's part of the training images, best first.

    The statistics of batch normalisation in a supernet are those of a mixture, so each network's
    own are estimated first, on the weights' part. By cross-entropy, because in a first trial it
    agreed with the accuracy of networks trained alone, and shared-weights accuracy did not.
    `weights_fraction` and `seed` are the search's: they decide the split.
    """
    weights_images, theta_images = split_for_search(
        data.train, fraction=weights_fraction, seed=seed
    )
    calibration = list(
        batches(
            _some(weights_images, calibration_images, seed), BATCH, mean=data.mean, std=data.std
        )
    )
    held_out = _some(theta_images, held_out_images, seed)
    ranked = []
    with progress("Ranking with the shared weights", total=len(architectures)) as advance:
        for architecture in architectures:
            network = supernet.network(architecture).cpu()
            recalibrate_bn(network, network, calibration)
            loss, accuracy = evaluate(network, held_out, mean=data.mean, std=data.std)
            ranked.append(Ranked(architecture, loss, accuracy))
            advance(1)
    return sorted(ranked, key=lambda r: r.cross_entropy)


def _some(images: Images, limit: int, seed: int) -> Subset:
    """At most `limit` images in a random order: a batch of theirs, by class, has odd statistics."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, order[:limit])
