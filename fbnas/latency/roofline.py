"""A planned device: latency and energy from the numbers of a data sheet, nothing measured.

An operator takes the longer of its arithmetic and its memory traffic, and an overhead (the roofline
of Williams, Waterman and Patterson 2009). Energy counts multiply-adds and accesses to DRAM, 640 pJ
per 32 bits (Han, Mao and Dally 2016, table 1 of the deep compression line of work).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fbnas.errors import InputError, check_known, unknown
from fbnas.latency.devices import ROUNDS, Device, Measurement, noise
from fbnas.latency.graph_cost import GraphCost, graph_cost
from fbnas.latency.timing import Timing

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("fp32", "int8")
DRAM_ACCESS_BYTES = 4
NUMBERS = (
    "gmacs_per_s",
    "gmacs_per_s_int8",
    "bandwidth_gb_per_s",
    "overhead_us",
    "pj_per_mac",
    "pj_per_mac_int8",
    "pj_per_dram_access",
)


@dataclass(frozen=True)
class Roofline:
    """A device that is not on the desk yet.

    Args:
        gmacs_per_s, gmacs_per_s_int8: multiply-adds that it can do, in 1e9 per second.
        bandwidth_gb_per_s: between memory and arithmetic, in 1e9 bytes per second.
        overhead_us: of each operator.
        pj_per_mac, pj_per_mac_int8: energy of a multiply-add.
        pj_per_dram_access: energy of moving 32 bits.

    Raises:
        InputError: unknown precision, or a number that is none.
    """

    name: str = "planned"
    precision: str = "fp32"
    gmacs_per_s: float = 16.0
    gmacs_per_s_int8: float = 64.0
    bandwidth_gb_per_s: float = 4.0
    overhead_us: float = 5.0
    pj_per_mac: float = 4.6
    pj_per_mac_int8: float = 0.23
    pj_per_dram_access: float = 640.0

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise InputError(f"device.name is {self.name!r}; expected a name")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        for key in NUMBERS:
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            rate = key.endswith("_per_s") or key == "gmacs_per_s_int8"
            if not number or not (value > 0 if rate else value >= 0) or value == float("inf"):
                least = "a number above 0" if rate else "a number of at least 0"
                raise InputError(
                    f"device.{key} is {value!r}; expected {least}: it stands on the data sheet"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Roofline":
        """Build a device from a config of kind roofline.

        Raises:
            InputError: unknown key (the closest is named), or a value that makes no device.
        """
        given = {key: value for key, value in values.items() if key != "kind"}
        check_known("device option", given, [field.name for field in fields(cls)])
        return cls(**given)

    kind = "roofline"
    runtime = "roofline"
    provider = ""
    threads = 1
    suffix = ".onnx"

    def fingerprint(self) -> dict[str, str]:
        """Return what a latency depends on, for a table's header: every number of the sheet."""
        numbers = {key: f"{getattr(self, key):g}" for key in NUMBERS}
        digest = hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:12]
        return {
            "device": self.name,
            "machine": "planned",
            "cpu": "planned",
            "cores": "1",
            "os": "none",
            "runtime": self.runtime,
            "runtime_version": digest,
            "provider": self.provider,
            "precision": self.precision,
            "threads": str(self.threads),
            **numbers,
        }

    def compile(
        self,
        module: "nn.Module",
        input_shape: tuple[int, int, int],
        path: Path,
        *,
        batch: int = 1,
        seed: int = 0,
        calibration: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Write the ONNX file that stands for the module at the device's precision.

        Args:
            input_shape: (c, h, w) of one image.
            calibration: arrays (n, c, h, w) float32 for the ranges of int8; else normal noise.

        Raises:
            ConversionError: the module cannot be converted.
        """
        from fbnas.latency.converting import convert

        convert(
            "onnxruntime",
            module,
            input_shape,
            path,
            precision=self.precision,
            batch=batch,
            calibration=noise((batch, *input_shape), seed) if calibration is None else calibration,
        )

    def latency_ms(self, cost: GraphCost) -> float:
        """Return the sum over operators of max(arithmetic, memory) + overhead."""
        rate = self.gmacs_per_s_int8 if cost.quantized else self.gmacs_per_s
        seconds = sum(
            max(operator.macs / rate / 1e9, operator.bytes / self.bandwidth_gb_per_s / 1e9)
            + self.overhead_us * 1e-6
            for operator in cost.operators
        )
        return seconds * 1e3

    def energy_mj(self, cost: GraphCost) -> float:
        """Return the energy of one run: arithmetic, and every byte moved as from DRAM."""
        per_mac = self.pj_per_mac_int8 if cost.quantized else self.pj_per_mac
        accesses = cost.bytes / DRAM_ACCESS_BYTES
        return (cost.macs * per_mac + accesses * self.pj_per_dram_access) * 1e-9

    def measure(
        self,
        files: Sequence[Path],
        *,
        rounds: int = ROUNDS,
        seed: int = 0,
        work: Path | None = None,
        progress: Callable[[int], None] | None = None,
        seconds: float | None = None,
        keep_failures: bool = False,
    ) -> Measurement:
        """Compute the latency of model files; exact, so that rounds, seed and work play no part.

        Raises:
            InputError: a file is missing or no ONNX file, unless `keep_failures` and others work.
        """
        found: list[float | None] = []
        failures: dict[int, str] = {}
        for index, file in enumerate(files):
            try:
                found.append(self.latency_ms(graph_cost(file)))
            except InputError as error:
                if not keep_failures or len(failures) + 1 == len(files):
                    raise
                failures[index] = str(error)
                found.append(None)
        if progress is not None:
            progress(rounds)
        timings = tuple(None if ms is None else Timing(ms, ms, ms, 1) for ms in found)
        samples_ms = np.array([[np.nan if ms is None else ms for ms in found]])
        return Measurement(timings, 0.0, samples_ms, failures)

    def measure_quietly(
        self, files: Sequence[Path], description: str, *, rounds: int = ROUNDS, seed: int = 0
    ) -> Measurement:
        """As `measure`: there is nothing to be quiet about."""
        return self.measure(files, rounds=rounds, seed=seed)

    def scores(self, path: Path, images: np.ndarray, *, batch: int = 32) -> np.ndarray:
        """Return what a model file answers, computed by ONNX Runtime on this machine.

        Args:
            images: (n, c, h, w) float32.

        Returns:
            (n, classes) float32.
        """
        return Device(precision=self.precision).scores(path, images, batch=batch)
