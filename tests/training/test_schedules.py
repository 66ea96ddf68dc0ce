import pytest

from fbnas.errors import InputError
from fbnas.training.schedules import at, check_points, cosine


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


def test_points_by_hand() -> None:
    points = [[0.2, 1.0], [0.6, 3.0], [0.6, 0.0], [1.0, 4.0]]
    parts = [0.0, 0.2, 0.4, 0.59999999, 0.6, 0.8, 1.0]
    assert [at(points, part) for part in parts] == pytest.approx([1, 1, 2, 3, 0, 2, 4])
    assert at([[0, 8.0], [1, 2.0]], 0.5, geometric=True) == pytest.approx(4.0)
    assert at([[0.5, 8.0]], 0.1) == at([[0.5, 8.0]], 0.9) == 8.0


@pytest.mark.parametrize(
    ("points", "says"),
    [
        (5, "expected points"),
        ([], "expected points"),
        ([[0, 1, 2]], "expected points"),
        ([[0, True]], "expected points"),
        ([[0, float("nan")]], "expected points"),
        ([[0.5, 1], [0.2, 1]], "expected rising parts"),
        ([[0, 1], [1.5, 1]], "expected rising parts"),
        ([[0, 1], [1, -1]], "expected more than 0"),
        ([[0, 1], [1, 0]], "expected more than 0"),
    ],
)
def test_what_is_no_schedule_is_refused(points: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_points("tau", points, positive=True)
