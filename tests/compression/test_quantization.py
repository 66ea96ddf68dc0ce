"""int8 files: as good as fp32 within a stated tolerance, smaller, calibrated on training images."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from digits_network import Trained, fit
from torch import Tensor

from fbnas.compression import ChannelPruning, StaticQuantization, compress_, quantize_file
from fbnas.errors import InputError
from fbnas.export import accuracy_of_file, export_onnx, read_metadata, scores_of_file
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.timing import Timing
from fbnas.training.data import Images

TOLERANCE = 0.02  # top-1 lost to int8 on digits; measured: 0.000, with weights of 7 bits 0.0035
SCHEMES: dict[str, dict] = {
    "default": {},
    "percentile": {"ranges": "percentile"},
    "entropy": {"ranges": "entropy"},
    "symmetric activations": {"activations": "symmetric"},
    "scale per tensor": {"per_channel": False},
    "asymmetric weights": {"per_channel": False, "weights": "asymmetric"},
    "equalised": {"equalise": True},
    "7 bits": {"reduce_range": True},
}


@pytest.fixture(scope="module")
def files(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    fp32, int8 = folder / "fp32.onnx", folder / "int8.onnx"
    export_onnx(trained.network, fp32, card=trained.card)
    report = quantize_file(fp32, int8, trained.data)
    assert report.bytes_after == int8.stat().st_size < 0.7 * report.bytes_before
    assert report.calibration_images == 256
    return fp32, int8


def judge(path: Path, trained: Trained) -> float:
    data = trained.data
    return accuracy_of_file(path, data.validation, mean=data.mean, std=data.std)


def test_int8_costs_little_accuracy(files: tuple[Path, Path], trained: Trained) -> None:
    fp32, int8 = files
    assert judge(int8, trained) >= judge(fp32, trained) - TOLERANCE


@pytest.mark.parametrize("scheme", SCHEMES)
def test_int8_by_every_scheme_gives_the_classes_of_fp32(
    scheme: str, files: tuple[Path, Path], trained: Trained, tmp_path: Path
) -> None:
    """Of 287 validation digits; measured: all of them by default, 0.9895 (entropy) at least."""
    data = trained.data
    method = StaticQuantization(calibration_images=128, **SCHEMES[scheme])
    quantize_file(files[0], tmp_path / "int8.onnx", data, method)
    fp32, int8 = (
        scores_of_file(path, data.validation, mean=data.mean, std=data.std, threads=1)
        for path in (files[0], tmp_path / "int8.onnx")
    )
    agreement = float((fp32.argmax(1) == int8.argmax(1)).double().mean())
    assert agreement >= 0.95


def test_metadata_survive(files: tuple[Path, Path]) -> None:
    fp32, int8 = files
    assert read_metadata(int8) == read_metadata(fp32)
    assert read_metadata(int8)["class_names"][3] == "3"


@pytest.mark.parametrize("count", [1, 7])
def test_any_batch_size_gives_the_same_scores(files: tuple[Path, Path], count: int) -> None:
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    session = onnxruntime.InferenceSession(files[1], providers=["CPUExecutionProvider"])
    together = session.run(["scores"], {"images": images})[0]
    assert together.shape == (count, 10)
    for i in range(count):
        alone = session.run(["scores"], {"images": images[i : i + 1]})[0]
        assert abs(together[i] - alone[0]).max() < 1e-5


def test_every_convolution_runs_in_int8(files: tuple[Path, Path], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(files[1], options, providers=["CPUExecutionProvider"])
    convolutions = [n.op_type for n in onnx.load(files[0]).graph.node if n.op_type == "Conv"]
    optimised = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert optimised.count("QLinearConv") == len(convolutions)
    assert "Conv" not in optimised


def test_weights_are_quantized_per_channel_unless_asked_otherwise(
    files: tuple[Path, Path], trained: Trained, tmp_path: Path
) -> None:
    method = StaticQuantization(per_channel=False, calibration_images=16)
    quantize_file(files[0], tmp_path / "tensor.onnx", trained.data, method)

    def vector_scales(path: Path) -> int:
        weights = onnx.load(path).graph.initializer
        return sum(w.name.endswith("_scale") and list(w.dims) not in ([], [1]) for w in weights)

    assert vector_scales(files[1]) > 15
    assert vector_scales(tmp_path / "tensor.onnx") == 0


def test_calibration_sees_seeded_training_images_and_no_others(
    files: tuple[Path, Path], trained: Trained, tmp_path: Path
) -> None:
    seen: list[int] = []

    class Watched:
        labels = trained.data.train.labels
        in_memory, workers = True, 0

        def on(self, device: torch.device) -> Images:
            return self

        def __len__(self) -> int:
            return len(trained.data.train)

        def batch(self, indices: Tensor) -> Tensor:
            seen.extend(indices.tolist())
            return trained.data.train.batch(indices)

    class Forbidden:
        labels = torch.zeros(1, dtype=torch.int64)
        in_memory, workers = True, 0

        def on(self, device: torch.device) -> Images:
            return self

        def __len__(self) -> int:
            return 1

        def batch(self, indices: Tensor) -> Tensor:
            raise AssertionError("calibration read images that are not for training")

    def forbidden() -> Images:
        raise AssertionError("calibration loaded the test images")

    data = replace(trained.data, train=Watched(), validation=Forbidden(), load_test=forbidden)
    method = StaticQuantization(calibration_images=48, batch_size=20)
    contents = []
    for seed in (0, 0, 1):
        quantize_file(files[0], tmp_path / "int8.onnx", data, method, seed=seed)
        contents.append((tmp_path / "int8.onnx").read_bytes())
    assert len(seen) == 3 * 48
    assert len(set(seen[:48])) == 48
    assert seen[:48] == seen[48:96] != seen[96:]
    assert contents[0] == contents[1] != contents[2]


def test_pruned_network_quantizes(trained: Trained, tmp_path: Path) -> None:
    network = copy.deepcopy(trained.network)
    compress_(network, ChannelPruning(ratio=0.25), input_shape=trained.card.input_shape)
    export_onnx(network, tmp_path / "pruned.onnx", card=trained.card)
    quantize_file(tmp_path / "pruned.onnx", tmp_path / "int8.onnx", trained.data)
    pruned, int8 = judge(tmp_path / "pruned.onnx", trained), judge(tmp_path / "int8.onnx", trained)
    assert abs(pruned - int8) < 0.05


def test_it_is_the_last_method_of_compress_(trained: Trained, tmp_path: Path) -> None:
    network, seen = copy.deepcopy(trained.network).train(), []

    def measure(files: Sequence[Path]) -> Measurement:
        seen.append([path.name for path in files])
        return Device(precision="fp32").measure(files, rounds=4)

    report = compress_(
        network,
        [ChannelPruning(ratio=0.25), StaticQuantization(max_accuracy_drop=0.01)],
        train=lambda model: fit(model, trained.data, epochs=1),
        data=trained.data,
        folder=tmp_path / "small",
        measure_files=measure,
    )
    pruned, int8 = report.steps
    files = [tmp_path / "small" / name for name in ("fp32.onnx", "model.onnx")]
    assert report.after is int8.after
    assert [int8.before.dense_bytes, int8.after.dense_bytes] == [f.stat().st_size for f in files]
    assert [int8.before.accuracy, int8.after.accuracy] == [
        accuracy_of_file(f, trained.data.validation, mean=trained.data.mean, std=trained.data.std)
        for f in files
    ]
    assert int8.before.accuracy == pytest.approx(pruned.after.accuracy, abs=0.004)
    assert int8.after.accuracy >= int8.before.accuracy - 0.01
    assert int8.after.params == pruned.after.params < pruned.before.params
    (found,) = report.changes
    assert found.latencies.fastest_ms == int8.after.latency_ms
    assert found.latencies.fp32_ms == int8.before.latency_ms
    assert seen


def test_without_a_device_all_is_int8_and_the_network_stays(
    trained: Trained, tmp_path: Path
) -> None:
    network = copy.deepcopy(trained.network)
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    report = compress_(network, StaticQuantization(), data=trained.data, folder=tmp_path)
    quantize_file(tmp_path / "fp32.onnx", tmp_path / "again.onnx", trained.data)
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    assert report.changes[0].float_layers == ()
    assert report.after.dense_bytes < 0.7 * report.before.dense_bytes
    assert report.after.latency_ms is None
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())


def test_a_file_that_does_not_pay_is_the_float_one(trained: Trained, tmp_path: Path) -> None:
    def slow(files: Sequence[Path]) -> Measurement:
        """A float file takes 1 ms, and every layer in int8 one more."""
        graphs = [onnx.load(path).graph for path in files]
        makers = [{x: n.op_type for n in g.node for x in n.output} for g in graphs]
        times = [
            1.0
            + sum(
                n.op_type in ("Conv", "Gemm") and makers[i].get(n.input[1]) == "DequantizeLinear"
                for n in g.node
            )
            for i, g in enumerate(graphs)
        ]
        timings = tuple(Timing(ms, ms, ms, 4) for ms in times)
        return Measurement(timings, 0.0, np.array([times]))

    report = compress_(
        copy.deepcopy(trained.network),
        StaticQuantization(calibration_images=8),
        data=trained.data,
        folder=tmp_path,
        measure_files=slow,
    )
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "fp32.onnx").read_bytes()
    assert report.after == report.before


@pytest.mark.parametrize(
    "lacking",
    [
        {"method": [StaticQuantization(), ChannelPruning()]},
        {"folder": None},
        {"data": None},
    ],
    ids=["not the last", "no folder", "no data"],
)
def test_what_int8_of_a_module_lacks_is_said(
    trained: Trained, tmp_path: Path, lacking: dict
) -> None:
    given = {"method": StaticQuantization(), "folder": tmp_path, "data": trained.data} | lacking
    with pytest.raises(InputError, match=r"the last method, with data= and folder=.*quantize_file"):
        compress_(trained.network, given.pop("method"), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"calibration_images": 0}, "calibration_images is 0; expected at least 1"),
        ({"ranges": "percentil"}, "Did you mean 'percentile'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        StaticQuantization(**settings)
