"""What int8 does to a network layer by layer, and few layers left in float that mend it."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fbnas.training.task import CLASSIFICATION, Task

CHECKS = 64  # smaller sets that are tried before no smaller one is believed to do


@dataclass(frozen=True)
class Sensitivity:
    """What the scores of validation images suffer where one layer alone is int8.

    `sqnr_db`: signal to quantization noise of the scores. `cross_entropy_rise`: in nats.
    `accuracy_drop`: 0 to 1, of the same images.
    """

    layer: str
    sqnr_db: float
    cross_entropy_rise: float
    accuracy_drop: float


def sensitivity_of(
    layer: str,
    scores: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray,
    task: Task = CLASSIFICATION,
) -> Sensitivity:
    """Compare the scores of a file in which one layer is int8 with those of the float file.

    SQNR = 10 log10(sum reference^2 / sum (scores - reference)^2).

    Args:
        scores, reference: (n, classes).
        labels: (n,).
        task: whose loss and metric are compared, where that is not classification.
    """
    judged = [torch.from_numpy(found.astype(np.float64)) for found in (scores, reference)]
    loss, reference_loss = (float(task.loss(x, torch.from_numpy(labels))) for x in judged)
    right, reference_right = (
        float(task.metric(x, torch.from_numpy(labels)).double().mean()) for x in judged
    )
    signal = float((reference.astype(np.float64) ** 2).sum())
    noise = float(((scores - reference).astype(np.float64) ** 2).sum())
    return Sensitivity(
        layer,
        sqnr_db=10 * float(np.log10(signal / max(noise, 1e-12 * signal, 1e-300))),
        cross_entropy_rise=loss - reference_loss,
        accuracy_drop=reference_right - right,
    )


def fewest_float(
    order: Sequence[str], accurate: Callable[[Collection[str]], bool]
) -> tuple[str, ...]:
    """Return layers that may stay float for a network to be accurate enough, as few as are found.

    By bisection over how many of the most sensitive are needed; then every one of these that can do
    without float is let go; then smaller sets are tried, those of the most sensitive layers first,
    until none of that size is left or `CHECKS` were in vain: a smaller set beyond is missed. More
    float layers are taken to be no less accurate, and all layers in float to be accurate enough.

    Args:
        order: all layers, the most sensitive first.
        accurate: whether the network is accurate enough with these layers in float.
    """
    if accurate(()):
        return ()
    too_few, enough = 0, len(order)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if accurate(order[:middle]) else (middle, enough)
    needed = tuple(order[:enough])
    for layer in reversed(needed):
        without = tuple(name for name in needed if name != layer)
        if without and accurate(without):
            needed = without
    while len(needed) > 1:
        smaller = itertools.islice(itertools.combinations(order, len(needed) - 1), CHECKS)
        found = next((layers for layers in smaller if accurate(layers)), None)
        if found is None:
            break
        needed = found
    return needed
