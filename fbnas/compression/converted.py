"""int8 files by a runtime's own converter, with any part of the network left in float."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from fbnas.files import atomic_write
from fbnas.latency.converting import convert, in_float, layer_names
from fbnas.latency.devices import Device


@dataclass(frozen=True)
class Converted:
    """A network for a runtime that reads no ONNX files, as `quantize_file` takes it.

    Whole blocks are left in float, as every file goes through the converter, which takes seconds.

    Args:
        input_shape: (c, h, w) of one image.
        device: whose runtime's files these are.
        calibration: arrays (n, c, h, w) float32, from which ranges are taken.
    """

    network: nn.Module
    input_shape: tuple[int, int, int]
    device: Device
    calibration: Sequence[np.ndarray]
    _written: dict[frozenset[str], bytes] = field(default_factory=dict, init=False, repr=False)

    @property
    def images(self) -> int:
        """How many give the ranges."""
        return sum(len(images) for images in self.calibration)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return layer_names(self.network, self.input_shape)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of modules two deep that have convolutions or linear layers, in order."""
        return tuple(dict.fromkeys(".".join(name.split(".")[:2]) for name in self._names))

    def write(self, path: Path, float_layers: Collection[str] = (), *, draft: bool = False) -> Path:
        """Write the file in which all but these compute in int8, and return its path.

        Args:
            draft: ranges are those of one image, which takes as long to run.

        Raises:
            InputError: it cannot be converted.
        """
        key = frozenset(float_layers)
        if not draft and key in self._written:
            atomic_write(path, self._written[key])
            return path
        everything = key.issuperset(self.layers)
        convert(
            self.device.runtime,
            self.network,
            self.input_shape,
            path,
            precision="fp32" if everything else "int8",
            batch=1,
            calibration=[self.calibration[0][:1]] if draft else self.calibration,
            converter=self.device.converting_python,
            float_layers=in_float(self._names, float_layers)
            if float_layers and not everything
            else (),
        )
        if not draft:  # asked for again, for accuracy, latency and at last
            self._written[key] = path.read_bytes()
        return path
