"""An interrupted command that was at an int8 file measures its layers once."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import write_space

from fbnas.commands import compress, main
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.timing import Timing


def test_layers_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("space: tiny\nblocks: [k3_e3, k5_e1, k3_e3]\n")
    given = [f"architecture={tmp_path / 'a.yaml'}", f"space={write_space(tmp_path)}"]
    network = ["data.limit=320", "training.epochs=1", f"out={tmp_path / 'network'}"]
    assert main(["train", *given, *network]) == 0
    measured: list[int] = []

    def measure(self: Device, files: Sequence[Path], _: str, **options: Any) -> Measurement:
        """fp32, int8, and files in between: no clock is read."""
        measured.append(len(files))
        timings = tuple(Timing(ms, ms, ms, 9) for ms in (3.0, 2.0, *[2.5] * (len(files) - 2)))
        return Measurement(timings, 0.01, np.zeros((2, len(files))))

    monkeypatch.setattr(Device, "measure_quietly", measure)
    arguments = ["compress", f"model={tmp_path / 'network'}", "method=int8", "data.limit=320"]
    quick = ["compression.quantization.calibration_images=32"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*arguments, *quick, f"out={whole}"]) == 0
    once = list(measured)
    assert len(once) > 1
    rows = list(csv.DictReader((whole / "int8_saves.csv").open()))
    costs = [1e3 * float(row["saved_ms"]) for row in rows]
    assert sum(costs) == pytest.approx(1000)  # what int8 saves of the whole, whatever of each
    assert {row["left_in_float"] for row in rows} == {"false"}
    page = (whole / "int8_saves.html").read_text()
    assert page.count('<rect class="bar"') == len(rows)
    assert "fp32 3 ms, int8 2 ms (noise 1.0 %): int8" in page

    (step,) = json.loads((whole / "result.json").read_text())["steps"]
    assert (step["before"]["latency_ms"], step["after"]["latency_ms"]) == (3.0, 2.0)
    assert step["after"]["dense_bytes"] == (whole / "model.onnx").stat().st_size

    judge = compress.judge_file

    def interrupted(path: Path, *arguments: Any, **options: Any) -> float:
        if path.name == "model.onnx":  # the int8 file is there, the command is not at its end
            raise KeyboardInterrupt
        return judge(path, *arguments, **options)

    monkeypatch.setattr(compress, "judge_file", interrupted)
    assert main([*arguments, *quick, f"out={broken}"]) == 130
    assert measured == once * 2
    assert not (broken / "result.json").exists()
    capsys.readouterr()
    monkeypatch.setattr(compress, "judge_file", judge)
    assert main([*arguments, *quick, f"out={broken}", "resume=true"]) == 0
    assert measured == once * 2  # nothing more
    assert (broken / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    found, expected = (json.loads((x / "result.json").read_text()) for x in (broken, whole))
    assert found["int8"] == expected["int8"]
    assert found["int8"]["fastest"] == "int8"
    assert found["accuracy_top1"] == expected["accuracy_top1"]
