"""The table against whole networks: how well blocks sum up, and what mends it.

A block alone finds its weights in the cache and reorders its own input and output; in a network
it does not. The correction is a straight line; where held-out networks show that it helps, every
row gets its own, drawn towards the table by the estimate of totals.py.
"""

import logging
import shutil
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.latency.agreement import Agreement, agreement
from fbnas.latency.devices import QUIET_ATTEMPTS, ROUNDS, Measurement
from fbnas.latency.effects import entries_of
from fbnas.latency.profiling import AnyDevice, compile_networks, require_same_device
from fbnas.latency.suggestion import suggest
from fbnas.latency.table import CORRECTION, LatencyTable
from fbnas.latency.timing import Timing
from fbnas.latency.totals import LEAST_NETWORKS as LEAST_FOR_SHAPES
from fbnas.latency.totals import Estimate, estimate
from fbnas.progress import progress
from fbnas.space import Architecture, SearchSpace

log = logging.getLogger(__name__)

LEAST_NETWORKS = 3
CANDIDATES = 500
STEEPEST_TILT = 3.0
SANE_SCALES = (0.3, 3.0)
NARROW_SPAN = 0.1  # predictions that span less say nothing about a slope
LEAST_JUDGES = 10  # held-out networks, before they may speak for a correction of every row
CLEARLY = 1.0  # standard errors by which a correction of every row must be better than the line


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
    """A correction of a table, and how good it is.

    `scale`, `base_ms`: measured = scale * predicted + base_ms. `shapes`: a correction of every row
    by whole networks, where it is better than the line; else None. `before`, `after`: agreement
    with the held-out networks. `noise_floor`: test against retest of the networks, a fraction.
    `line`: agreement of the line alone. `failures`: networks that could not be measured.
    """

    scale: float
    base_ms: float
    shapes: Estimate | None
    before: Agreement
    line: Agreement
    after: Agreement
    noise_floor: float
    drift: float
    networks: tuple[MeasuredNetwork, ...]
    failures: tuple[str, ...] = ()

    @property
    def helps(self) -> bool:
        """Whether the correction came closer to the networks that it was not fitted on."""
        return self.after.mean_error < self.before.mean_error

    def as_dict(self) -> dict[str, Any]:
        """Return the form of `calibration` in result.json."""
        return {
            "scale": self.scale,
            "base_ms": self.base_ms,
            "shapes": self.shapes is not None,
            "before": self.before.as_dict(),
            "line": self.line.as_dict(),
            "after": self.after.as_dict(),
            "bias_before": self.before.bias,
            "error_before": self.before.mean_error,
            "error_after": self.after.mean_error,
            "spearman": self.after.as_dict()["spearman"],
            "noise_floor": self.noise_floor,
            "drift": self.drift,
            "failures": list(self.failures),
            "networks": [
                {
                    "blocks": list(network.architecture.blocks),
                    "predicted_ms": network.predicted_ms,
                    "corrected_ms": network.corrected_ms,
                    "measured_ms": network.measured.latency_ms,
                    "low_ms": network.measured.low_ms,
                    "high_ms": network.measured.high_ms,
                    "held_out": network.held_out,
                }
                for network in self.networks
            ],
        }


def calibrate(
    table: LatencyTable,
    space: SearchSpace,
    device: AnyDevice,
    *,
    classes: int = 1000,
    networks: int = 10,
    held_out: int = 5,
    rounds: int = ROUNDS,
    seed: int = 0,
    work: Path | None = None,
) -> Calibration:
    """Measure whole networks against each other, correct by some, judge by the others.

    Those that the correction is fitted on are the most telling ones (suggestion.py), those that
    judge it are random and spread over the range. A correction that the table already carries is
    left out of the predictions. The networks are untrained: latency does not depend on weights.

    Args:
        networks: how many the correction is fitted on.
        held_out: how many more it is judged on.
        work: folder in which an interrupted calibration continues; it is removed at the end.

    Raises:
        InputError: below 3 networks or 1 held out, another device's table, or no sane line.
    """
    if networks < LEAST_NETWORKS or held_out < 1:
        raise InputError(
            f"networks={networks}, held_out={held_out}; expected at least {LEAST_NETWORKS} "
            "networks to fit a line on and 1 held out to judge it"
        )
    require_same_device(table, device)
    plain = uncorrected(table)
    drawn, judging = chosen_networks(plain, space, networks, held_out, classes=classes, seed=seed)
    measurement = measured_networks(
        drawn, space, device, classes=classes, rounds=rounds, seed=seed, work=work
    )
    names = [" ".join(architecture.blocks) for architecture in drawn]
    failures = tuple(f"{names[i]}: {words}" for i, words in measurement.failures.items())
    kept = [i for i, timing in enumerate(measurement.timings) if timing is not None]
    found = judge(
        plain,
        space,
        [drawn[i] for i in kept],
        [timing for timing in measurement.timings if timing is not None],
        judging[kept],
        classes=classes,
        noise_floor=measurement.noise_floor,
    )
    if work is not None:
        shutil.rmtree(work)
    return replace(found, drift=measurement.drift, failures=failures)


def judge(
    table: LatencyTable,
    space: SearchSpace,
    drawn: Sequence[Architecture],
    timings: Sequence[Timing],
    held_out: np.ndarray,
    *,
    classes: int,
    noise_floor: float,
) -> Calibration:
    """Fit the correction on networks that are not `held_out` (networks,) bool; judge it on those.

    Args:
        table: without a correction.

    Raises:
        InputError: too few networks are left, or no sane line.
    """
    if (~held_out).sum() < LEAST_NETWORKS or not held_out.any():
        raise InputError(
            f"only {(~held_out).sum()} networks to fit and {held_out.sum()} to judge could be "
            f"measured; expected at least {LEAST_NETWORKS} and 1: see what failed, or ask for more"
        )
    latency_ms, base_ms = table.tensor(space, classes=classes)
    predicted_ms = np.array([predict(space, a, latency_ms, base_ms) for a in drawn])
    measured_ms = np.array([timing.latency_ms for timing in timings])
    scale, correction_ms = fit(predicted_ms[~held_out], measured_ms[~held_out])
    line_ms = scale * predicted_ms + correction_ms
    corrected_ms, shapes = line_ms, None
    if (~held_out).sum() >= LEAST_FOR_SHAPES and held_out.sum() >= LEAST_JUDGES:
        entries = entries_of(space)
        paths = np.array([architecture.path(space) for architecture in drawn])
        tried = estimate(entries, paths[~held_out], measured_ms[~held_out], prior=table)
        tried = replace(tried, entry_ms=np.maximum(tried.entry_ms, 0.0))
        shapes_ms = tried.predict(paths)[0]
        if _clearly_better(shapes_ms[held_out], line_ms[held_out], measured_ms[held_out]):
            corrected_ms, shapes = shapes_ms, tried
    rows = zip(drawn, predicted_ms, corrected_ms, timings, held_out, strict=True)
    return Calibration(
        scale=scale,
        base_ms=correction_ms,
        shapes=shapes,
        before=agreement(predicted_ms[held_out], measured_ms[held_out]),
        line=agreement(line_ms[held_out], measured_ms[held_out]),
        after=agreement(corrected_ms[held_out], measured_ms[held_out]),
        noise_floor=noise_floor,
        drift=0.0,
        networks=tuple(
            MeasuredNetwork(a, float(before), float(after), timing, bool(held))
            for a, before, after, timing, held in rows
        ),
    )


def _clearly_better(new_ms: np.ndarray, old_ms: np.ndarray, measured_ms: np.ndarray) -> bool:
    """Whether relative errors fall by more than the standard error of their paired difference."""
    gain = np.abs(old_ms / measured_ms - 1) - np.abs(new_ms / measured_ms - 1)
    return bool(gain.mean() > CLEARLY * gain.std(ddof=1) / np.sqrt(len(gain)))


def apply(
    table: LatencyTable, calibration: Calibration, space: SearchSpace, *, classes: int = 1000
) -> LatencyTable:
    """Return the table with the correction: in its header, and per row where that helps.

    Measured latencies stay as they are.

    Args:
        classes: as the networks of the calibration had.
    """
    plain = uncorrected(table)
    header = {
        **plain.header,
        "correction_scale": f"{calibration.scale:.6g}",
        "correction_base_ms": f"{calibration.base_ms:.6g}",
        **stated(calibration, space),
    }
    if calibration.shapes is None:
        return LatencyTable(header, plain.entries, path=table.path)
    found = calibration.shapes
    own = dict(zip(found.entries.shapes, found.entry_ms, strict=True))
    entries = [
        replace(entry, corrected_ms=round(float(own[entry.shape]), 6))
        if entry.shape in own and entry.samples
        else entry
        for entry in plain.entries
    ]
    scaled = LatencyTable({**header, "correction_base_ms": "0"}, entries, path=table.path)
    _, base_ms = scaled.tensor(space, classes=classes)
    header["correction_base_ms"] = f"{found.base_ms - base_ms:.6g}"
    return LatencyTable(header, entries, path=table.path)


def judged(table: LatencyTable, calibration: Calibration, space: SearchSpace) -> LatencyTable:
    """Return the table without a correction, and with what whole networks say of it."""
    plain = uncorrected(table)
    as_it_is = replace(calibration, after=calibration.before, shapes=None)
    header = {**plain.header, **stated(as_it_is, space)}
    header["calibration"] = header["calibration"].replace("a line fitted on", "no correction from")
    return LatencyTable(header, plain.entries, path=table.path)


def stated(calibration: Calibration, space: SearchSpace) -> dict[str, str]:
    """Return what a table's header says of its calibration."""
    fitted = sum(not network.held_out for network in calibration.networks)
    kind = "a line" if calibration.shapes is None else "every row, drawn towards the table"
    return {
        "calibration": (
            f"{kind} fitted on {fitted} networks of {space.name}, judged on "
            f"{calibration.after.networks} others; before {calibration.before}; after "
            f"{calibration.after}; noise floor {100 * calibration.noise_floor:.1f} %"
        ),
        **calibration.after.header(),
        "calibration_noise_floor": f"{calibration.noise_floor:.4f}",
    }


def uncorrected(table: LatencyTable) -> LatencyTable:
    """Return the table without a correction."""
    header = {key: value for key, value in table.header.items() if key not in CORRECTION}
    entries = [replace(entry, corrected_ms=None) for entry in table.entries]
    return LatencyTable(header, entries, path=table.path)


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


def chosen_networks(
    table: LatencyTable,
    space: SearchSpace,
    networks: int,
    held_out: int,
    *,
    classes: int = 1000,
    seed: int = 0,
) -> tuple[list[Architecture], np.ndarray]:
    """Return the networks to measure, and which of them (networks,) bool are held out.

    To fit: those that tell most about all others, by sequential A-optimal design with the table as
    prior. To judge: random ones, spread evenly over the predicted latencies.
    """
    latency_ms, _ = table.tensor(space, classes=classes)
    pool = random_tilted(space, latency_ms, CANDIDATES, seed=seed)
    chosen = suggest(entries_of(space), networks, among=pool, prior=table, seed=seed)
    fitted = [Architecture.from_path(space, path, source="calibration") for path in chosen.tolist()]
    taken = {architecture.blocks for architecture in fitted}
    others = spread_networks(space, latency_ms, held_out, seed=seed + 1, taken=taken)
    drawn = [*fitted, *others]
    judging = np.array([False] * len(fitted) + [True] * len(others))
    return drawn, judging


def random_tilted(
    space: SearchSpace, latency_ms: Tensor, count: int, *, seed: int = 0
) -> np.ndarray:
    """Return random networks from all over the range of latencies, (count, layers) block indices.

    Uniform draws crowd around the mean, so each network draws its blocks with probability
    proportional to exp(tilt * z), z the block's standardised latency in its layer, the tilt random.

    Args:
        latency_ms: (layers, blocks), nan where not offered.
    """
    generator = torch.Generator().manual_seed(seed)
    offered = ~latency_ms.isnan()
    cost = latency_ms.nan_to_num(0.0)
    mean = cost.sum(1, keepdim=True) / offered.sum(1, keepdim=True)
    z = (cost - mean) / (((cost - mean) ** 2 * offered).mean(1, keepdim=True).sqrt() + 1e-12)
    tilts = (torch.rand(count, 1, 1, generator=generator) * 2 - 1) * STEEPEST_TILT
    weights = torch.exp(tilts * z) * offered
    paths = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(count, -1)
    return np.array(paths)


def spread_networks(
    space: SearchSpace,
    latency_ms: Tensor,
    count: int,
    *,
    seed: int = 0,
    taken: Container[tuple[str, ...]] = (),
) -> list[Architecture]:
    """Return random networks whose predicted latencies are spread evenly, fastest first.

    Of 500 candidates those next to evenly spaced latencies are taken.

    Args:
        latency_ms: (layers, blocks), nan where not offered.
        taken: blocks of networks that are not to be drawn; they are where no others are left.
    """
    paths = torch.from_numpy(random_tilted(space, latency_ms, CANDIDATES, seed=seed))
    totals = latency_ms.nan_to_num(0.0).gather(1, paths.T).sum(0)
    drawn = [Architecture.from_path(space, p, source="calibration") for p in paths.tolist()]
    left = [i for i in torch.argsort(totals).tolist() if drawn[i].blocks not in taken]
    left = left if len(left) >= count else torch.argsort(totals).tolist()
    chosen = []
    for wanted in np.linspace(float(totals[left].min()), float(totals[left].max()), count):
        nearest = min(left, key=lambda i: abs(float(totals[i]) - wanted))
        left.remove(nearest)
        chosen.append(nearest)
    return [drawn[i] for i in sorted(chosen, key=lambda i: float(totals[i]))]


def predict(
    space: SearchSpace, architecture: Architecture, latency_ms: Tensor, base_ms: float
) -> float:
    """Return LAT(a) = base + sum over layers of the chosen block's latency, ms."""
    path = torch.tensor(architecture.path(space))
    return base_ms + float(latency_ms.gather(1, path[:, None]).sum())


def measured_networks(
    drawn: Sequence[Architecture],
    space: SearchSpace,
    device: AnyDevice,
    *,
    classes: int = 1000,
    rounds: int = ROUNDS,
    seed: int = 0,
    work: Path | None = None,
) -> Measurement:
    """Compile untrained networks and time them against each other, again while it is too noisy.

    Args:
        work: folder in which an interrupted call continues.

    Raises:
        InputError: not one network can be measured.
    """
    if work is None:
        with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
            return measured_networks(
                drawn,
                space,
                device,
                classes=classes,
                rounds=rounds,
                seed=seed,
                work=Path(folder),
            )
    files = compile_networks(drawn, space, device, work, classes=classes, seed=seed)
    best: Measurement | None = None
    for attempt in range(QUIET_ATTEMPTS):
        part = work / f"attempt_{attempt + 1}"
        part.mkdir(exist_ok=True)
        with progress(f"Timing {len(files)} whole networks", total=rounds) as advance:
            found = device.measure(
                files,
                rounds=rounds,
                seed=seed + attempt,
                work=part,
                progress=advance,
                keep_failures=True,
            )
        if best is None or found.noise_floor < best.noise_floor:
            best = found
        if best.quiet:
            break
        log.warning(
            "The machine is busy: test and retest differ by %.1f %%%s.",
            100 * found.noise_floor,
            "" if attempt + 1 == QUIET_ATTEMPTS else "; measuring again",
        )
    assert best is not None
    return best
