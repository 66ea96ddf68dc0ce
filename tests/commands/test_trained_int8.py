"""A network that was trained for int8: its layers that lose on the device stay in float.

Latencies are a cost model over the layers of a file in int8, no clock is read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_run import write_space, write_table

from fbnas.commands import main
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.timing import Timing

STEM = "/stem/stem.0/Conv"
QUICK = ["data=digits", "data.limit=320", "compression.quantization.calibration_images=32"]
QAT = ["compression.fine_tuning.epochs=1", "compression.qat.calibration_images=32"]


def in_float(path: Path) -> list[str]:
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    return [x.name for x in layers if makers.get(x.input[1]) != "DequantizeLinear"]


@dataclass(frozen=True)
class Costs:
    """What a layer takes in int8, in ms, where it takes 1 in float; and what comes of it."""

    stem_ms: float
    others_ms: float
    fastest: str

    @property
    def left(self) -> list[str]:
        return [STEM] if self.fastest == "mixed" else []

    def latency(self, path: Path) -> float:
        graph = onnx.load(path).graph
        layers = [node.name for node in graph.node if node.op_type in ("Conv", "Gemm")]
        left, int8_ms = in_float(path), {STEM: self.stem_ms}
        return sum(1.0 if x in left else int8_ms.get(x, self.others_ms) for x in layers)

    def measured(self, files: Sequence[Path]) -> Measurement:
        times = [self.latency(path) for path in files]
        timings = tuple(Timing(ms, ms, ms, 10) for ms in times)
        return Measurement(timings, 0.01, np.array([times] * 2))


FOUND = [Costs(0.5, 0.5, "int8"), Costs(3.0, 0.5, "mixed"), Costs(3.0, 3.0, "fp32")]


@pytest.fixture(params=FOUND, ids=[costs.fastest for costs in FOUND])
def costs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Costs:
    found: Costs = request.param

    def measured(_: Device, files: Sequence[Path], *__: Any, **___: Any) -> Measurement:
        return found.measured(files)

    monkeypatch.setattr(Device, "measure_quietly", measured)
    return found


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("network")
    (root / "a.yaml").write_text("space: tiny\nblocks: [k3_e3, k5_e1, k3_e3]\n")
    given = [f"architecture={root / 'a.yaml'}", f"space={write_space(root)}", *QUICK[:2]]
    assert main(["train", *given, "training.epochs=1", f"out={root / 'network'}"]) == 0
    return root / "network"


def test_compress_and_export_leave_the_layer_in_float(
    network: Path, tmp_path: Path, costs: Costs, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q"
    assert main(["compress", f"model={network}", "method=qat", *QUICK, *QAT, f"out={out}"]) == 0
    said, file = capsys.readouterr().out, out / "model.onnx"
    told = "1 of 12 layers left in float because int8 makes them slower: stem.0"
    assert (told in said) == (costs.fastest == "mixed")
    result = json.loads((out / "result.json").read_text())
    assert result["int8"]["float_for_speed"] == costs.left
    assert (result["int8"]["fastest"], result["int8"]["layers"]) == (costs.fastest, 12)
    last = result["steps"][-1]
    assert (last["method"], last["before"]["latency_ms"]) == ("int8", 12.0)
    assert last["after"]["latency_ms"] == costs.latency(file)
    if costs.fastest == "fp32":
        assert "int8 does not pay on this device: model.onnx is the float file" in said
        assert len(in_float(file)) == 12
        return
    assert in_float(file) == costs.left

    given = [f"model={out}", *QUICK[:2], "precision=int8", "measure=false", "agreement=0"]
    assert main(["export", *given, f"out={tmp_path / 'exported'}"]) == 0
    told = "1 layers of the int8 onnx file compute in float"
    assert (told in capsys.readouterr().out) == bool(costs.left)
    assert in_float(tmp_path / "exported" / "model.onnx") == costs.left
    assert main(["export", *given, "float_layers=false", f"out={tmp_path / 'whole'}"]) == 0
    assert in_float(tmp_path / "whole" / "model.onnx") == []


@pytest.mark.parametrize("costs", FOUND[1:], ids=["mixed", "fp32"], indirect=True)
def test_a_run_leaves_it_in_float_and_resumes(
    tmp_path: Path, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "table.csv", **Device().fingerprint())
    given = [f"space={write_space(tmp_path)}", *QUICK, *QAT, f"table={table}", "target_ms=9"]
    small = ["search.epochs=2", "training.epochs=1", "networks=0", "candidates=1"]
    stages = ["compression.methods=[qat,int8]", "max_accuracy_drop=1"]
    run = tmp_path / "r"
    assert main(["run", *given, *small, *stages, f"out={run}"]) in (0, 3)
    kept = run / "models" / "qat.onnx"
    assert in_float(kept) == costs.left
    stage = json.loads((run / "result.json").read_text())["stages"][1]
    assert (stage["name"], stage["precision"]) == ("qat", "int8")
    assert stage["accepted"] == (costs.fastest != "fp32")
    assert (", 1 of " in stage["reason"]) == bool(costs.left)
    if not stage["accepted"]:
        assert stage["reason"].startswith("rejected: slower")
        return

    before = kept.read_bytes()
    (run / "result.json").unlink()
    asked: list[str] = []

    def told(_: Device, files: Sequence[Path], words: str, **options: Any) -> Measurement:
        asked.append(words)
        return Measurement(tuple(Timing(1.0, 1.0, 1.0, 9) for _ in files), 0.01, np.ones((2, 1)))

    monkeypatch.setattr(Device, "measure_quietly", told)
    assert main(["run", *given, *small, *stages, f"out={run}", "resume=true"]) in (0, 3)
    assert asked == ["Timing all stages"]  # what was found of its layers is known
    assert kept.read_bytes() == before
    given = [f"model={run}", *QUICK[:2], "precision=int8", "measure=false", "agreement=0"]
    assert main(["export", *given, f"out={tmp_path / 'exported'}"]) == 0
    assert in_float(tmp_path / "exported" / "model.onnx") == costs.left
