"""The measuring protocol's statistics: what raw times say about a model, and how far to trust them.

Times come from interleaved rounds: a round visits every model once, in random order, so that a slow
moment of the machine falls on all of them alike. The value of a model is a low quantile, because
disturbances only ever add time. Retesting 24 networks: 2.3 % off with 30 runs in sequence and a
median, 1.3 % off so (2-core x86).
"""

from dataclasses import dataclass

import numpy as np

LOW_QUANTILE = 0.10
RESAMPLES = 200
INTERVAL = (2.5, 97.5)  # percentiles of the resampled values: a 95 % interval


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

    Raises:
        ValueError: not a single time.
    """
    times = samples_ms[~np.isnan(samples_ms)]
    if times.size == 0:
        raise ValueError("a timing needs at least one sample; got none")
    value = float(np.quantile(times, LOW_QUANTILE))
    picks = np.random.default_rng(seed).integers(0, times.size, (RESAMPLES, times.size))
    low, high = np.percentile(np.quantile(times[picks], LOW_QUANTILE, axis=1), INTERVAL)
    return Timing(value, min(float(low), value), max(float(high), value), int(times.size))


def noise_floor(samples_ms: np.ndarray) -> float:
    """Return test against retest, a fraction: how much a latency differs between two halves.

    |a - b| / ((a + b) / 2) with a, b the 10th percentiles of the two halves of the rounds, median
    over the models. Two ways of halving, odd against even rounds (noise) and early against late
    ones (drift); the larger answer counts.

    Args:
        samples_ms: (rounds, models), nan where a round did not visit the model.

    Raises:
        ValueError: less than 2 rounds.
    """
    samples_ms = samples_ms[~np.isnan(samples_ms).any(axis=1)]  # later ones visit the unstable only
    rounds = samples_ms.shape[0]
    if rounds < 2:
        raise ValueError(f"a noise floor needs at least 2 rounds; got {rounds}")
    halvings = (
        (samples_ms[0::2], samples_ms[1::2]),
        (samples_ms[: rounds // 2], samples_ms[rounds // 2 :]),
    )
    return max(float(np.median(_differences(test, retest))) for test, retest in halvings)


def _differences(test: np.ndarray, retest: np.ndarray) -> np.ndarray:
    a = np.quantile(test, LOW_QUANTILE, axis=0)
    b = np.quantile(retest, LOW_QUANTILE, axis=0)
    return np.abs(a - b) / ((a + b) / 2)
