"""Files of every runtime: torch's classes, all that it takes to use them, no wrong file is kept."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_onnx import ARCHITECTURE, CARD, network, pictures
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.export import (
    accuracy_of_file,
    check_suffix,
    export_file,
    files,
    read_metadata,
    runtime_of_format,
    sidecar,
)
from fbnas.latency.converting import lacking, needed
from fbnas.latency.devices import Device
from fbnas.latency.runtimes import RUNTIMES, runtime
from fbnas.training.data import batches

PAIRS = [(name, precision) for name in RUNTIMES for precision in runtime(name).PRECISIONS]


def device_of(name: str, precision: str = "fp32") -> Device:
    """The runtime here, or in the interpreter that FBNAS_LITERT_PYTHON, ... names."""
    module = runtime(name)
    python = os.environ.get(f"FBNAS_{name.upper()}_PYTHON")
    absent = [] if module.available() else [name]
    absent += lacking(needed(module, precision))
    if absent and python is None:
        pytest.skip(f"{', '.join(absent)} not installed here, FBNAS_{name.upper()}_PYTHON not set")
    provider = "compiled" if (name, precision) == ("pytorch", "int8") else ""
    return Device(
        runtime=name,
        precision=precision,
        provider=provider,
        python=python if absent else None,
        threads=2,
    )


def shown() -> list[np.ndarray]:
    found = batches(pictures(), 25, mean=CARD.mean, std=CARD.std)
    return [inputs.numpy() for inputs, _ in found]


@pytest.mark.parametrize(("name", "precision"), PAIRS)
def test_a_file_of_every_runtime_answers_as_torch(
    name: str, precision: str, tmp_path: Path
) -> None:
    device = device_of(name, precision)
    path = tmp_path / f"x{device.suffix}"
    alike = torch.from_numpy(shown()[0])  # as the ranges are taken from
    report = export_file(network(), path, device, card=CARD, images=alike, calibration=shown())
    assert report.bytes == path.stat().st_size
    assert report.max_error is not None
    assert report.argmax_agreement is not None
    if precision == "fp32":
        assert report.max_error < 1e-4
        assert report.argmax_agreement == 1
    else:
        assert 0 < report.max_error < 0.3  # 0: nothing was quantized
        assert report.argmax_agreement >= 0.8
    stated = read_metadata(path)
    assert stated["architecture"] == list(ARCHITECTURE.blocks)
    assert stated["class_names"] == ["ant", "bee", "wäsp"]
    assert stated["preprocessing"]["resolution"] == 12
    in_file = device.suffix == ".onnx"
    assert sidecar(path).is_file() is not in_file
    if not in_file:
        assert (stated["runtime"], stated["precision"], stated["batch"]) == (name, precision, 1)


@pytest.mark.parametrize("name", [name for name in RUNTIMES if name != "onnxruntime"])
def test_accuracy_is_what_the_runtime_computes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_of(name)
    path = tmp_path / f"x{device.suffix}"
    export_file(network(), path, device, card=CARD)
    with torch.no_grad():
        correct = sum(
            int((network()(inputs).argmax(1) == labels).sum())
            for inputs, labels in batches(pictures(), 50, mean=CARD.mean, std=CARD.std)
        )
    monkeypatch.setattr("fbnas.export.accuracy.PIECE_BYTES", 40 * 3 * 12 * 12 * 4)  # two pieces
    calls: list[int] = []
    scores = Device.scores

    def counted(self: Device, path: Path, given: np.ndarray, **options: int) -> np.ndarray:
        calls.append(len(given))
        return scores(self, path, given, **options)

    monkeypatch.setattr(Device, "scores", counted)
    found = accuracy_of_file(
        path, pictures(), mean=CARD.mean, std=CARD.std, batch_size=16, device=device
    )
    assert found == correct / 50
    assert calls == [48, 2]


class Doubled(nn.Module):
    """Traced in another mode of the process than it is compared in, it answers otherwise."""

    factor = 1.0

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.factor


def test_a_file_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, module, path = device_of("pytorch"), Doubled(), tmp_path / "x.pt2"
    real = files.convert

    def convert(*arguments: object, **options: object) -> None:
        real(*arguments, **options)  # type: ignore[arg-type]
        module.factor = 2.0

    monkeypatch.setattr(files, "convert", convert)
    with pytest.raises(RuntimeError, match=r"x\.pt2 was not kept: its scores differ from torch's"):
        export_file(module, path, device, card=CARD)
    assert list(tmp_path.iterdir()) == []


def test_int8_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes its ranges from images"):
        export_file(network(), tmp_path / "x.onnx", Device(precision="int8"), card=CARD)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_runtime_is_refused(tmp_path: Path) -> None:
    check_suffix(tmp_path / "x.onnx", Device(runtime="openvino"))
    words = r"is for pytorch, the device runs onnxruntime \(\.onnx\); .*device\.runtime=pytorch"
    with pytest.raises(InputError, match=words):
        check_suffix(tmp_path / "x.pt2", Device())
    with pytest.raises(InputError, match="is for onnxruntime or openvino, the device runs pytorch"):
        check_suffix(tmp_path / "x.onnx", Device(runtime="pytorch"))
    with pytest.raises(InputError, match=r"no runtime is known for \.h5; expected \.onnx, \.pt2"):
        check_suffix(tmp_path / "x.h5", Device())


@pytest.mark.parametrize(
    ("given", "found"),
    [("onnx", "onnxruntime"), (".tflite", "litert"), ("pte", "executorch"), ("openvino",) * 2],
)
def test_a_format_is_a_suffix_or_a_runtime(given: str, found: str) -> None:
    assert runtime_of_format(given) == found


def test_metadata_beside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    with pytest.raises(InputError, match=r"x\.pt2: no such file"):
        read_metadata(path)
    path.write_bytes(b"a program")
    assert read_metadata(path) == {}
    sidecar(path).write_text(json.dumps({"space": "here"}))
    assert read_metadata(path) == {"space": "here"}
    sidecar(path).write_text("{")
    with pytest.raises(InputError, match=r"x\.pt2\.json"):
        read_metadata(path)
