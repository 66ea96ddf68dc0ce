"""Post-training static int8 of an exported file, calibrated on training images alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fbnas.errors import InputError, unknown
from fbnas.latency.lowering import CALIBRATION_RANGES, quantize_onnx

if TYPE_CHECKING:
    from fbnas.training.data import Data


@dataclass(frozen=True)
class StaticQuantization:
    """uint8 activations with ranges from calibration images, int8 weights; QDQ form.

    Args:
        per_channel: one weight scale per output channel instead of one per tensor.
        calibration_images: how many training images are shown, in a seeded random choice.
        ranges: minmax, or percentile, which cuts outliers off and keeps every activation in memory.
        reduce_range: weights in 7 bits, for x86 CPUs without VNNI, whose sums saturate at 16 bits.
        batch_size: calibration images per run.
    """

    per_channel: bool = True
    calibration_images: int = 256
    ranges: str = "minmax"
    reduce_range: bool = False
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("calibration_images", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.ranges not in CALIBRATION_RANGES:
            raise unknown("calibration ranges", self.ranges, CALIBRATION_RANGES)


@dataclass(frozen=True)
class QuantizationReport:
    """The int8 file, both sizes in bytes, and how many images calibrated it."""

    path: Path
    bytes_before: int
    bytes_after: int
    calibration_images: int


def quantize_file(
    source: Path | str,
    path: Path | str,
    data: "Data",
    method: StaticQuantization | None = None,
    *,
    seed: int = 0,
) -> QuantizationReport:
    """Write the int8 form of an exported network, calibrated on images of `data.train` only.

    Args:
        source: an ONNX file written by `export_onnx`.
        path: where the int8 file goes; metadata are carried over.
        method: how to quantize; the default settings where not given.
        seed: of the choice of calibration images.
    """
    method = method or StaticQuantization()
    shown = calibration_images(data, method, seed=seed)
    quantize_onnx(
        source,
        path,
        shown,
        per_channel=method.per_channel,
        ranges=method.ranges,
        reduce_range=method.reduce_range,
    )
    source, path = Path(source), Path(path)
    used = sum(len(images) for images in shown)
    return QuantizationReport(path, source.stat().st_size, path.stat().st_size, used)


def calibration_images(
    data: "Data", method: StaticQuantization | None = None, *, seed: int = 0
) -> list[np.ndarray]:
    """Return training images, normalised: arrays (n, c, h, w) float32, in a seeded random choice.

    Args:
        method: says how many, and how many in an array.
    """
    from fbnas.training.data import Subset, batches

    method = method or StaticQuantization()
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    chosen = Subset(data.train, order[: method.calibration_images])
    shown = batches(chosen, method.batch_size, mean=data.mean, std=data.std)
    return [images.numpy() for images, _ in shown]
