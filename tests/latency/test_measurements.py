"""Files of measured whole networks: what is read, and what is refused, by line."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from fbnas.errors import InputError
from fbnas.latency.measurements import read_measurements, read_networks, write_networks
from fbnas.space import SearchSpace

GOOD = ["blocks,latency_ms,other_ms", "k3_e1 skip,10.0,1", "skip skip,8.0,2"]


@pytest.fixture
def space() -> SearchSpace:
    return SearchSpace.from_dict(
        {
            "name": "two",
            "resolution": 8,
            "input_channels": 1,
            "stem": {"channels": 8, "stride": 1},
            "stages": [{"channels": 8, "layers": 2, "stride": 1}],
            "head": 16,
            "blocks": ["k3_e1", "k5_e6", "skip"],
        }
    )


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_networks_and_their_totals_are_read(space: SearchSpace, tmp_path: Path) -> None:
    path = written(tmp_path / "m.csv", GOOD)
    found = read_measurements(path, space, "latency_ms")
    assert found.paths.tolist() == [[0, 2], [2, 2]]
    assert found.latency_ms.tolist() == [10.0, 8.0]
    assert read_measurements(path, space, "other_ms").latency_ms.tolist() == [1.0, 2.0]
    packed = tmp_path / "m.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert np.array_equal(read_measurements(packed, space, "latency_ms").paths, found.paths)


def test_a_network_measured_twice_counts_by_its_mean(space: SearchSpace, tmp_path: Path) -> None:
    path = written(tmp_path / "m.csv", [*GOOD, "k3_e1 skip,11.0,1"])
    assert read_measurements(path, space, "latency_ms").latency_ms.tolist() == [10.5, 8.0]


def test_what_is_written_is_read_back(space: SearchSpace, tmp_path: Path) -> None:
    paths = np.array([[0, 1], [2, 0]])
    write_networks(tmp_path / "s.csv", space, paths, "latency_ms")
    assert np.array_equal(read_networks(tmp_path / "s.csv", space), paths)
    with pytest.raises(InputError, match="line 2: latency_ms is missing; expected a positive"):
        read_measurements(tmp_path / "s.csv", space, "latency_ms")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["k3_e1 k9_e1,5,1"], r"line 4: Unknown block in layer 1 .*'k9_e1'. Did you mean"),
        (["k3_e1,5,1"], r"line 4: The architecture has 1 blocks, space two has 2 layers"),
        (["k3_e1 k3_e1,-5,1"], r"line 4: latency_ms is '-5'; expected a positive number of ms"),
        (["k3_e1 k3_e1,0,1"], r"line 4: latency_ms is '0'"),
        (["k3_e1 k3_e1,nan,1"], r"line 4: latency_ms is 'nan'"),
        (["k3_e1 k3_e1,fast,1"], r"line 4: latency_ms is 'fast'"),
        (["k3_e1 k3_e1,,1"], r"line 4: latency_ms is missing; .*or take the line out"),
        (["k3_e1 k3_e1,5"], r"line 4: another number of fields; expected 3"),
        (["skip skip,9.9,1"], r"line 4: the network of line 3 again, with 9.9 ms instead of 8 ms"),
    ],
)
def test_damage_is_named_by_line(
    space: SearchSpace, tmp_path: Path, lines: list[str], words: str
) -> None:
    path = written(tmp_path / "m.csv", [*GOOD, *lines])
    with pytest.raises(InputError, match=words):
        read_measurements(path, space, "latency_ms")


def test_other_files_are_refused(space: SearchSpace, tmp_path: Path) -> None:
    path = written(tmp_path / "m.csv", GOOD)
    with pytest.raises(InputError, match=r"line 1: the columns are .*did you mean latency_ms\?"):
        read_measurements(path, space, "latency")
    with pytest.raises(InputError, match="no such file; expected a CSV with the columns blocks"):
        read_measurements(tmp_path / "none.csv", space, "latency_ms")
    with pytest.raises(InputError, match=r"cannot be read .*expected a CSV"):
        (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(path.read_bytes())[:30])
        read_measurements(tmp_path / "cut.csv.gz", space, "latency_ms")
    with pytest.raises(InputError, match="holds no networks"):
        read_networks(written(tmp_path / "empty.csv", GOOD[:1]), space)
