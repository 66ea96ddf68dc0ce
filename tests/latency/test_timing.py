"""The statistics of the protocol against cases whose answer is known."""

import numpy as np
import pytest

from fbnas.latency.timing import Timing, noise_floor, summarize


def test_the_value_is_the_low_quantile_whatever_disturbs_the_rest() -> None:
    quiet = np.linspace(1.0, 1.1, 101)
    disturbed = np.where(np.arange(101) < 60, quiet, 50.0)
    assert summarize(quiet).latency_ms == pytest.approx(1.01)
    assert summarize(disturbed).latency_ms == pytest.approx(1.01)


def test_the_interval_encloses_the_value_and_narrows_with_samples() -> None:
    generator = np.random.default_rng(0)
    few, many = (summarize(1 + generator.exponential(0.1, n)) for n in (10, 1000))
    for timing in (few, many):
        assert timing.low_ms <= timing.latency_ms <= timing.high_ms
    assert many.high_ms - many.low_ms < few.high_ms - few.low_ms


def test_rounds_that_did_not_visit_the_model_do_not_count() -> None:
    timing = summarize(np.array([2.0, np.nan, 2.0]))
    assert timing == Timing(2.0, 2.0, 2.0, 2)
    with pytest.raises(ValueError, match="at least one sample"):
        summarize(np.array([np.nan]))


def test_the_noise_floor_sees_drift_and_noise() -> None:
    steady = np.full((20, 3), 5.0)
    drifting, alternating = steady.copy(), steady.copy()
    drifting[10:] *= 1.1
    alternating[::2] *= 1.1
    assert noise_floor(steady) == 0.0
    for samples in (drifting, alternating):
        assert noise_floor(samples) == pytest.approx(0.1 / 1.05)


def test_the_noise_floor_is_that_of_a_typical_model() -> None:
    samples = np.full((20, 5), 5.0)
    samples[10:, 0] *= 3
    assert noise_floor(samples) == 0.0


def test_the_noise_floor_leaves_out_rounds_of_unstable_models_alone() -> None:
    samples = np.full((6, 2), 5.0)
    samples[4:, 1] = np.nan
    assert noise_floor(samples) == 0.0
    with pytest.raises(ValueError, match="at least 2 rounds; got 1"):
        noise_floor(samples[:1])


def test_a_timing_survives_its_dict() -> None:
    timing = Timing(1.5, 1.25, 1.75, 30)
    assert Timing.from_dict(timing.as_dict()) == timing
