"""int8 by a runtime's own converter, in a run and in export: blocks that lose stay in float.

A file is the module and what its converter was asked for (tests/latency/test_runtimes.py has the
converters themselves); latencies are a cost model over the blocks in int8, no clock is read.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import write_space, write_table
from torch import nn

from fbnas.commands import main
from fbnas.compression import converted
from fbnas.export import files, sidecar
from fbnas.latency import converting
from fbnas.latency.converting import in_float, layer_names
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.timing import Timing
from fbnas.space import load_network

FP32_MS = 10.0
SAVED_MS = {"head.0": -2.0}  # by int8; of others:
OTHERS_MS, CHANGE_MS = 1.0, 0.1


def fake_convert(
    _: str, module: nn.Module, shape: tuple[int, int, int], path: Path, **asked: Any
) -> None:
    left = list(asked.get("float_layers", ()))
    if asked["precision"] == "fp32":
        left = [True] * len(layer_names(module, shape))
    images = sum(map(len, asked["calibration"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": module, "shape": shape, "left": left, "images": images}, path)


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def scores(_: Device, path: Path, images: np.ndarray, **__: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = content(path)["module"].eval()(torch.from_numpy(images)).numpy()
    return found


def latency(path: Path) -> float:
    file = content(path)
    names = layer_names(file["module"], file["shape"])
    left = {
        ".".join(name.split(".")[:2]): stays
        for name, stays in zip(names, file["left"] or [False] * len(names), strict=True)
    }
    saved = sum(SAVED_MS.get(name, OTHERS_MS) for name, stays in left.items() if not stays)
    changes = sum(a != b for a, b in itertools.pairwise(left.values()))
    return FP32_MS - saved + CHANGE_MS * changes


def measured(_: Device, files: Sequence[Path], *__: Any, **___: Any) -> Measurement:
    times = [latency(path) for path in files]
    timings = tuple(Timing(ms, ms, ms, 10) for ms in times)
    return Measurement(timings, 0.01, np.array([times] * 2))


def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (converted, files, converting):
        monkeypatch.setattr(module, "convert", fake_convert)
    monkeypatch.setattr(Device, "measure_quietly", measured)
    monkeypatch.setattr(Device, "scores", scores)
    monkeypatch.setattr(files, "embed", lambda *_: None)


def run_arguments(folder: Path) -> list[str]:
    """Of a small run on PyTorch, whose int8 files are converted; but for its methods and `out`."""
    table = write_table(folder / "table.csv", **Device(runtime="pytorch").fingerprint())
    given = [f"space={write_space(folder)}", "data=digits", "data.limit=320", f"table={table}"]
    quick = ["target_ms=9", "search.epochs=2", "training.epochs=1", "networks=0", "candidates=1"]
    int8 = "compression.quantization.calibration_images=8"
    return ["run", *given, *quick, int8, "device.runtime=pytorch"]


def test_the_block_that_int8_makes_slower_is_left_in_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faked(monkeypatch)
    run = tmp_path / "r"
    begun = [*run_arguments(tmp_path), "compression.methods=[int8]", f"out={run}"]
    assert main(begun) in (0, 3)
    found = json.loads((run / "models" / "int8.layers.json").read_text())
    assert found["float_for_speed"] == ["head.0"]
    assert found["fastest"] == "mixed"
    kept = run / "models" / "int8.pt2"
    assert found["measured"]["mixed_ms"] == latency(kept)
    network, card = load_network(run / "train")
    expected = in_float(layer_names(network, card.input_shape), ["head.0"])
    assert content(kept)["left"] == expected
    assert content(kept)["images"] == 8
    assert json.loads(sidecar(kept).read_text())["precision"] == "int8"
    (stage,) = json.loads((run / "result.json").read_text())["stages"][1:]
    assert stage["accepted"]
    assert stage["reason"].endswith(f", 1 of {found['layers']} blocks in float")

    kept.unlink()  # as an export that is interrupted leaves it
    (run / "result.json").unlink()
    monkeypatch.setattr(converted, "convert", None)  # it is all known
    assert main([*begun, "resume=true"]) in (0, 3)
    assert content(kept)["left"] == expected

    capsys.readouterr()
    asked = [f"model={run}", "data=digits", "format=pt2", "precision=int8", "measure=false"]
    assert main(["export", *asked, f"out={tmp_path / 'exported'}"]) == 0
    assert "1 blocks of the int8 pt2 file compute in float" in capsys.readouterr().out
    assert content(tmp_path / "exported" / "model.pt2")["left"] == expected
    assert main(["export", *asked, "float_layers=false", f"out={tmp_path / 'whole'}"]) == 0
    assert content(tmp_path / "whole" / "model.pt2")["left"] == []


def test_export_knows_the_blocks_of_a_network_that_was_trained_for_int8_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file is fp32 but in ONNX, and int8 by the runtime's own converter after it."""
    faked(monkeypatch)
    run = tmp_path / "r"
    methods = ["compression.methods=[qat,int8]", "compression.fine_tuning.epochs=1"]
    methods += ["max_accuracy_drop=1"]
    assert main([*run_arguments(tmp_path), *methods, f"out={run}"]) in (0, 3)
    stages = json.loads((run / "result.json").read_text())["stages"]
    found = [(stage["name"], stage["precision"], stage["network"]) for stage in stages]
    assert found == [("fp32", "fp32", "train"), ("qat", "fp32", "qat"), ("int8", "int8", "qat")]
    assert (run / "qat" / "quantization.json").is_file()
    capsys.readouterr()
    asked = [f"model={run}", "data=digits", "format=pt2", "precision=int8", "measure=false"]
    assert main(["export", *asked, "agreement=0", f"out={tmp_path / 'exported'}"]) == 0
    assert "1 blocks of the int8 pt2 file compute in float" in capsys.readouterr().out
    kept = content(run / "models" / "int8.pt2")["left"]
    assert content(tmp_path / "exported" / "model.pt2")["left"] == kept
    assert sum(kept) == 1
