"""Agreement of predictions with measurements, against its definition."""

import math

import numpy as np
import pytest

from fbnas.latency.agreement import agreement
from fbnas.latency.table_file import check_header


def test_agreement_is_what_its_words_say() -> None:
    found = agreement(np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 2.0, 5.0, 2.5]))
    assert found.networks == 4
    assert found.bias == pytest.approx((0.5 + 1.0 + 0.8 + 1.2) / 4)
    assert found.mean_error == pytest.approx((0.5 + 0.0 + 0.2 + 0.2) / 4)
    # ranks 1 2 4 3 against 1.5 1.5 4 3; five pairs in order, one tied
    assert found.spearman == pytest.approx(0.9486832980505138)
    assert found.kendall == pytest.approx(5 / math.sqrt(6 * 5))
    assert "bias 0.875, mean error 22.5 %, Spearman 0.949, Kendall 0.913" in str(found)


def test_reversed_ranks_are_minus_one() -> None:
    found = agreement(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0]))
    assert (found.spearman, found.kendall) == pytest.approx((-1.0, -1.0))


def test_ranks_of_equal_predictions_are_unknown() -> None:
    found = agreement(np.array([2.0, 2.0]), np.array([1.0, 4.0]))
    assert math.isnan(found.spearman)
    assert found.mean_error == pytest.approx((1.0 + 0.5) / 2)


def test_of_one_network_a_table_states_the_error_alone() -> None:
    found = agreement(np.array([2.0]), np.array([1.6]))
    assert found.header() == {"calibration_error": "0.2500"}
    assert found.as_dict()["spearman"] is found.as_dict()["kendall"] is None
    header = dict.fromkeys(("device", "runtime"), "x") | {"precision": "fp32", "noise_floor": "0"}
    check_header({**header, "threads": "1", "batch": "1", **found.header()}, "table")
    several = agreement(np.array([1.0, 2.0]), np.array([1.0, 2.0])).header()
    assert several["calibration_spearman"] == "1.0000"


@pytest.mark.parametrize("counts", [(0, 0), (2, 3)])
def test_what_cannot_be_compared_is_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected as many of both, at least one"):
        agreement(np.ones(counts[0]), np.ones(counts[1]))
