"""A task that is no classification: which properties does a digit have? Searched and trained.

    python scripts/multi_label/example.py [FOLDER]

Each image has four labels at once (even, above 4, round, has a straight line), so that the loss is
binary cross-entropy and the metric the share of right answers. Only `task` and the data differ.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fbnas.latency.profiling import profile
from fbnas.latency.roofline import Roofline
from fbnas.search import SearchSettings, Target, most_probable_within, search
from fbnas.space import SearchSpace, build_network
from fbnas.training import Task, TensorImages, TrainingSettings, load_data, train

PROPERTIES = {"even": "02468", "above 4": "56789", "round": "03689", "straight": "1457"}


def right(scores: Tensor, labels: Tensor) -> Tensor:
    return ((scores > 0) == (labels > 0.5)).float().mean(1)


MULTI_LABEL = Task(
    loss=F.binary_cross_entropy_with_logits,
    metric=right,
    strata=lambda labels: (labels.long() * 2 ** torch.arange(labels.shape[1])).sum(1),
)


def with_properties(images: TensorImages) -> TensorImages:
    of_digit = [[float(str(d) in digits) for digits in PROPERTIES.values()] for d in range(10)]
    return TensorImages(
        images.batch(torch.arange(len(images))), torch.tensor(of_digit)[images.labels]
    )


def main(folder: Path, *, epochs: int = 20) -> float:
    """Search and train; return the share of right answers on the validation images."""
    space = SearchSpace.load("quickstart")
    digits = load_data("digits", resize=True, space=space)
    train_images, validation = (with_properties(x) for x in (digits.train, digits.validation))
    names = tuple(PROPERTIES)
    data = replace(digits, class_names=names, train=train_images, validation=validation)
    table = profile(space, Roofline(), folder / "planned.csv", classes=len(names))
    latency_ms, base_ms = table.tensor(space, classes=len(names))
    budget_ms = base_ms + float(latency_ms.nanmedian(dim=1).values.sum())

    settings = SearchSettings(epochs=epochs)
    found = search(space, data, [Target(table, budget_ms)], settings=settings, task=MULTI_LABEL)
    theta = found.distributions[0].probabilities()
    best = most_probable_within(
        theta, latency_ms, budget_ms=budget_ms, base_ms=base_ms, space=space, least_used=0.9
    )[0]
    network = build_network(space, best, classes=len(names))
    trained = train(network, data, settings=TrainingSettings(epochs=epochs), task=MULTI_LABEL)
    print(f"{best}: {100 * trained.validation_accuracy:.1f} % of the answers are right")
    return trained.validation_accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
