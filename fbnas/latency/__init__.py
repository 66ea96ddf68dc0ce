"""WHAT a choice COSTS on a device: tables, an interleaved protocol, calibration."""

from fbnas.latency.calibration import Calibration, calibrate
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.profiling import plan, profile
from fbnas.latency.table import LatencyTable
from fbnas.latency.timing import Timing

__all__ = [
    "Calibration",
    "Device",
    "LatencyTable",
    "Measurement",
    "Timing",
    "calibrate",
    "plan",
    "profile",
]
