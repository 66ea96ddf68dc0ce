"""Iterative pruning: a few channels at a time, each step fine-tuned, to an accuracy floor."""

import logging
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fbnas.compression.method import Applied, Method, Tools
from fbnas.compression.pruning import ChannelPruning, ChannelSet, become_, prune_
from fbnas.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IterativePruning(Method):
    """Prune and fine-tune by turns until the accuracy falls below a floor; keep the last good step.

    Step k leaves (1 - step_ratio)^k of the channels that the network had at the start, rounded, so
    that narrow sets are not held up by rounding; a step that would remove nothing is passed over.

    Args:
        step_ratio: the fraction of the remaining channels to remove in a step, 0 < step_ratio < 1.
        max_accuracy_drop: below the accuracy at the start, on the validation images, 0 to 1.
        steps: at most so many.
        importance, round_to, global_, max_ratio, seed, images: as of `ChannelPruning`; channels
            are judged anew at every step.
    """

    NAME: ClassVar[str] = "iterative_pruning"
    SECTION: ClassVar[str] = "iterative_pruning"

    step_ratio: float = 0.1
    max_accuracy_drop: float = 0.01
    steps: int = 10
    importance: str = "taylor"
    round_to: int = 8
    global_: bool = False
    max_ratio: float = 0.75
    seed: int = 0
    images: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.step_ratio < 1:
            raise InputError(
                f"step_ratio is {self.step_ratio}; expected a fraction, 0 < step_ratio < 1."
            )
        if not 0 <= self.max_accuracy_drop < 1:
            raise InputError(
                f"max_accuracy_drop is {self.max_accuracy_drop}; expected a fraction of images, "
                "0 <= max_accuracy_drop < 1."
            )
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; expected a whole number of at least 1.")
        self.pruning(0.0)

    def pruning(self, ratio: float) -> ChannelPruning:
        """Return what a step does that leaves 1 - ratio of the channels of the start."""
        return ChannelPruning(
            ratio=ratio,
            importance=self.importance,
            round_to=self.round_to,
            global_=self.global_,
            max_ratio=self.max_ratio,
            seed=self.seed,
            images=self.images,
        )

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Prune, fine-tune and judge by turns; the network is left as the last good step made it.

        Raises:
            InputError: there are no images to judge by.
        """
        floor = tools.accuracy(model) - self.max_accuracy_drop
        good, trained, full = model, None, dict[str, int]()
        steps: list[PruningStep] = []
        for number in range(1, self.steps + 1):
            ratio = 1 - (1 - self.step_ratio) ** number
            candidate = deepcopy(good)
            sets = prune_(candidate, self.pruning(ratio), tools, full=full)
            full = full or {found.layer: found.before for found in sets}
            if not any(found.removed for found in sets):
                continue
            result = tools.tune(candidate)
            step = PruningStep(number, ratio, tools.accuracy(candidate), floor, sets)
            steps.append(step)
            logger.info("%s", step)
            if not step.kept:
                break
            good, trained = candidate, result
        become_(model, good)
        return Applied(tuple(steps), trained)


@dataclass(frozen=True)
class PruningStep:
    """A step: `ratio` of the channels of the start gone, and the accuracy after fine-tuning.

    accuracy, floor: on the validation images, 0 to 1. sets: what the step removed of each.
    """

    number: int
    ratio: float
    accuracy: float
    floor: float
    sets: tuple[ChannelSet, ...]

    @property
    def kept(self) -> bool:
        """Whether the step is accurate enough; the first that is not is undone."""
        return self.accuracy >= self.floor

    def __str__(self) -> str:
        before, after = (sum(getattr(found, x) for found in self.sets) for x in ("before", "after"))
        verdict = "kept" if self.kept else "undone"
        return (
            f"step {self.number}: {before} -> {after} channels, validation accuracy "
            f"{self.accuracy:.4f}, floor {self.floor:.4f}: {verdict}"
        )
