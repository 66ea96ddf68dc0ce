"""Weight sharing: the weights of a layer take few values, which are then trained.

Trained quantization of Han et al. 2016 (arXiv 1510.00149, section 3): one-dimensional k-means per
layer, then fine-tuning of the centroids, whose gradient is the sum over their cluster; here by
default over as many as weights of the layer share a centroid on average, so that they learn at the
rates of any other fine-tuning.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fbnas.compression.holding import GRADIENTS, held, weighted
from fbnas.compression.method import Applied, Method, Tools
from fbnas.errors import InputError, unknown

log = logging.getLogger(__name__)

MOST_BITS = 8  # an index is one byte, as `held` reads shared weights
ROUNDS = 100  # of k-means at most


def sharing_rate(n: int, k: int, b: int) -> float:
    """Return how many times smaller n weights of b bits get as indices of k values of b bits.

    r = n b / (n log2 k + k b), equation 1 of Han et al. 2016; 3.2 for 16 weights in 4 clusters.
    """
    return n * b / (n * math.log2(k) + k * b)


@dataclass(frozen=True)
class SharedLayer:
    """A layer whose weights were shared.

    weights: those that are not zero. error: mean squared distance to the values before, as a
    fraction of the mean squared weight. rate: `sharing_rate` of these weights, for 32 bits.
    """

    layer: str
    weights: int
    clusters: int
    error: float
    rate: float


@dataclass(frozen=True)
class WeightSharing(Method):
    """Share the weights of every layer among 2**bits values, then fine-tune the values.

    Pruned weights stay zero; zero is none of the values counted. A layer gets no more values than
    half of its weights.

    Args:
        conv_bits: bits of an index into the values of a convolution, 1 to 8.
        linear_bits: of a linear layer.
        init: where k-means begins: linear, evenly from the least to the greatest weight, which
            keeps large weights and was best in the paper; density, evenly over the weights in
            order of size; random, weights drawn by the seed of `compress_`.
        gradient: of a value while it is fine-tuned: sum over its weights, as in the paper, which
            takes a rate as many times lower as weights share a value; scaled_sum, the same over
            the weights that share one on average in the layer, which takes the rate of any
            fine-tuning; or mean over its weights. At 3 bits a network for digits of 93.0 % came to
            94.5 % by the scaled sum and 94.3 % by the mean at rate 0.02, and to 94.4 % by the sum
            at 0.002; at 2 bits to 87.0, 86.9 and 81.1 % (scripts/weight_sharing).
    """

    NAME: ClassVar[str] = "weight_sharing"
    SECTION: ClassVar[str] = "weight_sharing"

    conv_bits: int = 8
    linear_bits: int = 5
    init: str = "linear"
    gradient: str = "scaled_sum"

    def __post_init__(self) -> None:
        for name in ("conv_bits", "linear_bits"):
            bits = getattr(self, name)
            if not 1 <= bits <= MOST_BITS:
                raise InputError(
                    f"{name} is {bits}; expected a whole number from 1 to {MOST_BITS}."
                )
        if self.init not in INITS:
            raise unknown("init", self.init, INITS)
        if self.gradient not in GRADIENTS:
            raise unknown("gradient", self.gradient, GRADIENTS)

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Share the weights, then fine-tune what they share."""
        changes = share_(model, self, seed=tools.seed)
        if tools.train is None:
            return Applied(changes)
        with held(model, gradient=self.gradient):
            return Applied(changes, tools.train(model))


def share_(model: nn.Module, method: WeightSharing, *, seed: int = 0) -> tuple[SharedLayer, ...]:
    """Share weights in place; returns what was done to each layer that has any to share."""
    chosen, changes = weighted(model), []
    for name, module in model.named_modules():
        if not any(module is each for each in chosen):
            continue
        bits = method.conv_bits if isinstance(module, nn.Conv2d) else method.linear_bits
        weight = module.weight.detach()
        kept = weight != 0
        values = weight[kept].cpu().double().numpy()
        if len(values) < 2:
            continue
        centroids, nearest = cluster(values, 2**bits, init=method.init, seed=seed)
        with torch.no_grad():
            new = torch.from_numpy(centroids[nearest])
            module.weight[kept] = new.to(weight.device, weight.dtype)
        error = float(np.square(centroids[nearest] - values).sum() / np.square(values).sum())
        rate = sharing_rate(len(values), len(centroids), 32)
        changes.append(SharedLayer(name, len(values), len(centroids), error, rate))
        log.info("%s: %d weights share %d values", name, len(values), len(centroids))
    return tuple(changes)


def cluster(
    values: np.ndarray, k: int, *, init: str = "linear", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the centroids of k-means, ascending, and the index of the one nearest to each value.

    There are fewer than k where that is more than half of the values, or than differ.

    Args:
        values: (n,) float64.
    """
    different = np.unique(values)
    k = min(k, max(len(values) // 2, 1), len(different))
    if k == len(different):
        return different, np.searchsorted(different, values)
    from sklearn.cluster import KMeans

    start = INITS[init](values, k, np.random.default_rng(seed))
    means = KMeans(k, init=start[:, None], n_init=1, max_iter=ROUNDS, random_state=seed)
    centroids = np.unique(means.fit(values[:, None]).cluster_centers_[:, 0])
    return centroids, np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)


def _linear(values: np.ndarray, k: int, _: np.random.Generator) -> np.ndarray:
    return np.linspace(values.min(), values.max(), k)


def _density(values: np.ndarray, k: int, _: np.random.Generator) -> np.ndarray:
    """Return where k even steps of the cumulative distribution of the weights lie."""
    return np.quantile(values, (np.arange(k) + 0.5) / k)


def _random(values: np.ndarray, k: int, generator: np.random.Generator) -> np.ndarray:
    return generator.choice(values, k, replace=False)


INITS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "linear": _linear,
    "density": _density,
    "random": _random,
}
