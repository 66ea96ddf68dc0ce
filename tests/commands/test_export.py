"""fbnas export: several files at once, what is left out or deleted, and what is said of it."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from tiny_run import write_space

from fbnas.commands import export, main
from fbnas.compression import calibration_images
from fbnas.export import FORMATS, read_metadata
from fbnas.export import onnx as writer
from fbnas.files import read_yaml, write_yaml
from fbnas.latency.fake_quantization import QuantizedForm, as_deployed
from fbnas.latency.runtimes import runtime
from fbnas.space import load_network
from fbnas.training.data import Data, load_data
from fbnas.training.evaluation import evaluate


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network that `fbnas train` trained on digits."""
    root = tmp_path_factory.mktemp("trained")
    space = write_space(root)
    (root / "a.yaml").write_text("space: tiny\nblocks: [k3_e3, k5_e1, k3_e3]\n")
    small = ["data=digits", "training.epochs=4", f"out={root / 'network'}"]
    assert main(["train", f"architecture={root / 'a.yaml'}", f"space={space}", *small]) == 0
    return root / "network"


@pytest.fixture(scope="module")
def rounded(trained: Path) -> Path:
    """The folder of that network, trained for int8."""
    out = trained.parent / "rounded"
    quick = ["method=qat", "compression.fine_tuning.epochs=1", "measure=false"]
    assert main(["compress", f"model={trained}", *quick, f"out={out}"]) == 0
    return out


def without_data(network: Path) -> Path:
    """A copy of a network's folder that does not say what it was trained on."""
    copied = network.parent / f"{network.name}_alone"
    if not copied.is_dir():
        shutil.copytree(network, copied)
        (copied / "config.yaml").unlink()
    return copied


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(source="digits", resolution=8)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As where runtimes and their converters are not installed."""
    absent = {package for name in names for package in runtime(name).CONVERTER}
    for name in names:
        monkeypatch.delenv(f"FBNAS_{name.upper()}_PYTHON", raising=False)
        monkeypatch.setattr(runtime(name), "available", lambda: False)
    for place in ("fbnas.latency.converting.lacking", "fbnas.commands.export.lacking"):
        monkeypatch.setattr(place, lambda given: [name for name in given if name in absent])


def test_several_files_are_judged_timed_and_told_of(
    trained: Path, tmp_path: Path, digits: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    several = ["format=onnx", "precision=[fp32,fp16,int8]", "rounds=4"]
    assert main(["export", f"model={trained}", *several, f"out={out}"]) == 0
    shown = capsys.readouterr().out
    result = read(out / "result.json")
    assert [file["precision"] for file in result["files"]] == ["fp32", "fp16", "int8"]
    network, card = load_network(trained)
    accuracy = evaluate(network, digits.test, mean=card.mean, std=card.std)[1]
    assert result["accuracy_top1_network"] == pytest.approx(accuracy)
    for file in result["files"]:
        path = out / file["file"]
        assert (file["format"], file["runtime"]) == ("onnx", "onnxruntime")
        assert path.name == f"model_{file['precision']}.onnx"
        assert file["bytes"] == path.stat().st_size
        assert file["accuracy_top1"] == pytest.approx(accuracy, abs=0.05)
        assert file["parity_argmax_agreement"] >= 0.9
        latency = file["latency_ms"]
        assert 0 < latency["low"] <= latency["value"] <= latency["high"]
        assert f"{path}: {file['bytes']:,} bytes, {file['precision']} for onnxruntime" in shown
        assert f"{file['accuracy_top1']:.4f}" in shown
    errors = [file["parity_max_error"] for file in result["files"]]
    assert errors == sorted(errors)
    assert result["files"][0]["accuracy_top1"] == pytest.approx(accuracy, abs=2.1 / 360)
    assert "of 256 validation images" in shown
    assert f"the network itself (torch): accuracy {accuracy:.4f}" in shown
    assert "model" not in result
    assert read_yaml(out / "config.yaml")["data"]["source"] == "digits"  # what it was trained on


def test_files_are_not_judged_where_that_is_not_wanted(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_judging = ["export", f"model={trained}", "judge=false", "measure=false"]
    assert main([*without_judging, f"out={tmp_path / 'one'}"]) == 0
    assert "images, which are noise" in capsys.readouterr().out
    assert main([*without_judging, "precision=int8", f"out={tmp_path / 'int8'}"]) == 0
    assert "of 256 validation images" in capsys.readouterr().out
    for name in ("one", "int8"):
        assert "accuracy_top1" not in read(tmp_path / name / "result.json")["files"][0]


def test_data_that_is_not_there_any_more_is_told_of(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    moved = tmp_path / "network"
    shutil.copytree(trained, moved)
    config = read_yaml(moved / "config.yaml")
    config["data"] |= {"source": "image_folder", "path": str(tmp_path / "gone")}
    write_yaml(moved / "config.yaml", config)
    assert main(["export", f"model={moved}", "measure=false", f"out={tmp_path / 'out'}"]) == 0
    assert "So no images are used." in caplog.text
    assert "images, which are noise" in capsys.readouterr().out
    only = ["precision=int8", f"out={tmp_path / 'int8'}"]
    assert main(["export", f"model={moved}", *only]) == 2
    assert str(tmp_path / "gone") in capsys.readouterr().err


def test_all_makes_what_can_be_made_and_says_what_it_left_out(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "litert", "executorch")
    out = tmp_path / "out"
    quick = ["format=all", "precision=[fp32,int8]", "measure=false"]
    assert main(["export", f"model={without_data(trained)}", *quick, f"out={out}"]) == 0
    shown = capsys.readouterr().out
    files = read(out / "result.json")["files"]
    assert [file["format"] for file in files] == [name for name in FORMATS for _ in range(2)]
    made = {file["file"] for file in files if "file" in file}
    wanted = {"model_fp32.onnx", "model_fp32.pt2"}
    assert made == wanted | ({"model_fp32.xml"} if runtime("openvino").available() else set())
    for file in files:
        if "file" not in file:
            line = f"left out: {file['format']}, {file['precision']}: {file['left_out']}"
            assert line in shown.splitlines()
    reasons = {(file["format"], file["precision"]): file.get("left_out") for file in files}
    assert "int8 takes its ranges from training images" in reasons["onnx", "int8"]
    assert "litert_torch" in reasons["tflite", "fp32"]
    assert "converter=PATH" in reasons["tflite", "fp32"]
    assert "device.converter" not in shown
    assert "images, which are noise" in shown
    assert sorted(path.name for path in out.glob("classify_*.py")) == sorted(
        f"classify_{name}.py" for name in {file["format"] for file in files if "file" in file}
    )


def test_one_that_is_named_and_cannot_be_made_is_wrong_input(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without(monkeypatch, "litert")
    export_it = ["export", f"model={trained}", "measure=false"]
    assert main([*export_it, "format=[onnx,tflite]", f"out={tmp_path / 'both'}"]) == 2
    assert "tflite, fp32: litert cannot be converted for here" in capsys.readouterr().err
    files = read(tmp_path / "both" / "result.json")["files"]
    assert files[0]["file"] == "model.onnx"
    assert "left_out" in files[1]
    assert main([*export_it, "format=tflite", f"out={tmp_path / 'one'}"]) == 2
    assert not (tmp_path / "one" / "result.json").exists()


@pytest.mark.parametrize("several", [False, True])
def test_a_file_that_disagrees_is_deleted_and_reported(
    several: bool,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def narrow(*arguments: Any, **options: Any) -> Sequence[np.ndarray]:
        return [array * 1e-3 for array in calibration_images(*arguments, **options)]

    monkeypatch.setattr(export, "calibration_images", narrow)
    out = tmp_path / "out"
    precisions = "[int8,fp32]" if several else "int8"
    more = [f"precision={precisions}", "data=digits", "measure=false", f"out={out}"]
    assert main(["export", f"model={trained}", *more]) == 1
    shown, errors = capsys.readouterr()
    assert errors == ""
    name = "model_int8.onnx" if several else "model.onnx"
    assert f"{name} was not kept: it gives torch's class for" in shown
    assert not (out / name).exists()
    assert (out / "model_fp32.onnx").exists() == several
    file = read(out / "result.json")["files"][0]
    assert file["left_out"].startswith("deleted: ")


def test_int8_of_a_network_that_was_trained_for_it_is_made_where_its_grids_fit(
    rounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["format=all", "precision=int8", "measure=false", f"out={out}"]
    assert main(["export", f"model={without_data(rounded)}", *more]) == 0
    shown = capsys.readouterr().out.splitlines()
    files = {file["format"]: file for file in read(out / "result.json")["files"]}
    assert files["onnx"]["bytes"] == (out / "model.onnx").stat().st_size
    operators = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    needs = "int8 has no place for the grids of qat and takes its ranges from training images"
    for name in ("tflite", "pte", "pt2"):
        assert files[name]["left_out"].startswith(needs)
        assert f"left out: {name}, int8: {files[name]['left_out']}" in shown
    assert len(files) == len(FORMATS)


@pytest.mark.parametrize("place", ["", "models"], ids=["compress", "run"])
def test_layers_that_were_left_in_float_stay_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """As `fbnas compress` and `run` record them."""
    folder = tmp_path / "network"
    shutil.copytree(trained, folder)
    left = ["/stem/stem.0/Conv", "/classifier/linear/Gemm"]
    record = {"float_for_accuracy": left[:1], "float_for_speed": left[1:], "pays": True}
    (folder / place).mkdir(exist_ok=True)
    (folder / place / "int8.layers.json").write_text(json.dumps(record))
    given = [f"model={folder}", "data=digits", "precision=int8", "measure=false"]
    assert main(["export", *given, f"out={tmp_path / 'mixed'}"]) == 0
    assert "2 layers of the int8 onnx file compute in float" in capsys.readouterr().out
    assert main(["export", *given, "float_layers=false", f"out={tmp_path / 'all'}"]) == 0
    assert "in float" not in capsys.readouterr().out
    assert in_float(tmp_path / "all" / "model.onnx") == set()
    assert in_float(tmp_path / "mixed" / "model.onnx") == set(left)
    record = {"float_for_accuracy": [], "float_for_speed": [], "pays": False}
    (folder / place / "int8.layers.json").write_text(json.dumps(record))
    assert main(["export", *given, f"out={tmp_path / 'slow'}"]) == 0
    assert "int8 is slower than fp32 on the device" in capsys.readouterr().out
    assert in_float(tmp_path / "slow" / "model.onnx") == set()


def in_float(path: Path) -> set[str]:
    """The names of the layers whose weights are not dequantized."""
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    return {x.name for x in layers if makers.get(x.input[1]) != "DequantizeLinear"}


def test_an_ir_has_the_grids_that_were_trained(rounded: Path, tmp_path: Path, digits: Data) -> None:
    if not runtime("openvino").available():
        pytest.skip("openvino is not installed here")
    import openvino

    out = tmp_path / "out"
    more = ["format=[onnx,openvino]", "precision=int8", "data=digits", "rounds=2"]
    assert main(["export", f"model={rounded}", *more, f"out={out}"]) == 0
    network, card = load_network(rounded)
    form = QuantizedForm.load(rounded / "quantization.json")
    deployed = as_deployed(network, form)
    accuracy = evaluate(deployed, digits.test, mean=card.mean, std=card.std)[1]
    for file in read(out / "result.json")["files"]:
        assert file["parity_argmax_agreement"] > 0.95
        assert file["accuracy_top1"] == pytest.approx(accuracy, abs=2.1 / 360)
        assert file["latency_ms"]["value"] > 0
        assert read_metadata(out / file["file"])["class_names"] == list(card.class_names)
    sizes = [path.stat().st_size for path in (out / "model.xml", out / "model.bin")]
    assert file["bytes"] == sum(sizes)
    assert sizes[1] < (rounded / "weights.safetensors").stat().st_size / 2  # bytes, no floats
    model = openvino.Core().read_model(out / "model.xml")
    assert "FakeQuantize" in {node.get_type_name() for node in model.get_ops()}


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_file_that_disagrees_with_what_was_trained_is_deleted(
    name: str,
    rounded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not runtime(FORMATS[name].runtime).available():
        pytest.skip(f"{name} is not installed here")
    real = writer.trace_onnx

    def of_another(network: Any, *arguments: Any, **options: Any) -> onnx.ModelProto:
        other = copy.deepcopy(network)
        other.classifier.linear.weight.data.neg_()  # which stays on its grid
        return real(other, *arguments, **options)

    monkeypatch.setattr(writer, "trace_onnx", of_another)
    out = tmp_path / "out"
    more = [f"format={name}", "precision=int8", "measure=false", f"out={out}"]
    assert main(["export", f"model={without_data(rounded)}", *more]) == 1
    shown = capsys.readouterr().out
    suffix = FORMATS[name].suffix
    assert f"model{suffix} was not kept: it gives torch's class for" in shown
    assert "The images are noise: data=... shows it real ones." in shown
    assert not list(out.glob("model*"))
    assert read(out / "result.json")["files"][0]["left_out"].startswith("deleted: ")


@pytest.mark.parametrize("opset", [13, 20])
def test_the_opset_holds_for_what_was_trained_for_int8_too(
    opset: int, rounded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    more = ["precision=int8", f"opset={opset}", "measure=false", f"out={out}"]
    assert main(["export", f"model={rounded}", *more]) == 0
    stated = {entry.domain: entry.version for entry in onnx.load(out / "model.onnx").opset_import}
    assert stated[""] == opset


def test_int8_without_a_place_for_trained_grids_asks_for_images(
    rounded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    only = ["format=pt2", "precision=int8", "measure=false", f"out={out}"]
    assert main(["export", f"model={without_data(rounded)}", *only]) == 2
    assert "expected data=... as the network was trained on" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", FORMATS)
def test_files_and_their_example_agree_with_the_network(
    name: str, trained: Path, tmp_path: Path, digits: Data
) -> None:
    file, python = runtime(FORMATS[name].runtime), sys.executable
    if not file.available():
        elsewhere = os.environ.get(f"FBNAS_{FORMATS[name].runtime.upper()}_PYTHON")
        if elsewhere is None:
            pytest.skip(f"{file.NAME} is not installed here ({file.INSTALL})")
        python = elsewhere
    out = tmp_path / "out"
    more = [f"format={name}", "data=digits", "measure=false", f"out={out}"]
    assert main(["export", f"model={trained}", *more]) == 0
    result = read(out / "result.json")
    assert result["parity_max_error"] < 1e-3
    assert result["parity_argmax_agreement"] == 1
    network, card = load_network(trained)
    accuracy = evaluate(network, digits.test, mean=card.mean, std=card.std)[1]
    assert result["accuracy_top1"] == pytest.approx(accuracy, abs=2.1 / 360)
    assert result["model"] == f"model{FORMATS[name].suffix}"
    pixels = digits.test.batch(torch.tensor([3]))
    Image.fromarray(pixels[0, 0].numpy()).save(out / "digit.png")
    with torch.no_grad():
        scores = network.eval()((pixels.float() / 255 - card.mean[0]) / card.std[0])
    done = subprocess.run(
        [python, f"classify_{name}.py", "digit.png"],
        cwd=out,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    probability, name = done.stdout.split()
    assert name == card.class_names[int(scores.argmax())]
    assert float(probability) == pytest.approx(float(scores.softmax(1).max()), abs=1e-3)


def test_an_ir_is_evaluated_by_openvino_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not runtime("openvino").available():
        pytest.skip("openvino is not installed here")
    out = tmp_path / "out"
    more = ["precision=fp16", "data=digits", "rounds=2", f"out={out}"]
    assert main(["export", f"model={trained}", "format=openvino", *more]) == 0
    made = read(out / "result.json")
    both = [out / "model.xml", out / "model.bin"]
    assert made["model_bytes"] == sum(path.stat().st_size for path in both)
    assert made["latency_ms"]["value"] > 0
    evaluate_it = ["evaluate", f"model={both[0]}", "data=digits", "rounds=4"]
    openvino = ["device.runtime=openvino", f"out={tmp_path / 'e'}"]
    assert main([*evaluate_it, *openvino]) == 0
    found = read(tmp_path / "e" / "result.json")
    assert found["accuracy_top1"] == made["accuracy_top1"]
    assert found["model_bytes"] == made["model_bytes"]
    assert found["architecture"] == made["architecture"]
    assert main(evaluate_it) == 2
    assert "expected device.runtime=openvino" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["format=onx"], "Did you mean 'onnx'"),
        (["format=[all,onnx]"], "expected one, a list of them, or all"),
        (["format=pte", "precision=fp16"], "pte is written in fp32 and int8"),
        (["format=all", "precision=fp8"], "Unknown precision 'fp8'"),
        (["opset=25"], "opset=25; expected 13 to 20"),
        (["agreement=2"], "agreement=2; expected a fraction"),
        (["threads=0"], "threads=0; expected a whole number from 1"),
        (["precision=int8"], "expected data=..."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused_before_anything_is_written(
    options: list[str],
    words: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = f"model={without_data(trained)}"
    assert main(["export", model, *options, f"out={tmp_path / 'out'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
