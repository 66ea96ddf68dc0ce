import pytest

from fbnas.training.schedules import cosine


@pytest.mark.parametrize("total", [1, 2, 7, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 5, 10_000])
def test_cosine_stays_in_range_and_reaches_the_full_rate(total: int, warmup: int) -> None:
    factors = [cosine(step, total, warmup=warmup) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    peak = factors.index(1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_cosine_by_hand() -> None:
    assert [cosine(step, 12, warmup=4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine(8, 12, warmup=4) == pytest.approx(0.5)
    assert cosine(12, 12, warmup=4) == pytest.approx(0)
