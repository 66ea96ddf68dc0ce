"""Devices whose sums of int8 products are cut off, found by trying.

x86 CPUs without VNNI multiply uint8 by int8 and add two products in 16 bits (vpmaddubsw), so that
2 * 255 * 127 becomes 32,767. Weights of 7 bits, at most 64 in size, are never cut off. Runtimes
with files of their own are not tried: their converters choose weights themselves.
"""

import functools
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from fbnas.errors import InputError
from fbnas.latency.devices import Device
from fbnas.latency.profiling import AnyDevice

log = logging.getLogger(__name__)

CHANNELS, SIDE = 32, 8
LEAST = 0.99  # of the sum: rounding to the grid of the output loses less


def saturates(device: AnyDevice) -> bool:
    """Whether a device that runs ONNX files cuts off sums of int8 products; False for others.

    One convolution is run on the device, whose every sum is the largest that there is; the answer
    is kept for as long as this process lives. Where it cannot be run, that is told, and the answer
    is no.
    """
    if not isinstance(device, Device) or device.suffix != ".onnx":
        return False
    alike = replace(device, name="any", precision="int8", threads=1, cores=(), converter=None)
    try:
        return _saturates(alike)
    except (InputError, RuntimeError) as error:
        log.warning(
            "Whether %s cuts sums of int8 products off at 16 bits could not be tried (%s); it is "
            "taken not to.",
            device.name,
            str(error).splitlines()[0],
        )
        return False


@functools.cache
def _saturates(device: Device) -> bool:
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        path = Path(folder) / "largest_sums.onnx"
        path.write_bytes(_largest_sums())
        images = np.ones((1, CHANNELS, SIDE, SIDE), np.float32)
        found = device.scores(path, images, there=True)
    return bool(found.min() < LEAST * CHANNELS)


def _largest_sums() -> bytes:
    """Return an int8 file whose scores for images of ones are sums of 255 * 127 over channels."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape, steps = [1, CHANNELS, SIDE, SIDE], {"in": 1 / 255, "w": 1 / 127, "out": CHANNELS / 255}
    weights = np.full((CHANNELS, CHANNELS, 1, 1), 127, np.int8)
    tensors = {"weights": weights, "zero": np.uint8(0), "w_zero": np.int8(0)}
    tensors |= {f"{name}_step": np.float32(step) for name, step in steps.items()}
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "in_step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "in_step", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weights", "w_step", "w_zero"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["sums"]),
        helper.make_node("QuantizeLinear", ["sums", "out_step", "zero"], ["sums_q"]),
        helper.make_node("DequantizeLinear", ["sums_q", "out_step", "zero"], ["sums_x"]),
        helper.make_node("GlobalAveragePool", ["sums_x"], ["means"]),
        helper.make_node("Flatten", ["means"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "largest_sums",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, CHANNELS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
