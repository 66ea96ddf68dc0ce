"""int8 weights have 7 bits where the device cuts sums of 8 bits off."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_run import write_space

from fbnas.commands import compress, export, main
from fbnas.commands.int8 import RECORD
from fbnas.export import accuracy, files, scores_of_file
from fbnas.latency import saturation
from fbnas.latency.devices import Device
from fbnas.latency.session import open_session
from fbnas.training.images import TensorImages

DATA = ["data=digits", "data.limit=320"]


def largest_weight(path: Path) -> int:
    tensors = [onnx.numpy_helper.to_array(x) for x in onnx.load(path).graph.initializer]
    return max(int(abs(x.astype(int)).max()) for x in tensors if x.dtype == np.int8 and x.ndim > 1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("network")
    (root / "a.yaml").write_text("space: tiny\nblocks: [k3_e3, k5_e1, k3_e3]\n")
    given = [f"architecture={root / 'a.yaml'}", f"space={write_space(root)}", *DATA]
    assert main(["train", *given, "training.epochs=1", f"out={root / 'network'}"]) == 0
    return root / "network"


@pytest.mark.parametrize("cut_off", [False, True])
def test_weights_have_the_bits_that_the_device_bears(
    cut_off: bool,
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (compress, export, files):
        monkeypatch.setattr(module, "saturates", lambda _: cut_off)
    given = [f"model={network}", *DATA, "measure=false"]
    highest = 64 if cut_off else 127
    assert main(["compress", *given, "method=int8", f"out={tmp_path / 'int8'}"]) == 0
    told = "int8 weights have 7 bits: this device cuts sums of 8 bits off at 16 bits"
    assert (told in capsys.readouterr().out) == cut_off
    assert largest_weight(tmp_path / "int8" / "model.onnx") == highest
    asked = f"compression.quantization.reduce_range={str(not cut_off).lower()}"
    assert main(["compress", *given, "method=int8", asked, f"out={tmp_path / 'asked'}"]) == 0
    assert largest_weight(tmp_path / "asked" / "model.onnx") == 127 + 64 - highest
    assert told not in capsys.readouterr().out  # that was not left to the device

    quick = ["method=qat", "compression.fine_tuning.epochs=1"]
    assert main(["compress", *given, *quick, f"out={tmp_path / 'qat'}"]) == 0
    result = json.loads((tmp_path / "qat" / "result.json").read_text())
    assert result["weight_bits"] == (7 if cut_off else 8)
    assert largest_weight(tmp_path / "qat" / "model.onnx") == (63 if cut_off else 127)

    int8 = ["export", *DATA, "measure=false", "precision=int8", "agreement=0"]
    out, file = f"out={tmp_path / 'exported'}", tmp_path / "exported" / "model.onnx"
    assert main([*int8, f"model={network}", out]) == 0
    assert largest_weight(file) == highest
    asked = f"reduce_range={str(not cut_off).lower()}"
    assert main([*int8, f"model={network}", out, asked, "overwrite=true"]) == 0
    assert largest_weight(file) == 127 + 64 - highest


def test_export_has_the_bits_of_the_device_that_a_network_was_compressed_for(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the machine that exports."""
    folder, asked = tmp_path / "network", "compression.quantization.reduce_range=true"
    shutil.copytree(network, folder)
    given = [f"model={network}", *DATA, "measure=false", "method=int8", asked]
    assert main(["compress", *given, f"out={tmp_path / 'int8'}"]) == 0
    shutil.copy(tmp_path / "int8" / RECORD, folder)
    for module in (export, files):
        monkeypatch.setattr(module, "saturates", lambda _: False)
    given = [f"model={folder}", *DATA, "measure=false", "precision=int8", "agreement=0"]
    assert main(["export", *given, f"out={tmp_path / 'exported'}"]) == 0
    assert largest_weight(tmp_path / "exported" / "model.onnx") == 64


def test_more_bits_than_the_device_bears_are_told(
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compress, "saturates", lambda _: True)
    given = [f"model={network}", *DATA, "measure=false", "compression.fine_tuning.epochs=1"]
    words = "was trained for int8 weights of 8 bits, whose sums local cuts off at 16 bits"
    for bits in (8, 7):
        out, asked = tmp_path / str(bits), f"compression.qat.weight_bits={bits}"
        assert main(["compress", *given, "method=qat", asked, f"out={out}"]) == 0
        assert (words in capsys.readouterr().out) == (bits == 8)
        again = [f"model={out}", *DATA, "measure=false", "precision=int8", "agreement=0"]
        assert main(["export", *again, f"out={out}_exported"]) == 0
        assert (words in capsys.readouterr().out) == (bits == 8)


@pytest.mark.parametrize("there", [False, True], ids=["whole there", "cut off there too"])
def test_what_this_machine_alone_cuts_off_is_not_judged(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a board or a planned device; its int8 is imitated in float."""
    path = tmp_path / "x.onnx"
    path.write_bytes(saturation._largest_sums())
    monkeypatch.setattr(accuracy, "saturates", lambda device: not device.host or there)
    asked: list[bool] = []

    def session(*_: Any, whole_sums: bool, **options: Any) -> Any:
        asked.append(whole_sums)
        return open_session(path, whole_sums=whole_sums)

    monkeypatch.setattr(accuracy, "open_session", session)
    monkeypatch.setattr(Device, "scores", lambda *_, **__: np.full((4, 32), 16, np.float32))
    images = TensorImages(torch.full((4, 32, 8, 8), 255, dtype=torch.uint8), torch.zeros(4).long())
    statistics = {"mean": [0.0] * 32, "std": [1.0] * 32}
    found = scores_of_file(path, images, device=Device(host="board"), **statistics)
    assert asked == ([] if there else [True])
    assert found.unique().tolist() == pytest.approx([16.0 if there else 32.0], rel=1e-4)
    scores_of_file(path, images, device=Device(), **statistics)
    assert asked[-1:] == [False]  # as it is here
