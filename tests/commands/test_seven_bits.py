"""int8 weights have 7 bits where the device cuts sums of 8 bits off."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_run import write_space

from fbnas.commands import compress, main
from fbnas.export import files

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
    for module in (compress, files):
        monkeypatch.setattr(module, "saturates", lambda _: cut_off)
    given = [f"model={network}", *DATA, "measure=false"]
    highest = 64 if cut_off else 127
    assert main(["compress", *given, "method=int8", f"out={tmp_path / 'int8'}"]) == 0
    said = capsys.readouterr().out
    assert ("int8 weights have 7 bits: sums of 8 bits are cut off at 16 bits" in said) == cut_off
    assert largest_weight(tmp_path / "int8" / "model.onnx") == highest
    asked = f"compression.quantization.reduce_range={str(not cut_off).lower()}"
    assert main(["compress", *given, "method=int8", asked, f"out={tmp_path / 'asked'}"]) == 0
    assert largest_weight(tmp_path / "asked" / "model.onnx") == 127 + 64 - highest

    quick = ["method=qat", "compression.fine_tuning.epochs=1"]
    assert main(["compress", *given, *quick, f"out={tmp_path / 'qat'}"]) == 0
    result = json.loads((tmp_path / "qat" / "result.json").read_text())
    assert result["weight_bits"] == (7 if cut_off else 8)
    assert largest_weight(tmp_path / "qat" / "model.onnx") == (63 if cut_off else 127)

    export = ["precision=int8", "agreement=0", f"out={tmp_path / 'exported'}"]
    assert main(["export", *given, *export]) == 0
    assert largest_weight(tmp_path / "exported" / "model.onnx") == highest
