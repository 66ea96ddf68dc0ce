"""Profiling and calibrating a tiny space for real: kill, resume, extend, refuse."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.files import write_yaml
from fbnas.latency.calibration import (
    apply,
    calibrate,
    chosen_networks,
    fit,
    judge,
    predict,
    spread_networks,
    uncorrected,
)
from fbnas.latency.converting import ConversionError
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.graph_cost import graph_cost
from fbnas.latency.profiling import (
    build_reference,
    compile_networks,
    enliven_,
    plan,
    profile,
    reference_of,
)
from fbnas.latency.roofline import Roofline
from fbnas.latency.table import OVERHEAD, LatencyTable, Shape
from fbnas.latency.timing import Timing, difference
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
    assert plan(space, 10, context=False) == [OVERHEAD, *items]
    assert set(items) == {
        Shape("stem", 1, 8, 1, 16, 16),
        *(Shape(block, 8, 8, 1, 16, 16) for block in space.blocks),
        *(Shape(block, 8, 16, 2, 16, 16) for block in space.blocks),
        *(Shape(block, 16, 16, 1, 8, 8) for block in space.blocks),
        Shape("head", 16, 32, 1, 8, 8),
        Shape("classifier", 32, 10, 1, 8, 8),
    }
    assert str(items[0]) == "stem (1 -> 8, stride 1, 16x16)"


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
    assert {*stated, "provider", "drift", "unstable", "quiet"} <= table.header.keys()
    assert all(entry.peak_mb is not None for entry in table.entries if entry.samples)
    assert table.peak(space)[1] > 0
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


def test_a_block_costs_what_it_adds_to_what_stands_before_it() -> None:
    space = SearchSpace.from_dict(SPACE)
    block = Shape("k3_e1", 8, 16, 2, 16, 16)
    before = reference_of(block, space)
    assert before == Shape("before", 8, 8, 1, 16, 16)
    assert build_reference(before, space)(torch.zeros(1, 8, 16, 16)).shape == (1, 8, 16, 16)
    classifier = Shape("classifier", 32, 10, 1, 8, 8)
    head = reference_of(classifier, space)
    assert head == Shape("head", 16, 32, 1, 8, 8)
    assert build_reference(head, space)(torch.zeros(1, 16, 8, 8)).shape == (1, 32, 8, 8)
    assert reference_of(Shape("stem", 1, 8, 1, 16, 16), space) is None
    found = difference(Timing(5.0, 4.7, 5.4, 20), Timing(2.0, 1.7, 2.4, 22))
    values = (found.latency_ms, found.low_ms, found.high_ms, found.samples)
    assert values == pytest.approx((3.0, 2.5, 3.5, 20))
    assert difference(Timing(2.0, 1.9, 2.1, 9), Timing(2.5, 2.4, 2.6, 9)).latency_ms == 0.0


def test_on_a_planned_device_blocks_add_up_exactly(space: SearchSpace, tmp_path: Path) -> None:
    for precision in ("fp32", "int8"):
        device = Roofline(precision=precision)
        table = profile(space, device, tmp_path / f"{precision}.csv", classes=10)
        assert "not measured" in table.header["protocol"]
        found = calibrate(table, space, device, classes=10, networks=4, held_out=4)
        assert found.before.mean_error < 1e-5
        energy_mj, base_mj = table.energy(space)
        peak_mb, base_mb = table.peak(space)
        path = tmp_path / "network.onnx"
        network = build_network(space, found.networks[0].architecture, 10)
        device.compile(network, (1, 16, 16), path)
        cost, blocks = graph_cost(path), found.networks[0].architecture.path(space)
        chosen = [(i, j) for i, j in enumerate(blocks)]
        assert device.energy_mj(cost) == pytest.approx(
            base_mj + sum(float(energy_mj[i, j]) for i, j in chosen), rel=1e-4
        )
        highest = max([base_mb, *(float(peak_mb[i, j]) for i, j in chosen)])
        assert cost.peak_bytes / 1e6 == pytest.approx(highest, rel=1e-4)


def test_a_table_of_blocks_alone_goes_on_so(space: SearchSpace, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    alone = profile(space, Roofline(), path, classes=10, context=False)
    assert OVERHEAD in alone
    more = profile(space, Roofline(), path, classes=7)
    assert [e.shape.block for e in more.entries[len(alone.entries) :]] == ["classifier"]
    ten, seven = (e.latency_ms for e in more.entries if e.shape.block == "classifier")
    assert seven == pytest.approx(ten, rel=0.2)


def test_blocks_that_fail_are_named_and_the_others_kept(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, compile_ = tmp_path / "t.csv", Roofline.compile
    monkeypatch.setattr(Roofline, "kind", "local")

    def refuse(self: Roofline, module: nn.Module, shape: object, file: Path, **more: int) -> None:
        if any(getattr(part, "kernel_size", None) == (5, 5) for part in module.modules()):
            raise ConversionError("no kernel of 5x5 here")
        compile_(self, module, shape, file, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Roofline, "compile", refuse)
    table = profile(space, Roofline(), path, classes=10)
    assert {entry.shape.block for entry in table.entries}.isdisjoint({"k5_e6"})
    assert "k5_e6 (8 -> 8, stride 1, 16x16): no kernel of 5x5 here" in table.header["failed"]
    assert LatencyTable.load(path) == table
    with pytest.raises(InputError, match="No latency for k5_e6"):
        table.tensor(space, classes=10)
    monkeypatch.setattr(Roofline, "compile", compile_)
    whole = profile(space, Roofline(), path, classes=10)  # the same command again
    assert "failed" not in whole.header
    assert whole.entries[: len(table.entries)] == table.entries
    whole.tensor(space, classes=10)


def test_a_busy_machine_is_said(
    space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Roofline.measure
    busy = {"load": 0.4, "noise_floor": 0.08, "drift": 0.3, "unstable": 2}

    def disturbed(self: Roofline, *arguments: Any, **options: Any) -> Measurement:
        return replace(measure(self, *arguments, **options), **busy)

    monkeypatch.setattr(Roofline, "measure", disturbed)
    table = profile(space, Roofline(), tmp_path / "t.csv", classes=10)
    assert table.quiet == (
        "no (test and retest differ by 8.0 %, other processes used 40 % of its cores)"
    )
    assert table.header["unstable"] == "2"
    monkeypatch.setattr(Roofline, "measure", measure)
    more = profile(space, Roofline(), tmp_path / "t.csv", classes=7)
    assert (more.quiet, more.noise_floor) == (table.quiet, 0.08)


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

    with run(200000) as first:
        try:
            deadline = time.monotonic() + 90
            while not (work / "timings.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            first.send_signal(blow)
            assert first.wait(timeout=60) != 0
        finally:
            first.kill()
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
    for classes, first in ((10, "0000"), (10, "0001"), (7, "0000")):
        del compiled[:]
        with pytest.raises(KeyboardInterrupt):
            profile(space, Device(), tmp_path / "t.csv", classes=classes)
        assert compiled[0] == f"{first}.onnx"


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
    corrected = apply(table, calibration, space, classes=10)
    latency_ms, base_ms = corrected.tensor(space, classes=10)
    for network in calibration.networks:
        assert network.measured.latency_ms > 0
        expected = predict(space, network.architecture, latency_ms, base_ms)
        assert network.corrected_ms == pytest.approx(expected, rel=1e-3)
    assert [network.held_out for network in calibration.networks].count(True) == 2
    stated = calibration.as_dict()
    assert {"blocks", "predicted_ms", "corrected_ms", "measured_ms", "held_out"} <= stated[
        "networks"
    ][0].keys()
    assert {"calibration_error", "calibration_spearman"} <= corrected.header.keys()
    assert uncorrected(corrected) == table
    assert corrected.entries == table.entries


WIDE = {**SPACE, "stages": [{"channels": 8, "layers": 4, "stride": 1}, SPACE["stages"][1]]}


@pytest.mark.parametrize("bent", [False, True])
def test_every_row_is_corrected_only_where_held_out_networks_gain(
    bent: bool, tmp_path: Path
) -> None:
    space = SearchSpace.from_dict(WIDE)
    table = profile(space, Roofline(), tmp_path / "t.csv", classes=10)
    drawn, held_out = chosen_networks(table, space, 12, 30, classes=10)
    assert len({network.blocks for network in drawn}) > 30
    latency_ms, base_ms = table.tensor(space, classes=10)
    truth_ms = latency_ms.clone() * 1.3
    if bent:
        truth_ms[:, space.blocks.index("k5_e6")] *= 1.5
    jitter = np.random.default_rng(0).normal(1.0, 0.002, len(drawn))
    totals = [
        predict(space, a, truth_ms, base_ms + 0.1) * j for a, j in zip(drawn, jitter, strict=True)
    ]
    timings = [Timing(ms, ms, ms, 9) for ms in totals]
    found = judge(table, space, drawn, timings, held_out, classes=10, noise_floor=0.002)
    assert (found.shapes is not None) == bent
    assert found.helps
    corrected = apply(table, found, space, classes=10)
    mended_ms, mended_base_ms = corrected.tensor(space, classes=10)
    for network in found.networks:
        expected = predict(space, network.architecture, mended_ms, mended_base_ms)
        assert network.corrected_ms == pytest.approx(expected, rel=1e-3)
    assert found.after.mean_error < (0.02 if bent else 0.004)
    if bent:
        assert found.after.mean_error < found.line.mean_error / 2
    assert uncorrected(corrected).entries == table.entries
    corrected.save(tmp_path / "corrected.csv")
    assert LatencyTable.load(tmp_path / "corrected.csv") == corrected


def test_a_killed_calibration_continues(space: SearchSpace, tmp_path: Path) -> None:
    table, work = profile(space, Roofline(), tmp_path / "t.csv", classes=10), tmp_path / "work"
    drawn, _ = chosen_networks(table, space, 4, 3, classes=10)
    files = compile_networks(drawn, space, Roofline(), work, classes=10)
    files[-1].unlink()
    kept = {file: file.stat().st_mtime_ns for file in files[:-1]}
    assert compile_networks(drawn, space, Roofline(), work, classes=10) == files
    assert {file: file.stat().st_mtime_ns for file in files[:-1]} == kept
    found = calibrate(table, space, Roofline(), classes=10, networks=4, held_out=3, work=work)
    assert [network.architecture.blocks for network in found.networks] == [a.blocks for a in drawn]
    assert not work.exists()


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
