"""Task: what is asked of a network. Classification is shipped; any other is three functions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fbnas.space.network import build_classifier
from fbnas.space.search_space import SearchSpace


def _is_right(scores: Tensor, labels: Tensor) -> Tensor:
    return scores.argmax(1) == labels


def _smoothed_cross_entropy(scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(scores, labels, label_smoothing=smoothing)


def _as_they_are(labels: Tensor) -> Tensor:
    return labels


@dataclass(frozen=True)
class Task:
    """What `search` and `train` learn.

    loss: (outputs, labels) to the mean over images, a scalar that is descended.
    metric: (outputs, labels) to a number per image, (n,), 1 for a perfect answer and 0 for a wrong
        one; its mean is what is reported as accuracy and chooses the best epoch.
    classifier: from a space and a number of classes to the last layers, a module that takes
        features (n, space.head, s, s).
    smoothed: (outputs, labels, label_smoothing) to what `train` descends, where labels can be
        smoothed: with a share of each spread over all classes. None: the loss, as it is.
    strata: labels (n, ...) to whole numbers (n,): images of a number are spread evenly by splits.
    """

    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: Callable[[Tensor, Tensor], Tensor] = _is_right
    classifier: Callable[[SearchSpace, int], nn.Module] = build_classifier
    strata: Callable[[Tensor], Tensor] = _as_they_are
    smoothed: Callable[[Tensor, Tensor, float], Tensor] | None = None


CLASSIFICATION = Task(smoothed=_smoothed_cross_entropy)
