"""Quantization-aware training: fine-tuned with the roundings of int8, exported with its grids."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fbnas.compression.equalisation import equalise_network_
from fbnas.compression.folding import fold_bn_
from fbnas.compression.holding import weighted
from fbnas.compression.method import Applied, Method, Tools
from fbnas.compression.quantization import StaticQuantization, calibration_images
from fbnas.errors import InputError
from fbnas.latency.fake_quantization import (
    BITS,
    Points,
    QuantizedForm,
    WeightGrids,
    observed_ranges,
    quantized_points,
    rounding_activations,
    rounding_weights,
)
from fbnas.latency.ranges import PERCENTILE
from fbnas.training.task import Task

if TYPE_CHECKING:
    from fbnas.training.data import Data

logger = logging.getLogger(__name__)

FORM_FILE = "quantization.json"  # beside network.yaml


@dataclass(frozen=True)
class QAT(Method):
    """Fine-tune with batch normalisation folded and everything rounded as int8 will round it.

    The options that `StaticQuantization` has too mean the same. It is the beginning: ranges are
    calibrated and weights rounded without training; that is kept where training ends worse on the
    validation images, so that the result is never worse than it there. Gradients pass straight
    through the roundings (Jacob et al. 2018, arXiv 1712.05877; Krishnamoorthi 2018, arXiv
    1806.08342, section 3.2). Pruned weights stay zero; what was shared by clustering is not: a
    channel's grid is what its weights share.

    Args:
        weight_bits: 2 to 8; fewer than 8 are int8 in the file, which every runtime executes, and
            take their own bits in packed weights. 7 is for x86 CPUs without VNNI, whose sums
            saturate at 16 bits.
        per_channel: one weight scale per output channel instead of one per tensor.
        calibration_images: how many training images are shown, in a seeded random choice.
        ranges: minmax; percentile, which cuts outliers off; entropy, which cuts off where the
            distribution changes least.
        percentile: of the values that its range encloses.
        activations: asymmetric or symmetric, as `Scheme` says; ranges that follow the activations
            are widened likewise.
        weights: symmetric, or asymmetric, which needs one scale per tensor.
        equalise: even out the weights of neighbouring layers first, by `equalise_network_`.
        batch_size: calibration images per run.
        momentum: with which ranges follow the activations while training; 0 leaves them. Those of
            the average of the weights, which is what is kept, follow at each validation alone.
        lr: learning rate, which `train` is then given as `lr=`; None: `train` has its own. Folded
            batch normalisation bears a tenth of what fine-tuning is done with otherwise.
    """

    NAME: ClassVar[str] = "qat"
    SECTION: ClassVar[str] = "qat"

    weight_bits: int = 8
    per_channel: bool = True
    calibration_images: int = 256
    ranges: str = "minmax"
    percentile: float = PERCENTILE
    activations: str = "asymmetric"
    weights: str = "symmetric"
    equalise: bool = False
    batch_size: int = 32
    momentum: float = 0.01
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.weight_bits not in BITS:
            raise InputError(
                f"weight_bits is {self.weight_bits}; expected a whole number from {BITS[0]} to "
                f"{BITS[-1]}, 8 for int8 and 4 for int4."
            )
        if not 0 <= self.momentum < 1:
            raise InputError(
                f"momentum is {self.momentum}; expected 0 (ranges stay) or more and less than 1."
            )
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(
                f"lr is {self.lr}; expected a positive number, or null for train's own."
            )
        self._as_untrained()

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Fold, calibrate, train; leave plain weights on their grids and return the ranges."""
        data = tools.images()
        if tools.train is None:
            raise InputError(
                "qat got nothing that trains; expected train=, or quantize_file for int8 without."
            )
        kept: dict[nn.Module, Tensor] = {
            layer: mask for layer in weighted(model) if (mask := _nonzero(layer)) is not None
        }
        fold_bn_(model, tools.input_shape)
        if self.equalise:
            equalise_network_(model, tools.input_shape)
        grids = WeightGrids(self.weight_bits, self.per_channel, self.weights == "symmetric")
        points = quantized_points(model, tools.input_shape)
        with rounding_weights(model, grids, kept=kept):
            form = self._calibrated(model, points, data, tools.seed)
            with rounding_activations(
                model,
                form,
                momentum=self.momentum,
                symmetrically=self.activations == "symmetric",
            ) as present:
                untrained, before = _state(model), _judged(model, data, tools.task)
                trained = _tune_(model, self._trained_by(tools.train))
                form, after = present(), _judged(model, data, tools.task)
                if after < before:
                    logger.warning("training in int8 was no gain: int8 without it is kept")
                    model.load_state_dict(untrained)
                    form = present()
        method = "ptq" if after < before else "qat"
        return Applied((Rounded(replace(form, method=method), before[0], after[0]),), trained)

    def _calibrated(
        self, model: nn.Module, points: Points, data: "Data", seed: int
    ) -> QuantizedForm:
        shown = calibration_images(data, self._as_untrained(), seed=seed)
        inputs, outputs = observed_ranges(
            model, points, shown, ranges=self.ranges, percentile=self.percentile
        )
        return QuantizedForm(
            self.weight_bits, self.per_channel, inputs, outputs, weights=self.weights
        )

    def _trained_by(self, train: Callable[..., Any]) -> Callable[..., Any]:
        return train if self.lr is None else partial(train, lr=self.lr)

    def _as_untrained(self) -> StaticQuantization:
        """What it has in common with int8 after training, checked."""
        return StaticQuantization(
            per_channel=self.per_channel,
            calibration_images=self.calibration_images,
            ranges=self.ranges,
            percentile=self.percentile,
            activations=self.activations,
            weights=self.weights,
            equalise=self.equalise,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Rounded:
    """What int8 needs beside the weights, and what rounding cost.

    form: of the network as it was left. ptq_accuracy, qat_accuracy: on the validation images, all
    rounded, before and after training; `form.method` says which of the two was kept.
    """

    form: QuantizedForm
    ptq_accuracy: float
    qat_accuracy: float


def _nonzero(layer: nn.Conv2d | nn.Linear) -> Tensor | None:
    """Return the mask of a pruned layer, None for one without zeros."""
    mask = (layer.weight.detach() != 0).to(layer.weight.dtype)
    return None if bool(mask.all()) else mask


def _tune_(model: nn.Module, train: Callable[[nn.Module], Any]) -> Any:
    """Train in place; a training that diverges leaves a network that is judged like any other."""
    from fbnas.training.state import TrainingDiverged

    try:
        return train(model)
    except TrainingDiverged as error:
        logger.warning("%s", error)
        model.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        return None


def _judged(model: nn.Module, data: "Data", task: Task) -> tuple[float, float]:
    """Return accuracy and negative cross-entropy on the validation images: larger is better."""
    from fbnas.training.evaluation import evaluate

    loss, accuracy = evaluate(model, data.validation, mean=data.mean, std=data.std, task=task)
    return accuracy, -loss if math.isfinite(loss) else -math.inf


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
