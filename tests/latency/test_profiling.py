"""Profiling and calibrating a tiny space for real: kill, resume, extend, refuse."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fbnas.errors import InputError
from fbnas.files import write_yaml
from fbnas.latency.calibration import apply, calibrate, fit, predict, spread_networks, uncorrected
from fbnas.latency.devices import Device
from fbnas.latency.profiling import enliven_, plan, profile
from fbnas.latency.table import OVERHEAD, LatencyTable, Shape
from fbnas.space import SearchSpace, build_network
from fbnas.space.architecture import Architecture

ROOT = Path(__file__).parents[2]
SPACE = {
    "name": "tiny",
    "resolution": 16,
    "input_channels": 1,
    "stem": {"channels": 8, "stride": 1},
    "stages": [
        {"channels": 8, "layers": 2, "stride": 1},
        {"channels": 16, "layers": 2, "stride": 2},
    ],
    "head": 32,
    "blocks": ["k3_e1", "k5_e6", "skip"],
}
PROFILE = """
import sys; from fbnas.latency.devices import Device; from fbnas.latency.profiling import profile
from fbnas.space import SearchSpace
profile(SearchSpace.load(sys.argv[1]), Device(), sys.argv[2], classes=10, rounds=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.from_dict(SPACE)


@pytest.fixture(scope="module")
def table_path(space: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "local_fp32.csv"
    profile(space, Device(), path, classes=10, rounds=4)
    return path


def test_the_plan_holds_every_shape_once(space: SearchSpace) -> None:
    items = plan(space, 10)
    assert len(items) == len(set(items))
    assert set(items) == {
        OVERHEAD,
        Shape("stem", 1, 8, 1, 16, 16),
        *(Shape(block, 8, 8, 1, 16, 16) for block in space.blocks),
        *(Shape(block, 8, 16, 2, 16, 16) for block in space.blocks),
        *(Shape(block, 16, 16, 1, 8, 8) for block in space.blocks),
        Shape("head", 16, 32, 1, 8, 8),
        Shape("classifier", 32, 10, 1, 8, 8),
    }
    assert str(items[1]) == "stem (1 -> 8, stride 1, 16x16)"


def test_a_profile_holds_what_the_search_needs(space: SearchSpace, table_path: Path) -> None:
    table = LatencyTable.load(table_path)
    assert {entry.shape for entry in table.entries} == set(plan(space, 10))
    latency_ms, base_ms = table.tensor(space)
    assert (~latency_ms.isnan()).equal(space.offered)
    assert base_ms > 0
    skip = space.blocks.index("skip")
    identities = [layer.keeps_shape for layer in space.layers]
    assert (latency_ms[:, skip] == 0).tolist() == identities
    assert (latency_ms[:, space.blocks.index("k5_e6")] > latency_ms[:, skip]).all()
    stated = {"device", "cpu", "os", "runtime_version", "protocol", "date", "rounds", "space"}
    assert stated <= table.header.keys()
    assert not table_path.with_name("local_fp32.csv.partial").exists()


def test_only_what_is_missing_is_measured(
    space: SearchSpace, table_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(table_path.read_bytes())
    before = LatencyTable.load(path)
    assert profile(space, Device(), path, classes=10) == before
    assert path.read_bytes() == table_path.read_bytes()
    after = profile(replace(space, name="seven"), Device(), path, classes=7, rounds=2)
    assert after.entries[: len(before.entries)] == before.entries
    assert [e.shape for e in after.entries[len(before.entries) :]] == [
        Shape("classifier", 32, 7, 1, 8, 8)
    ]
    assert after.header["space"] == "tiny seven"
    assert LatencyTable.load(path) == after


def test_another_devices_table_is_refused(space: SearchSpace, table_path: Path) -> None:
    with pytest.raises(
        InputError, match="was measured with precision fp32, here it is int8; .*give"
    ):
        profile(space, Device(precision="int8"), table_path)
    with pytest.raises(InputError, match="was measured with threads 1, here it is 2"):
        calibrate(LatencyTable.load(table_path), space, Device(threads=2))


def test_a_folder_that_cannot_be_written_is_refused(space: SearchSpace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written .*give another table=FILE"):
        profile(space, Device(), tmp_path / "file" / "t.csv")


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_profile_continues(space: SearchSpace, tmp_path: Path, blow: int) -> None:
    write_yaml(tmp_path / "space.yaml", SPACE)
    table, work = tmp_path / "t.csv", tmp_path / "t.csv.partial"

    def run(rounds: int) -> subprocess.Popen[bytes]:
        arguments = [str(tmp_path / "space.yaml"), str(table), str(rounds)]
        return subprocess.Popen([sys.executable, "-c", PROFILE, *arguments], cwd=ROOT)

    first = run(200000)
    deadline = time.monotonic() + 90
    while not (work / "timings.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(blow)
    assert first.wait(timeout=60) != 0
    assert not table.exists()
    models = {path: path.stat().st_mtime_ns for path in (work / "models").iterdir()}
    assert models
    lines = (work / "timings.jsonl").read_text().splitlines(keepends=True)
    done = sum(line.endswith("\n") for line in lines)
    rounds = done + 2
    measured = profile(space, Device(), table, classes=10, rounds=rounds)
    assert max(entry.samples for entry in measured.entries) >= rounds
    assert not work.exists()


def test_models_of_an_interrupted_plan_are_kept_and_of_another_plan_are_not(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_(self: Device, module: object, shape: object, path: Path, **_: object) -> None:
        compiled.append(path.name)
        if len(compiled) == 3:
            raise KeyboardInterrupt
        path.write_text("model")

    monkeypatch.setattr(Device, "compile", compile_)
    monkeypatch.setattr(Device, "measure", lambda *_, **__: pytest.fail("nothing to measure yet"))
    for classes, first in ((10, 0), (10, 2), (7, 0)):
        del compiled[:]
        with pytest.raises(KeyboardInterrupt):
            profile(space, Device(), tmp_path / "t.csv", classes=classes)
        assert compiled[0] == f"{first:04d}.onnx"


def test_a_network_stays_alive_and_far_from_denormals(space: SearchSpace) -> None:
    torch.manual_seed(0)
    network = enliven_(build_network(space, Architecture(("k5_e6",) * len(space.layers)), 10))
    with torch.no_grad():
        features = network.stem(torch.randn(2, 1, 16, 16))
        for layer in network.layers:
            features = layer(features)
        features = network.head(features)
    assert (features > 1e-3).float().mean() > 0.1


def test_calibration_on_whole_networks(space: SearchSpace, table_path: Path) -> None:
    table = LatencyTable.load(table_path)
    calibration = calibrate(table, space, Device(), classes=10, networks=4, held_out=2, rounds=6)
    corrected = apply(table, calibration)
    latency_ms, base_ms = corrected.tensor(space, classes=10)
    for network in calibration.networks:
        assert network.measured.latency_ms > 0
        expected = predict(space, network.architecture, latency_ms, base_ms)
        assert network.corrected_ms == pytest.approx(expected, rel=1e-3)
    assert [network.held_out for network in calibration.networks].count(True) == 2
    stated = calibration.as_dict()
    assert stated["networks"][0].keys() == {
        "predicted_ms",
        "corrected_ms",
        "measured_ms",
        "held_out",
    }
    assert uncorrected(corrected) == table
    assert corrected.entries == table.entries


def test_too_few_networks_are_refused(space: SearchSpace, table_path: Path) -> None:
    with pytest.raises(InputError, match="networks=2, held_out=5; expected at least 3 networks"):
        calibrate(LatencyTable.load(table_path), space, Device(), networks=2)


def test_fit_finds_the_line_through_outliers() -> None:
    predicted_ms = np.linspace(1.0, 3.0, 11)
    measured_ms = 1.2 * predicted_ms + 0.3
    measured_ms[4] *= 5
    assert fit(predicted_ms, measured_ms) == pytest.approx((1.2, 0.3))


def test_fit_takes_a_ratio_where_there_is_no_line() -> None:
    predicted_ms = np.array([1.0, 1.001, 1.002])
    assert fit(predicted_ms, np.array([2.2, 2.0, 2.1])) == pytest.approx((2.1 / 1.002, 0.0))
    falling = np.array([1.0, 2.0, 3.0])
    assert fit(falling, falling[::-1])[1] == 0.0
    with pytest.raises(InputError, match="take 10 times what the table says; expected 0.3 to 3"):
        fit(falling, falling * 10)


def test_networks_are_spread_over_the_predicted_range(space: SearchSpace) -> None:
    space = replace(space, stages=(replace(space.stages[0], layers=12),), blocks=("k3_e1", "skip"))
    latency_ms = torch.tensor([[1.0, 0.0]] * 12, dtype=torch.float64)
    networks = spread_networks(space, latency_ms, 7)
    predicted = [predict(space, network, latency_ms, 0.5) for network in networks]
    assert predicted == sorted(predicted)
    assert np.allclose(np.diff(predicted), 2.0)  # uniform draws would crowd around 6.5
    assert spread_networks(space, latency_ms, 7) == networks
