"""What int8 does to a network layer by layer, and the fewest layers left in float that mend it."""

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

CHECKS = 64  # smaller sets that are tried before the fewest are believed found


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
    layer: str, scores: np.ndarray, reference: np.ndarray, labels: np.ndarray
) -> Sensitivity:
    """Compare the scores of a file in which one layer is int8 with those of the float file.

    SQNR = 10 log10(sum reference^2 / sum (scores - reference)^2).

    Args:
        scores, reference: (n, classes).
        labels: (n,).
    """
    signal = float((reference.astype(np.float64) ** 2).sum())
    noise = float(((scores - reference).astype(np.float64) ** 2).sum())
    return Sensitivity(
        layer,
        sqnr_db=10 * float(np.log10(signal / max(noise, 1e-12 * signal, 1e-300))),
        cross_entropy_rise=_cross_entropy(scores, labels) - _cross_entropy(reference, labels),
        accuracy_drop=_accuracy(reference, labels) - _accuracy(scores, labels),
    )


def fewest_float(
    order: Sequence[str], accurate: Callable[[Collection[str]], bool]
) -> tuple[str, ...]:
    """Return the fewest layers that must stay float for a network to be accurate enough.

    By bisection over how many of the most sensitive are needed; then every one of these that can do
    without float is let go; then smaller sets are tried, those of the most sensitive layers first,
    until none of that size is left or `CHECKS` were in vain. More float layers are taken to be no
    less accurate, and all layers in float to be accurate enough.

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


def _cross_entropy(scores: np.ndarray, labels: np.ndarray) -> float:
    scores = scores.astype(np.float64)
    log_sum = np.logaddexp.reduce(scores, axis=1)
    return float((log_sum - scores[np.arange(len(labels)), labels]).mean())


def _accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == labels).mean())
