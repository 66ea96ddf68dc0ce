"""What every compression method is, and what it may use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from fbnas.compression.holding import held
from fbnas.errors import InputError
from fbnas.training.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    from fbnas.training.data import Data


@dataclass(frozen=True)
class Applied:
    """What a method did to each layer or set of layers, and what its last training returned."""

    changes: tuple[Any, ...] = ()
    trained: Any = None


@dataclass(frozen=True)
class Tools:
    """What a method may use; it refuses to go on without what it needs.

    Args:
        input_shape: (c, h, w) of one image.
        train: fine-tunes a network in place.
        train_anew: trains a network in place from its first weights on, as it was trained once;
            `train_anew(network, epochs=1)` only so long. None: `train` does it.
        data: training images to calibrate on, validation images to decide by; `data.test` is not
            for methods.
        measure: latencies in milliseconds of networks on the device, timed against each other; one
            with an `input_shape` (c, h, w) is given an image of that.
        folder: for what a method wants to leave beside the network, such as a plot.
        seed: of everything that is drawn.
        coder: of `pack`, by which networks are weighed.
        task: what is asked of the network: its loss and its metric.
    """

    input_shape: tuple[int, int, int]
    train: Callable[..., Any] | None = None
    data: "Data | None" = None
    measure: Callable[[Sequence[nn.Module]], list[float]] | None = None
    folder: Path | None = None
    seed: int = 0
    coder: str = "huffman"
    train_anew: Callable[..., Any] | None = None
    task: Task = CLASSIFICATION

    def tune(self, model: nn.Module) -> Any:
        """Fine-tune in place and return what `train` did; None where there is none to do it.

        What earlier methods did to the weights holds: zeros stay zero, shared weights stay shared.
        """
        if self.train is None:
            return None
        with held(model):
            return self.train(model)

    def retrain(self, model: nn.Module, *, epochs: int | None = None) -> Any:
        """Train in place from the first weights on, and return what `train_anew` did.

        What earlier methods did to the weights holds, as in `tune`.
        """
        train = self.train_anew or self.train
        if train is None:
            return None
        with held(model):
            return train(model) if epochs is None else train(model, epochs=epochs)

    def accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the validation images, 0 to 1.

        Raises:
            InputError: there are no images.
        """
        from fbnas.training.evaluation import evaluate

        data = self.images()
        return evaluate(model, data.validation, mean=data.mean, std=data.std, task=self.task)[1]

    def images(self) -> "Data":
        """Return the data.

        Raises:
            InputError: there is none.
        """
        if self.data is None:
            raise InputError("compress_ got no data; expected data=, as of load_data, to judge by.")
        return self.data


class Method(ABC):
    """A way to make a network smaller or quicker: a frozen dataclass of its options.

    NAME: as in `fbnas compress method=NAME`. SECTION: of the options in `compression`. MEASURES:
    whether it asks `tools.measure` to decide.

    A new one is a file of this folder, its class in METHODS of `__init__.py`, a section SECTION of
    configs/compression/default.yaml with each option, its default and a comment, and a line in the
    opening of configs/compress.yaml, which `fbnas compress --help` prints.
    """

    NAME: ClassVar[str]
    SECTION: ClassVar[str]
    MEASURES: ClassVar[bool] = False

    @abstractmethod
    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Compress in place, fine-tuning by `tools.tune` where the method is to be followed by it.

        The network stays an ordinary module with plain weights.
        """
