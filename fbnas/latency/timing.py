"""The measuring protocol's statistics: what raw times say about a model, and how far to trust them.

Times come from interleaved rounds: a round visits every model once, in random order, so that a slow
moment of the machine falls on all of them alike. The value of a model is a low quantile, because
disturbances only ever add time. Retesting 24 networks: 2.3 % off with 30 runs in sequence and a
median, 1.3 % off so (2-core x86).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fbnas.latency.runner import LOW_QUANTILE, interval, is_wide  # the device uses them too


@dataclass(frozen=True)
class Timing:
    """A model's latency and its 95 % interval, in ms, from `samples` rounds."""

    latency_ms: float
    low_ms: float
    high_ms: float
    samples: int

    def as_dict(self) -> dict[str, float | int]:
        """Return the form of `latency_ms` in result.json: value, low, high (ms) and samples."""
        return {
            "value": self.latency_ms,
            "low": self.low_ms,
            "high": self.high_ms,
            "samples": self.samples,
        }

    @classmethod
    def from_dict(cls, values: dict[str, float]) -> "Timing":
        """Read what `as_dict` returned."""
        samples = int(values["samples"])
        return cls(values["value"], values["low"], values["high"], samples)


def summarize(samples_ms: np.ndarray, *, seed: int = 0) -> Timing:
    """Return the 10th percentile of one model's times, with a bootstrapped 95 % interval.

    Args:
        samples_ms: (rounds,), nan where a round did not visit the model.
        seed: of the resamples.

    Raises:
        ValueError: not a single time.
    """
    times = samples_ms[~np.isnan(samples_ms)]
    if times.size == 0:
        raise ValueError("a timing needs at least one sample; got none")
    value, low, high = interval(times, seed)
    return Timing(value, low, high, int(times.size))


def noise_floor(samples_ms: np.ndarray) -> float:
    """Return test against retest, a fraction: how much a latency differs between two halves.

    |a - b| / ((a + b) / 2) with a, b the 10th percentiles of the two halves of a model's visits,
    median over the models. Two ways of halving, odd against even visits (noise) and early against
    late ones (drift); the larger answer counts.

    Args:
        samples_ms: (rounds, models), nan where a round did not visit the model. Models that were
            never visited do not count.

    Raises:
        ValueError: less than 2 rounds.
    """
    columns = _visits(samples_ms)
    rounds = min((column.size for column in columns), default=0)
    if rounds < 2:
        raise ValueError(f"a noise floor needs at least 2 rounds; got {rounds}")
    alternating = [_difference(times[0::2], times[1::2]) for times in columns]
    in_turn = [_difference(*np.array_split(times, 2)) for times in columns]
    return max(float(np.median(alternating)), float(np.median(in_turn)))


def unstable(samples_ms: np.ndarray) -> int:
    """Return how many models are still wide: their interval, or early against late, exceeds 3 %.

    Args:
        samples_ms: (rounds, models), as for `noise_floor`.
    """
    return sum(is_wide(times) for times in _visits(samples_ms))


def drift(probe_ms: Sequence[float]) -> float:
    """Return how far the machine's own speed moved, a fraction.

    (p90 - p10) / p10 of the times that one fixed piece of work took before each round: 0.04 on a
    quiet 2-core x86, 0.1 where the processor became 10 % slower half way, above 1 where other
    processes wait for its cores.

    Raises:
        ValueError: no times.
    """
    if len(probe_ms) == 0:
        raise ValueError("a drift needs at least one time of the probe; got none")
    low, high = np.quantile(np.asarray(probe_ms, dtype=float), (LOW_QUANTILE, 1 - LOW_QUANTILE))
    return float((high - low) / low)


def difference(whole: Timing, part: Timing) -> Timing:
    """Return what `whole` takes on top of `part`, not below 0; uncertainties add up squared."""
    value = whole.latency_ms - part.latency_ms
    low = value - math.hypot(whole.latency_ms - whole.low_ms, part.high_ms - part.latency_ms)
    high = value + math.hypot(whole.high_ms - whole.latency_ms, part.latency_ms - part.low_ms)
    samples = min(whole.samples, part.samples)
    return Timing(max(value, 0.0), max(low, 0.0), max(high, 0.0), samples)


def _visits(samples_ms: np.ndarray) -> list[np.ndarray]:
    columns = [column[~np.isnan(column)] for column in samples_ms.T]
    return [column for column in columns if column.size]


def _difference(test: np.ndarray, retest: np.ndarray) -> float:
    a, b = np.quantile(test, LOW_QUANTILE), np.quantile(retest, LOW_QUANTILE)
    return float(abs(a - b) / ((a + b) / 2))
