"""fbnas compress method=int8 for a runtime that reads no ONNX file says what it does not do."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_space

from fbnas.commands import main
from fbnas.latency.devices import Device


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    (root / "a.yaml").write_text("space: tiny\nblocks: [k3_e3, k5_e1, k3_e3]\n")
    given = [f"architecture={root / 'a.yaml'}", f"space={write_space(root)}"]
    quick = ["data.limit=320", "training.epochs=1", f"out={root / 'network'}"]
    assert main(["train", *given, *quick]) == 0
    return root / "network"


@pytest.mark.parametrize("runtime", ["litert", "executorch", "pytorch", "onnxruntime"])
def test_a_runtime_that_reads_no_onnx_file_is_pointed_to_export(
    runtime: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(Device, "measure_quietly", measure)
    options = ["method=int8", "data.limit=320", "compression.quantization.calibration_images=32"]
    if runtime == "onnxruntime":
        options.append("measure=false")  # it would be measured
    out = tmp_path / "int8"
    device = f"device.runtime={runtime}"
    assert main(["compress", f"model={trained}", device, *options, f"out={out}"]) == 0
    assert (out / "model.onnx").is_file()
    said = [line for line in capsys.readouterr().out.splitlines() if "reads none" in line]
    expected = (
        f"{out / 'model.onnx'} is an int8 ONNX file; {runtime} reads none, so it was not measured: "
        f"fbnas export format={runtime} precision=int8 makes that runtime's own file"
    )
    assert said == ([] if runtime == "onnxruntime" else [expected])


def test_a_wrong_device_is_refused_before_anything_is_done(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"model={trained}", "method=int8", "measure=false", f"out={tmp_path / 'x'}"]
    assert main(["compress", *arguments, "device.runtime=litrt"]) == 2
    assert "Did you mean 'litert'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
