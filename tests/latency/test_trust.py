"""What a table's header says against trusting it."""

import pytest

from fbnas.latency.table import LatencyTable
from fbnas.latency.table_file import Entry, Shape
from fbnas.latency.trust import doubts

GOOD = {
    "device": "board",
    "runtime": "onnxruntime",
    "precision": "fp32",
    "threads": "1",
    "batch": "1",
    "noise_floor": "0.01",
    "space": "tiny other",
    "quiet": "yes",
    "calibration": "a line",
    "calibration_error": "0.02",
    "calibration_spearman": "0.99",
    "calibration_noise_floor": "0.01",
}


def table(**header: str) -> LatencyTable:
    return LatencyTable({**GOOD, **header}, [Entry(Shape("k3_e1", 8, 8, 1, 4, 4), 1, 1, 1, 9)])


def test_a_good_table_is_not_doubted() -> None:
    assert doubts(table()) == []
    assert doubts(table(calibration_error="0.08", calibration_noise_floor="0.045")) == []


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"noise_floor": "0.051"}, "noise floor of 5.1 % .* into a new file"),
        (
            {"quiet": "no (other processes used 40 % of its cores)"},
            r"busy machine \(other .* cores\): profile into",
        ),
        ({"failed": "k5_e6 (..): no kernel"}, "lacks what failed on the device: k5_e6"),
        ({"calibration_error": "0.06"}, "do not add up on board: .* 6.0 % off, Spearman 0.990"),
        ({"calibration_spearman": "0.7"}, "do not add up on board: .* Spearman 0.700"),
    ],
)
def test_each_reason_is_said(header: dict[str, str], words: str) -> None:
    (found,) = doubts(table(**header))
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found)


def test_an_error_is_said_without_ranks_too() -> None:
    header = {key: value for key, value in GOOD.items() if key != "calibration_spearman"}
    (found,) = doubts(LatencyTable({**header, "calibration_error": "0.2"}, []))
    assert "20.0 % off (noise floor 1.0 %)" in found
    assert doubts(LatencyTable(header, [])) == []


def test_a_table_without_whole_networks_names_the_command() -> None:
    kept = {key: value for key, value in GOOD.items() if not key.startswith("calibration")}
    (found,) = doubts(LatencyTable(kept, []))
    assert "never held against whole networks" in found
    assert found.endswith("fbnas calibrate table=FILE space=tiny")
    (found,) = doubts(LatencyTable(kept, [Entry(Shape("classifier", 8, 3, 1, 4, 4), 1, 1, 1, 9)]))
    assert found.endswith("fbnas calibrate table=FILE space=tiny classes=3")
