"""Every format: parity at its precisions, what it holds, what is deleted, the example beside it."""

import ast
import functools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from test_onnx import ARCHITECTURE, CARD, SPACE, images, network, pictures
from torch import nn

from fbnas.errors import InputError
from fbnas.export import (
    FORMATS,
    ParityError,
    check_precision,
    check_suffix,
    export_file,
    export_onnx,
    files,
    format_of,
    read_metadata,
    sidecar,
    write_example,
)
from fbnas.latency import model_files
from fbnas.latency.converting import lacking, needed
from fbnas.latency.devices import Device
from fbnas.latency.runtimes import runtime
from fbnas.space import NetworkCard, SearchSpace, build_network
from fbnas.training.data import batches
from fbnas.training.images import FileImages

GREY_SPACE = SearchSpace(
    name="grey",
    resolution=12,
    stem=SPACE.stem,
    stages=SPACE.stages,
    head=SPACE.head,
    input_channels=1,
)
GREY = NetworkCard(GREY_SPACE, ARCHITECTURE, ("ant", "bee", "wäsp"), (0.4,), (0.3,))


def grey_network() -> nn.Module:
    torch.manual_seed(1)
    built = build_network(GREY_SPACE, ARCHITECTURE, classes=3)
    built(torch.randn(32, 1, 12, 12))
    nn.init.normal_(built.classifier.linear.weight)
    return built.eval()


def python_of(name: str, precision: str = "fp32") -> str:
    """The interpreter that has a runtime and its converter; skips where there is none."""
    absent = lacking(needed(runtime(name), "fp32" if precision == "fp16" else precision))
    absent += [] if runtime(name).available() else [name]
    python = os.environ.get(f"FBNAS_{name.upper()}_PYTHON")
    if absent and python is None:
        pytest.skip(f"{', '.join(absent)} not installed here, FBNAS_{name.upper()}_PYTHON not set")
    return str(python) if absent else sys.executable


def device_of(format_name: str, precision: str = "fp32") -> Device:
    name = FORMATS[format_name].runtime
    python = python_of(name, precision)
    return Device(
        runtime=name,
        precision="int8" if precision == "int8" else "fp32",
        provider="compiled" if (name, precision) == ("pytorch", "int8") else "",
        python=None if python == sys.executable else python,
    )


def shown() -> list[np.ndarray]:
    found = batches(pictures(), 25, mean=CARD.mean, std=CARD.std)
    return [inputs.numpy() for inputs, _ in found]


def write(folder: Path, format_name: str, precision: str = "fp32", **options: object) -> Path:
    path = folder / f"x_{precision}{FORMATS[format_name].suffix}"
    given = {"images": torch.from_numpy(shown()[0]), "calibration": shown(), **options}
    device = device_of(format_name, precision)
    export_file(network(), path, device, card=CARD, precision=precision, **given)  # type: ignore[arg-type]
    return path


@functools.cache
def written(format_name: str, precision: str) -> dict[str, bytes]:
    """The files that `write` writes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), format_name, precision)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def copy(folder: Path, format_name: str, precision: str = "fp32") -> Path:
    """As `write`, of which it is a copy."""
    for name, content in written(format_name, precision).items():
        (folder / name).write_bytes(content)
    return folder / f"x_{precision}{FORMATS[format_name].suffix}"


def classified(example: Path, image: Path, python: str) -> tuple[str, float]:
    """What the example prints, run as a user does, where nothing of fbnas can be imported."""
    done = subprocess.run(
        [python, example.name, str(image)],
        cwd=example.parent,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "PYTHONPATH": "", "PYTHONUTF8": "1", "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stderr
    probability, name = done.stdout.splitlines()[-1].split()
    return name, float(probability)


def expected(image: Path, model: nn.Module, card: NetworkCard) -> tuple[str, float]:
    """What torch says of the image as fbnas itself loads it."""
    channels, resolution, _ = card.input_shape
    loaded = FileImages(
        lambda i: Image.open(image),
        lambda i: str(image),
        torch.tensor([0]),
        channels=channels,
        resolution=resolution,
        resize=True,
    )
    inputs, _ = next(batches(loaded.decoded("Reading"), 1, mean=card.mean, std=card.std))
    with torch.no_grad():
        probabilities = model(inputs)[0].softmax(0)
    return card.class_names[int(probabilities.argmax())], float(probabilities.max())


def photo(path: Path, size: tuple[int, int], mode: str, seed: int = 0) -> Path:
    """A coarse random picture, so that how it is scaled and cropped matters."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    if mode != "RGB":
        image = image.convert(mode)
    image.save(path)
    return path


HALVES = [("onnx", "fp16"), ("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "int8")]


@pytest.mark.parametrize(("name", "precision"), HALVES)
def test_what_is_written_through_onnx_answers_as_torch(
    name: str, precision: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{FORMATS[name].suffix}"
    alike = torch.from_numpy(shown()[0])
    report = export_file(
        network(),
        path,
        device_of(name, precision),
        card=CARD,
        images=alike,
        calibration=shown(),
        precision=precision,
    )
    assert report.max_error is not None
    assert report.argmax_agreement is not None
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert report.argmax_agreement >= {"fp32": 1, "fp16": 0.95, "int8": 0.8}[precision]
    low, high = {"fp32": (0, 1e-4), "fp16": (1e-5, 2e-2), "int8": (1e-3, 0.3)}[precision]
    assert low <= report.max_error < high  # below: it is not of that precision
    stated = read_metadata(path)
    assert stated["class_names"] == ["ant", "bee", "wäsp"]
    assert stated["preprocessing"] == {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "resolution": 12,
        "channels": 3,
    }
    assert not sidecar(path).exists()
    both = device_of(name).scores(path, shown()[0][:3], batch=2)  # any batch size
    assert both.shape == (3, 3)


def test_fp16_halves_the_weights_and_keeps_input_and_output(tmp_path: Path) -> None:
    whole, half = (onnx.load(copy(tmp_path, "onnx", precision)) for precision in ("fp32", "fp16"))
    of_graph = [*half.graph.input, *half.graph.output]
    assert [value.name for value in of_graph] == ["images", "scores"]
    types = {value.type.tensor_type.elem_type for value in of_graph}
    assert types == {onnx.TensorProto.FLOAT}
    floats = [x for x in half.graph.initializer if x.data_type != onnx.TensorProto.INT64]
    assert {x.data_type for x in floats} == {onnx.TensorProto.FLOAT16}
    ratio = sum(len(x.raw_data) for x in half.graph.initializer) / sum(
        len(x.raw_data) for x in whole.graph.initializer
    )
    assert ratio == pytest.approx(0.5, abs=0.02)
    weights = [copy(tmp_path, "openvino", p).with_suffix(".bin") for p in ("fp32", "fp16")]
    sizes = [file.stat().st_size for file in weights]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("opset", [13, 20])
def test_the_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    for precision in ("fp32", "int8"):
        path = write(tmp_path, "onnx", precision, opset=opset)
        stated = {entry.domain: entry.version for entry in onnx.load(path).opset_import}
        assert stated[""] == opset


def test_an_opset_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="opset=25; expected 13 to 20"):
        export_onnx(network(), tmp_path / "x.onnx", card=CARD, opset=25)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 2e-4), ("int8", 0.2)])
@pytest.mark.parametrize("name", FORMATS)
def test_an_example_classifies_with_nothing_but_the_runtime(
    name: str, precision: str, error: float, tmp_path: Path
) -> None:
    python = python_of(FORMATS[name].runtime, precision)
    path = copy(tmp_path, name, precision)
    example = write_example(tmp_path, name, [path.name], CARD, int8=precision == "int8")
    image = photo(tmp_path / "photo.png", (31, 20), "RGB")
    found = classified(example, image, python)
    name, probability = expected(image, network(), CARD)
    assert found == (name, pytest.approx(probability, abs=error))


@pytest.mark.parametrize("card", [CARD, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_an_example_has_ten_lines_of_code(
    name: str, int8: bool, card: NetworkCard, tmp_path: Path
) -> None:
    model = f"model{FORMATS[name].suffix}"
    text = write_example(tmp_path, name, [model], card, int8=int8).read_text()
    docstring = ast.parse(text).body[0]
    lines = text.splitlines()[docstring.end_lineno :]
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 10
    assert max(map(len, lines)) <= 110
    assert ";" not in text
    assert "fbnas" not in text
    assert (tmp_path / "labels.txt").read_text(encoding="utf-8") == "ant\nbee\nwäsp\n"


MODES = [((12, 12), "RGB"), ((9, 30), "L"), ((40, 17), "RGBA"), ((8, 9), "P")]


@pytest.mark.parametrize("card", [CARD, GREY], ids=["colour", "grey"])
def test_the_example_prepares_images_as_training_does(card: NetworkCard, tmp_path: Path) -> None:
    model = network() if card is CARD else grey_network()
    path = tmp_path / "x.onnx"
    export_onnx(model, path, card=card)
    example = write_example(tmp_path, "onnx", [path.name], card, int8=False)
    for number, (size, mode) in enumerate(MODES):
        image = photo(tmp_path / f"{number}.png", size, mode, seed=number)
        name, probability = expected(image, model, card)
        found = classified(example, image, sys.executable)
        assert found == (name, pytest.approx(probability, abs=2e-4)), mode


def test_one_example_runs_each_of_its_files(tmp_path: Path) -> None:
    paths = [copy(tmp_path, "onnx", precision) for precision in ("fp32", "fp16", "int8")]
    names = [path.name for path in paths]
    example = write_example(tmp_path, "onnx", names, CARD, int8=True)
    text = example.read_text()
    assert text.count(names[0]) == 3  # twice to say what may stand in its place
    image = photo(tmp_path / "photo.png", (31, 20), "RGB")
    name, probability = expected(image, network(), CARD)
    for path, error in zip(paths, (2e-4, 5e-3, 0.2), strict=True):
        example.write_text(text.replace(f'"{names[0]}"', f'"{path.name}"'))
        found = classified(example, image, sys.executable)
        assert found == (name, pytest.approx(probability, abs=error))


@pytest.mark.parametrize("name", ["tflite", "pte", "pt2"])
def test_metadata_lie_in_the_file_and_beside_it(name: str, tmp_path: Path) -> None:
    path = copy(tmp_path, name)
    beside = json.loads(sidecar(path).read_text())
    sidecar(path).unlink()
    assert read_metadata(path) == beside
    assert beside["architecture"] == list(ARCHITECTURE.blocks)
    if name == "tflite":
        with zipfile.ZipFile(path) as archive:
            assert archive.read("labels.txt").decode() == "ant\nbee\nwäsp\n"


def test_a_broken_ir_is_refused(tmp_path: Path) -> None:
    path = copy(tmp_path, "openvino")
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"x_fp32\.xml: not a whole IR of OpenVINO"):
        read_metadata(path)
    with pytest.raises(InputError, match=r"none\.xml: no such file"):
        read_metadata(tmp_path / "none.xml")
    path.write_text(whole)
    path.with_suffix(".bin").unlink()
    with pytest.raises(InputError, match=r"x_fp32\.bin: no such model file"):
        device_of("openvino").scores(path, images(1).numpy())


def test_a_model_of_two_files_is_told_apart_by_both(tmp_path: Path) -> None:
    graph, weights = tmp_path / "x.xml", tmp_path / "x.bin"
    graph.write_bytes(b"<net/>")
    weights.write_bytes(b"1234")
    before = model_files.digest(graph)
    assert model_files.size_bytes(graph) == 10
    weights.write_bytes(b"1235")
    assert model_files.digest(graph) != before
    model_files.remove(graph)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "function"), [("onnx", "halve_onnx"), ("openvino", "write_ir")])
def test_an_fp16_file_that_disagrees_is_deleted(
    name: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(files, function)

    def of_another_network(source: Path, *arguments: object, **options: object) -> None:
        torch.manual_seed(5)
        other = network()
        nn.init.normal_(other.classifier.linear.weight)
        export_onnx(other, source, card=CARD)
        real(source, *arguments, **options)

    monkeypatch.setattr(files, function, of_another_network)
    with pytest.raises(ParityError, match="was not kept: its scores differ from torch's by"):
        write(tmp_path, name, "fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_an_int8_file_that_disagrees_is_deleted(name: str, tmp_path: Path) -> None:
    narrow = [array * 1e-3 for array in shown()]  # ranges that cut everything off
    with pytest.raises(ParityError, match=r"gives torch's class for .* at least 80 % are"):
        write(tmp_path, name, "int8", calibration=narrow, least_agreement=0.8)
    assert list(tmp_path.iterdir()) == []
    assert write(tmp_path, name, "int8", least_agreement=0.8).is_file()


def test_formats_and_their_precisions() -> None:
    for given in ("openvino", ".xml", "xml"):
        assert format_of(given) is FORMATS["openvino"]
    with pytest.raises(InputError, match=r"Unknown format 'onx'. Did you mean 'onnx'"):
        format_of("onx")
    with pytest.raises(InputError, match=r"pte is written in fp32 and int8, not in fp16; .*onnx"):
        check_precision(FORMATS["pte"], "fp16")
    with pytest.raises(InputError, match="Unknown precision 'fp8'"):
        check_precision(FORMATS["onnx"], "fp8")
    check_suffix(Path("x.xml"), Device(runtime="openvino"))
    with pytest.raises(InputError, match="is for openvino, the device runs onnxruntime"):
        check_suffix(Path("x.xml"), Device())
