"""ONNX Runtime on the CPU.

Not called onnxruntime.py: beside runner.py on a device such a file would shadow the package.
"""

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NAME = "onnxruntime"
INSTALL = "pip install onnxruntime"
PRECISIONS = ("fp32", "int8")
SUFFIX = ".onnx"


def available() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def version() -> str:
    return importlib.metadata.version("onnxruntime")


def compile(
    module: "torch.nn.Module",
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    precision: str,
    batch: int,
    calibration: Sequence[np.ndarray],
) -> None:
    """Write an ONNX file; int8 is static QDQ, per channel.

    Args:
        input_shape: (channels, height, width) of one image.
        precision: fp32 or int8.
        calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges.
    """
    from fbnas.latency.lowering import quantize_onnx, write_onnx

    if precision == "fp32":
        write_onnx(module, input_shape, path, batch=batch)
        return
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        source = Path(folder) / "fp32.onnx"
        write_onnx(module, input_shape, source, batch=batch)
        quantize_onnx(source, path, calibration)


def load(path: Path, threads: int) -> Any:
    """Return a session with its input bound: what remains in `run` is the runtime's own work.

    Raises:
        ValueError: not a model that ONNX Runtime can load and run.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
    # Idle threads that spin would steal the cores from the next model to be timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    errors = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        model = session, _bind(session)
        run(model)
    except (*errors, ort.NotImplemented, ort.NoSuchFile, ort.RuntimeException) as error:
        raise ValueError(str(error)) from error
    return model


def _bind(session: Any) -> Any:
    """Bind random images, one where the batch is open, and room for the answers."""
    binding = session.io_binding()
    generator = np.random.default_rng(0)
    for argument in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in argument.shape]
        images = generator.standard_normal(shape, dtype=np.float32)
        binding.bind_cpu_input(argument.name, images)
    for result in session.get_outputs():
        binding.bind_output(result.name, "cpu")
    return binding


def run(model: Any) -> None:
    session, binding = model
    session.run_with_iobinding(binding)
