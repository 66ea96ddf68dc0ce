"""ONNX Runtime, with any of its execution providers.

A provider takes the operators it knows and leaves the others to the CPU; a session that could not
load its provider's libraries at all would run on the CPU in silence, which `load` refuses. CUDA and
TensorRT have their input and output in the GPU's memory, so copies are not timed; the others start
from the host's memory. fp32 is fp32: TF32 is off. CoreML, QNN, NNAPI and DirectML may compute fp32
files in fp16, and QNN's NPU takes int8 files alone.

Not called onnxruntime.py: beside runner.py on a device such a file would shadow the package.
"""

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NAME = "onnxruntime"
INSTALL = "pip install onnxruntime"
SUFFIX = ".onnx"
PRECISIONS = ("fp32", "int8")
PROVIDERS = {
    "CPU": INSTALL,
    "CUDA": "pip install onnxruntime-gpu",
    "TensorRT": "pip install onnxruntime-gpu tensorrt",
    "NvTensorRTRTX": "pip install onnxruntime-trt-rtx",
    "OpenVINO": "pip install onnxruntime-openvino",
    "CoreML": "pip install onnxruntime (on macOS)",
    "QNN": "pip install onnxruntime-qnn (on Windows or Linux, arm64)",
    "NNAPI": "the onnxruntime-android package of Maven, or build.py --use_nnapi",
    "XNNPACK": "build onnxruntime from source: build.py --use_xnnpack",
    "DirectML": "pip install onnxruntime-directml (on Windows)",
    "MIGraphX": "pip install onnxruntime-migraphx (AMD's package index)",
    "ROCM": "pip install onnxruntime-rocm (AMD's package index)",
    "VitisAI": "AMD's Ryzen AI or Vitis AI software",
    "WebGPU": "pip install onnxruntime-webgpu",
    "CANN": "pip install onnxruntime-cann",
    "oneDNN": "build onnxruntime from source: build.py --use_dnnl",
    "ACL": "build onnxruntime from source: build.py --use_acl",
    "ArmNN": "build onnxruntime from source: build.py --use_armnn",
    "RKNPU": "build onnxruntime from source: build.py --use_rknpu",
}
# int8 has 256 values for an activation: 1 to 3 % off here, more where ranges are ill chosen.
TOLERANCE = {"fp32": 1e-3, "int8": 0.3}
CONVERTER: tuple[str, ...] = ()

_SPELLED = {  # ONNX Runtime's own spelling, where it is not ours
    "TensorRT": "Tensorrt",
    "NNAPI": "Nnapi",
    "XNNPACK": "Xnnpack",
    "DirectML": "Dml",
    "oneDNN": "Dnnl",
}
_OPTIONS: dict[str, dict[str, str]] = {"CUDA": {"use_tf32": "0"}}
_ON_GPU = ("CUDA", "TensorRT", "NvTensorRTRTX")


def available() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def providers() -> list[str]:
    import onnxruntime

    found = onnxruntime.get_available_providers()
    return [name for name in PROVIDERS if _long(name) in found]


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
    """A session, the input bound to it and room for its output."""

    def __init__(self, session: Any, place: str) -> None:
        self.session = session
        self.place = place  # cpu or cuda: where input and output lie
        self.binding: Any = None
        self.bound: Any = None


def load(path: Path, settings: Mapping[str, Any]) -> Any:
    """Return a session on the provider asked for.

    Raises:
        ValueError: not a model that ONNX Runtime can load, or the provider is not to be had.
    """
    import onnxruntime

    name = settings.get("provider") or "CPU"
    long = _long(name)
    if long not in onnxruntime.get_available_providers():
        way = f"; install it: {PROVIDERS[name]}" if name in PROVIDERS else ""
        raise ValueError(f"this ONNX Runtime has no {long}, only {', '.join(providers())}{way}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(settings.get("threads", 1))
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
    # Idle threads that spin would steal the cores from the next model to be timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=[(long, _OPTIONS.get(name, {}))]
        )
    except _errors() as error:
        raise ValueError(str(error)) from error
    if long not in session.get_providers():
        raise ValueError(
            f"{long} could not be started and ONNX Runtime fell back to "
            f"{', '.join(session.get_providers())}: libraries that it needs are missing "
            f"({PROVIDERS.get(name, name)}); its log on stderr names them"
        )
    return _Model(session, "cuda" if name in _ON_GPU else "cpu")


def feed(model: Any, images: np.ndarray) -> None:
    """Bind images (batch, c, h, w) float32, and room for the answers.

    Raises:
        ValueError: images of another shape than the model takes.
    """
    import onnxruntime

    expected = input_shape(model)
    if not _fits(images.shape, expected):
        raise ValueError(f"the model takes images of shape {expected}, these are {images.shape}")
    images = np.ascontiguousarray(images, dtype=np.float32)
    binding = model.session.io_binding()
    model.bound = onnxruntime.OrtValue.ortvalue_from_numpy(images, model.place, 0)
    binding.bind_ortvalue_input(model.session.get_inputs()[0].name, model.bound)
    for output in model.session.get_outputs():
        binding.bind_output(output.name, model.place)
    model.binding = binding


def run(model: Any) -> None:
    try:
        model.session.run_with_iobinding(model.binding)
    except _errors() as error:
        raise ValueError(str(error)) from error


def result(model: Any) -> np.ndarray:
    """Return the scores; of a file that says it has several heads those of all, side by side."""
    found = model.binding.copy_outputs_to_cpu()
    several = "fbnas.heads" in model.session.get_modelmeta().custom_metadata_map
    scores = np.concatenate(found, axis=1) if several else found[0]
    return np.asarray(scores, dtype=np.float32)


def input_shape(model: Any) -> tuple[int, ...]:
    sizes = model.session.get_inputs()[0].shape
    return tuple(size if isinstance(size, int) else -1 for size in sizes)


def _long(name: str) -> str:
    return (
        name
        if name.endswith("ExecutionProvider")
        else f"{_SPELLED.get(name, name)}ExecutionProvider"
    )


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(
        want in (-1, size) for size, want in zip(shape, expected, strict=True)
    )


def _errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    names = "Fail InvalidArgument InvalidGraph InvalidProtobuf NotImplemented NoSuchFile EPFail"
    found = [getattr(ort, name) for name in (*names.split(), "RuntimeException", "NoModel")]
    return (*found, RuntimeError)
