"""OpenVINO; it reads the same ONNX files as ONNX Runtime, int8 (QDQ) included, and its own IR.

An IR is two files, NAME.xml and NAME.bin; `fbnas export format=openvino` writes it.

fp32 is fp32: left to itself OpenVINO computes fp32 files in bf16 or fp16 where the machine can
(8e-3 off on FBNet-C). NPUs have no fp32 and compute in fp16. Its threads are not pinned to cores by
OpenVINO, so that the cores given to the process hold.

Not called openvino.py: beside runner.py on a device such a file would shadow the package.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NAME = "openvino"
INSTALL = "pip install openvino"
SUFFIX = ".onnx"
READS = (".onnx", ".xml")
PRECISIONS = ("fp32", "int8")
PROVIDERS = {
    "CPU": INSTALL,
    "GPU": "Intel's GPU driver (apt install intel-opencl-icd)",
    "NPU": "Intel's NPU driver (github.com/intel/linux-npu-driver)",
}
TOLERANCE = {"fp32": 5e-3, "int8": 0.3}  # fp32: fp16 of an NPU passes, bf16 does not
CONVERTER: tuple[str, ...] = ()


def available() -> bool:
    return importlib.util.find_spec("openvino") is not None


def version() -> str:
    import openvino

    return str(openvino.__version__).split("-")[0]


def providers() -> list[str]:
    return _core().available_devices


def compile(
    module: "torch.nn.Module",
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    precision: str,
    batch: int | None,
    calibration: Sequence[np.ndarray],
) -> None:
    """Write an ONNX file; int8 is static QDQ, per channel.

    Args:
        input_shape: (channels, height, width) of one image.
        precision: fp32 or int8.
        batch: images per run; None leaves it open.
        calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges.
    """
    from fbnas.latency.lowering import compile_onnx

    compile_onnx(
        module, input_shape, path, precision=precision, batch=batch, calibration=calibration
    )


class _Model:
    """A model, and its compiled form for the shape of the images that were fed last."""

    def __init__(self, source: Any, provider: str, threads: int) -> None:
        self.source = source
        self.provider = provider
        self.threads = threads
        self.open_shape = tuple(
            size.get_length() if size.is_static else -1 for size in source.input(0).partial_shape
        )
        self.compiled_shape: tuple[int, ...] | None = None
        self.request: Any = None


def load(path: Path, settings: Mapping[str, Any]) -> Any:
    """Return the model compiled for the provider; an open batch as 1.

    Raises:
        ValueError: not a model that OpenVINO can load, or there is no such provider here.
    """
    provider = settings.get("provider") or "CPU"
    found = providers()
    if provider not in {*found, *(name.partition(".")[0] for name in found)}:
        way = f"; install {PROVIDERS[provider]}" if provider in PROVIDERS else ""
        raise ValueError(f"OpenVINO finds no {provider} here, only {', '.join(found)}{way}")
    try:
        source = _core().read_model(str(path))
        model = _Model(source, provider, int(settings.get("threads", 1)))
        _compile_for(model, tuple(max(size, 1) for size in model.open_shape))
    except RuntimeError as error:
        raise ValueError(_words(error)) from error
    return model


def _compile_for(model: _Model, shape: tuple[int, ...]) -> None:
    """Compile for one fixed shape: with an open one OpenVINO plans anew in every run."""
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if not model.provider.startswith("NPU"):
        properties["INFERENCE_PRECISION_HINT"] = "f32"
    if model.provider == "CPU":
        properties |= {"INFERENCE_NUM_THREADS": model.threads, "ENABLE_CPU_PINNING": False}
    if -1 in model.open_shape:
        model.source.reshape(list(shape))
    compiled = _core().compile_model(model.source, model.provider, properties)
    model.request = compiled.create_infer_request()
    model.compiled_shape = shape


def feed(model: Any, images: np.ndarray) -> None:
    """Bind images (batch, c, h, w) float32; another batch than before is compiled for.

    Raises:
        ValueError: images of another shape than the model takes.
    """
    import openvino

    expected = model.open_shape
    fits = len(images.shape) == len(expected) and all(
        want in (-1, size) for size, want in zip(images.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"the model takes images of shape {expected}, these are {images.shape}")
    try:
        if images.shape != model.compiled_shape:
            _compile_for(model, images.shape)
        images = np.ascontiguousarray(images, dtype=np.float32)
        model.request.set_input_tensor(openvino.Tensor(images.copy()))
    except RuntimeError as error:
        raise ValueError(_words(error)) from error


def run(model: Any) -> None:
    try:
        model.request.infer(share_outputs=True)
    except RuntimeError as error:
        raise ValueError(_words(error)) from error


def result(model: Any) -> np.ndarray:
    """Return the scores; of an ONNX file that says it has several heads those of all, in a row."""
    several = model.source.has_rt_info(["framework", "fbnas.heads"])
    outputs = range(len(model.source.outputs) if several else 1)
    found = [np.array(model.request.get_output_tensor(i).data, dtype=np.float32) for i in outputs]
    return np.concatenate(found, axis=1) if several else found[0]


def input_shape(model: Any) -> tuple[int, ...]:
    return model.open_shape


def _words(error: Exception) -> str:
    """What OpenVINO says, without the places in its own sources."""
    places = ("Exception from src/", "Check '")
    lines = [line for line in str(error).splitlines() if not line.startswith(places)]
    return " ".join(" ".join(lines).split()) or str(error)


_shared: list[Any] = []


def _core() -> Any:
    """One core for all models of a process: each would load the plugins anew."""
    if not _shared:
        import openvino

        _shared.append(openvino.Core())
    return _shared[0]
