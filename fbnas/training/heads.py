"""Several heads in one training: their data joined, and what is asked of each image.

A label counts through the classes of all heads, so that it tells the head too: an image is judged
by the scores of its own head alone, and those of the others learn nothing from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.space.heads import Heads, check_head_names, rows_of
from fbnas.training.data import Data, statistics
from fbnas.training.evaluation import evaluate
from fbnas.training.images import Images, JoinedImages, Subset
from fbnas.training.task import CLASSIFICATION, Task


def join_data(parts: Mapping[str, Data]) -> Data:
    """Return the data of several heads as one: splits are joined, mean and std are of all images.

    Raises:
        InputError: fewer than two, a name that no head can have, or images of different shapes.
    """
    check_head_names(parts)
    (first, data), *others = parts.items()
    for name, other in others:
        if (other.channels, other.resolution) != (data.channels, data.resolution):
            raise InputError(
                f"the images of {name} are {_size(other)}, those of {first} {_size(data)}; "
                "expected images of one size: load them with the same resolution and channels."
            )
    heads = {name: part.class_names for name, part in parts.items()}
    offsets = tuple(rows.start for rows in rows_of(heads).values())
    train = JoinedImages(tuple(part.train for part in parts.values()), offsets)
    mean, std = statistics(train, 0)
    return Data(
        name=" and ".join(part.name for part in parts.values()),
        class_names=tuple(chain(*heads.values())),
        channels=data.channels,
        resolution=data.resolution,
        train=train,
        validation=JoinedImages(tuple(part.validation for part in parts.values()), offsets),
        load_test=lambda: JoinedImages(tuple(part.test for part in parts.values()), offsets),
        mean=mean,
        std=std,
        heads=heads,
    )


def _size(data: Data) -> str:
    return f"{data.resolution}x{data.resolution} of {data.channels} channel(s)"


def task_of(heads: Heads) -> Task:
    """Return what is asked of a network with heads; of one without, classification.

    Cross-entropy and the highest score are those among the classes of the label's own head; a
    smoothed label is spread over these.
    """
    if not heads:
        return CLASSIFICATION
    sizes = torch.tensor([len(class_names) for class_names in heads.values()])
    head_of_class = torch.arange(len(sizes)).repeat_interleave(sizes)

    def own_scores(scores: Tensor, labels: Tensor) -> Tensor:
        """Return the scores of each label's own head, -inf for those of the others."""
        head = head_of_class.to(scores.device)
        return scores.masked_fill(head[labels].unsqueeze(1) != head, -torch.inf)

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(own_scores(scores, labels), labels)

    def metric(scores: Tensor, labels: Tensor) -> Tensor:
        return own_scores(scores, labels).argmax(1) == labels

    def smoothed(scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        log_p = own_scores(scores, labels).log_softmax(1)
        own = log_p.detach().isfinite()
        spread = -(log_p.masked_fill(~own, 0).sum(1) / own.sum(1)).mean()
        return (1 - smoothing) * F.nll_loss(log_p, labels) + smoothing * spread

    return Task(loss=loss, metric=metric, smoothed=smoothed)


@dataclass(frozen=True)
class Accuracy:
    """The fraction of images that are right, 0 to 1, and that of each head's images."""

    all: float
    heads: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        of_heads = ", ".join(f"{name} {value:.4f}" for name, value in self.heads.items())
        return f"{self.all:.4f}" + (f" ({of_heads})" if of_heads else "")


def judge_network(network: nn.Module, data: Data, images: Images) -> Accuracy:
    """Judge a network by some of the images of its data."""
    task = task_of(data.heads)

    def accuracy(some: Images) -> float:
        return evaluate(network, some, mean=data.mean, std=data.std, task=task)[1]

    return accuracy_by_head(images, data.heads, accuracy)


def accuracy_by_head(images: Images, heads: Heads, accuracy: Callable[[Images], float]) -> Accuracy:
    """Judge the images of each head, or of a network without heads all at once.

    Args:
        accuracy: of some of the images, 0 to 1.
    """
    if not heads:
        return Accuracy(accuracy(images))
    found, right = dict[str, float](), 0.0
    for name, rows in rows_of(heads).items():
        mine = (images.labels >= rows.start) & (images.labels < rows.stop)
        some = Subset(images, mine.nonzero().flatten())
        found[name] = accuracy(some)
        right += found[name] * len(some)
    return Accuracy(right / len(images), found)
