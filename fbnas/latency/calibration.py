"""The table against whole networks: how well blocks sum up, and a straight line that mends it.

A block alone finds its weights in the cache and reorders its own input and output; in a network
it does not. On a 2-core x86 machine the blocks of space fbnet summed to 12 % too little; a line,
fitted on 20 networks, left 2.3 % of error at a noise floor of 1.5 %.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.latency.devices import ROUNDS, Device
from fbnas.latency.profiling import enliven_, one_torch_thread, require_same_device
from fbnas.latency.runtimes import runtime
from fbnas.latency.table import CORRECTION, LatencyTable
from fbnas.latency.timing import Timing
from fbnas.progress import progress
from fbnas.space import Architecture, SearchSpace, build_network

log = logging.getLogger(__name__)

LEAST_NETWORKS = 3
CANDIDATES = 500
STEEPEST_TILT = 3.0
SANE_SCALES = (0.3, 3.0)
NARROW_SPAN = 0.1  # predictions that span less say nothing about a slope


@dataclass(frozen=True)
class MeasuredNetwork:
    """A whole network: what the table said, what the corrected table says, what was measured."""

    architecture: Architecture
    predicted_ms: float
    corrected_ms: float
    measured: Timing
    held_out: bool


@dataclass(frozen=True)
class Calibration:
    """measured = scale * predicted + base_ms, and how good that is.

    bias_before: mean of predicted / measured. error_before, error_after: mean of
    |prediction / measured - 1| over the held-out networks, before and after the correction.
    spearman: rank correlation over all networks. noise_floor: test against retest of the networks.
    """

    scale: float
    base_ms: float
    bias_before: float
    error_before: float
    error_after: float
    spearman: float
    noise_floor: float
    networks: tuple[MeasuredNetwork, ...]

    @property
    def helps(self) -> bool:
        """Whether the correction came closer to the networks that it was not fitted on."""
        return self.error_after < self.error_before

    def as_dict(self) -> dict[str, Any]:
        """Return the form of `calibration` in result.json."""
        return {
            "scale": self.scale,
            "base_ms": self.base_ms,
            "bias_before": self.bias_before,
            "error_before": self.error_before,
            "error_after": self.error_after,
            "spearman": self.spearman,
            "noise_floor": self.noise_floor,
            "networks": [
                {
                    "predicted_ms": network.predicted_ms,
                    "corrected_ms": network.corrected_ms,
                    "measured_ms": network.measured.latency_ms,
                    "held_out": network.held_out,
                }
                for network in self.networks
            ],
        }


def calibrate(
    table: LatencyTable,
    space: SearchSpace,
    device: Device,
    *,
    classes: int = 1000,
    networks: int = 10,
    held_out: int = 5,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Calibration:
    """Measure random networks against each other, fit the line on some, judge it on the others.

    A correction that the table already carries is left out of the predictions. The networks are
    untrained: latency does not depend on weights.

    Args:
        networks: how many the line is fitted on.
        held_out: how many more it is judged on.

    Raises:
        InputError: below 3 networks or 1 held out, another device's table, or no sane line.
    """
    if networks < LEAST_NETWORKS or held_out < 1:
        raise InputError(
            f"networks={networks}, held_out={held_out}; expected at least {LEAST_NETWORKS} "
            "networks to fit a line on and 1 held out to judge it"
        )
    require_same_device(table, device)
    latency_ms, table_base_ms = uncorrected(table).tensor(space, classes=classes)
    drawn = spread_networks(space, latency_ms, networks + held_out, seed=seed)
    predicted_ms = np.array([predict(space, a, latency_ms, table_base_ms) for a in drawn])
    timings, noise_floor = _measure(drawn, space, device, classes=classes, rounds=rounds, seed=seed)
    measured_ms = np.array([timing.latency_ms for timing in timings])
    judged = np.zeros(len(drawn), dtype=bool)
    judged[np.linspace(1, len(drawn) - 2, held_out).round().astype(int)] = True  # ends are fitted
    scale, base_ms = fit(predicted_ms[~judged], measured_ms[~judged])
    corrected_ms = scale * predicted_ms + base_ms
    rows = zip(drawn, predicted_ms, corrected_ms, timings, judged, strict=True)
    return Calibration(
        scale=scale,
        base_ms=base_ms,
        bias_before=float(np.mean(predicted_ms / measured_ms)),
        error_before=_error(predicted_ms[judged], measured_ms[judged]),
        error_after=_error(corrected_ms[judged], measured_ms[judged]),
        spearman=_spearman(predicted_ms, measured_ms),
        noise_floor=noise_floor,
        networks=tuple(
            MeasuredNetwork(a, float(before), float(after), timing, bool(held))
            for a, before, after, timing, held in rows
        ),
    )


def apply(table: LatencyTable, calibration: Calibration) -> LatencyTable:
    """Return the table with the correction in its header; its rows stay as measured."""
    header = {
        **table.header,
        "correction_scale": f"{calibration.scale:.6g}",
        "correction_base_ms": f"{calibration.base_ms:.6g}",
        "calibration": (
            f"{len(calibration.networks)} networks, bias {calibration.bias_before:.3f}, "
            f"held-out error {calibration.error_before:.4f} before, {calibration.error_after:.4f} "
            f"after, spearman {calibration.spearman:.3f}, noise floor {calibration.noise_floor:.4f}"
        ),
    }
    return LatencyTable(header, table.entries, path=table.path)


def uncorrected(table: LatencyTable) -> LatencyTable:
    """Return the table without a correction."""
    header = {key: value for key, value in table.header.items() if key not in CORRECTION}
    return LatencyTable(header, table.entries, path=table.path)


def fit(predicted_ms: np.ndarray, measured_ms: np.ndarray) -> tuple[float, float]:
    """Return scale and base (ms) of measured = scale * predicted + base, undisturbed by outliers.

    Theil-Sen: the scale is the median of the slopes between all pairs, the base the median of what
    it leaves. Where the predictions lie too close for a slope, or the line is not sane: the median
    ratio and base 0.

    Raises:
        InputError: that ratio too is outside 0.3 to 3, so the table is not this device's.
    """
    if np.ptp(predicted_ms) > NARROW_SPAN * np.median(predicted_ms):
        first, second = np.triu_indices(len(predicted_ms), k=1)
        steps = predicted_ms[second] - predicted_ms[first]
        apart = steps != 0
        slopes = (measured_ms[second] - measured_ms[first])[apart] / steps[apart]
        scale = float(np.median(slopes))
        base_ms = float(np.median(measured_ms - scale * predicted_ms))
        positive = scale * float(predicted_ms.min()) + base_ms > 0
        if SANE_SCALES[0] <= scale <= SANE_SCALES[1] and positive:
            return scale, base_ms
    scale = float(np.median(measured_ms / predicted_ms))
    if not SANE_SCALES[0] <= scale <= SANE_SCALES[1]:
        raise InputError(
            f"whole networks take {scale:.3g} times what the table says; expected "
            f"{SANE_SCALES[0]} to {SANE_SCALES[1]}: the table is another machine's or this one is "
            "busy; profile again"
        )
    return scale, 0.0


def spread_networks(
    space: SearchSpace, latency_ms: Tensor, count: int, *, seed: int = 0
) -> list[Architecture]:
    """Return random networks whose predicted latencies are spread evenly, fastest first.

    Uniform draws crowd around the mean, so each candidate draws its blocks with probability
    proportional to exp(tilt * z), z the block's standardised latency in its layer, the tilt random;
    of 500 candidates those next to evenly spaced latencies are taken.

    Args:
        latency_ms: (layers, blocks), nan where not offered.
    """
    generator = torch.Generator().manual_seed(seed)
    offered = ~latency_ms.isnan()
    cost = latency_ms.nan_to_num(0.0)
    mean = cost.sum(1, keepdim=True) / offered.sum(1, keepdim=True)
    z = (cost - mean) / (((cost - mean) ** 2 * offered).mean(1, keepdim=True).sqrt() + 1e-12)
    tilts = (torch.rand(CANDIDATES, 1, 1, generator=generator) * 2 - 1) * STEEPEST_TILT
    weights = torch.exp(tilts * z) * offered
    paths = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(CANDIDATES, -1)
    totals = cost.gather(1, paths.T).sum(0)
    left = torch.argsort(totals).tolist()
    chosen = []
    for wanted in np.linspace(float(totals.min()), float(totals.max()), count):
        nearest = min(left, key=lambda i: abs(float(totals[i]) - wanted))
        left.remove(nearest)
        chosen.append(nearest)
    return [
        Architecture.from_path(space, paths[i].tolist(), source="calibration")
        for i in sorted(chosen, key=lambda i: float(totals[i]))
    ]


def predict(
    space: SearchSpace, architecture: Architecture, latency_ms: Tensor, base_ms: float
) -> float:
    """Return LAT(a) = base + sum over layers of the chosen block's latency, ms."""
    path = torch.tensor(architecture.path(space))
    return base_ms + float(latency_ms.gather(1, path[:, None]).sum())


def _measure(
    architectures: list[Architecture],
    space: SearchSpace,
    device: Device,
    *,
    classes: int,
    rounds: int,
    seed: int,
) -> tuple[tuple[Timing, ...], float]:
    shape = (space.input_channels, space.resolution, space.resolution)
    suffix = runtime(device.runtime).SUFFIX
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        files = []
        compiling = progress("Compiling whole networks", total=len(architectures))
        with one_torch_thread(), compiling as advance:
            for index, architecture in enumerate(architectures):
                torch.manual_seed(seed)
                network = build_network(space, architecture, classes)
                files.append(Path(folder) / f"{index:03d}{suffix}")
                device.compile(enliven_(network, seed), shape, files[-1])
                advance(1)
        measurement = device.measure_quietly(
            files, "Timing whole networks", rounds=rounds, seed=seed
        )
    return measurement.timings, measurement.noise_floor


def _error(predicted_ms: np.ndarray, measured_ms: np.ndarray) -> float:
    return float(np.mean(np.abs(predicted_ms / measured_ms - 1)))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)
