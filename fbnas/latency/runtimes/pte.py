"""ExecuTorch, with the XNNPACK delegate; its Python runtime needs torch beside it.

int8 is PT2E with the quantizer of XNNPACK: weights per channel, ranges by calibration; input and
output stay float, and are (de)quantized in the timed part. The batch is fixed in the file.

Not called executorch.py: beside runner.py on a device such a file would shadow the package.
"""

import importlib.metadata
import importlib.util
import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NAME = "executorch"
INSTALL = "pip install executorch"
SUFFIX = ".pte"
PRECISIONS = ("fp32", "int8")
PROVIDERS = {"XNNPACK": INSTALL}
TOLERANCE = {"fp32": 1e-3, "int8": 0.3}
CONVERTER = ("executorch", "torchao")
MIXES = True
HOLDS_TEXT = True  # as what a method of the name TEXT returns
TEXT = "fbnas"


def available() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("executorch", "torch"))


def version() -> str:
    return importlib.metadata.version("executorch")


def providers() -> list[str]:
    found = _library()._get_registered_backend_names()
    return ["XNNPACK"] if "XnnpackBackend" in found else []


def compile(
    module: "torch.nn.Module",
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    precision: str,
    batch: int | None,
    calibration: Sequence[np.ndarray],
    text: str = "",
    float_layers: Sequence[bool] = (),
) -> None:
    """Write a .pte file.

    Args:
        module: in eval mode, on the CPU, or the module of an exported program.
        input_shape: (channels, height, width) of one image.
        precision: fp32 or int8.
        batch: images per run; None is 1.
        calibration: arrays (batch, c, h, w) float32, from which int8 takes its ranges.
        text: what the file's method TEXT returns; "" for no such method.
        float_layers: of every convolution and linear layer, in the order of computing, whether int8
            leaves it in float, with what follows it; () for none.

    Raises:
        ValueError: the module has another number of layers.
    """
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    images = (torch.zeros(batch or 1, *input_shape),)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.export.export(module, images, strict=False)
        if precision == "int8":
            quantized = _quantized(program.module(), calibration, float_layers)
            program = torch.export.export(quantized, images, strict=False)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            constant_methods={TEXT: text} if text else None,
        )
        path.write_bytes(edge.to_executorch().buffer)


def _quantized(module: Any, calibration: Sequence[np.ndarray], float_layers: Sequence[bool]) -> Any:
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    class Quantizer(XNNPACKQuantizer):
        def annotate(self, model: Any) -> Any:
            left = _left_in_float(model.graph, float_layers)
            self.set_filter_function(lambda node: node not in left)
            return super().annotate(model)

    quantizer = Quantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    # Those of training (QAT) find nothing here, and exporting them takes half the time of a block.
    patterns = getattr(quantizer, "SUPPORTED_PATTERNS", None)
    if patterns is not None:
        quantizer.SUPPORTED_PATTERNS = [pattern for pattern in patterns if not pattern.is_qat]
    prepared = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for images in calibration:
            prepared(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)))
    return convert_pt2e(prepared)


def _left_in_float(graph: Any, float_layers: Sequence[bool]) -> set[Any]:
    """Return the nodes of layers in float, each with those up to the next; before it, of the first.

    Raises:
        ValueError: it has another number of layers.
    """
    import torch

    if not float_layers:
        return set()

    aten = torch.ops.aten
    layers, left = 0, set[Any]()
    for node in graph.nodes:
        if node.op != "call_function":  # weights come before all layers, not before their own
            continue
        layers += getattr(node.target, "overloadpacket", None) in (aten.conv2d, aten.linear)
        if layers <= len(float_layers) and float_layers[max(layers, 1) - 1]:
            left.add(node)
    if layers != len(float_layers):
        raise ValueError(f"the network has {layers} layers, float_layers is of {len(float_layers)}")
    return left


class _Model:
    """A program, its input and its last output, which lies in the program's own memory."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []


def load(path: Path, settings: Mapping[str, Any]) -> Any:
    """Return the program. The number of threads is one for all programs of a process.

    Raises:
        ValueError: not a program that ExecuTorch can load, or the delegate is not to be had.
    """
    provider = settings.get("provider") or "XNNPACK"
    if provider not in providers():
        raise ValueError(f"this ExecuTorch has no {provider}, only {', '.join(providers())}")
    library = _library()
    threads = int(settings.get("threads", 1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # marked experimental
            if library._threadpool_get_thread_count() != threads:
                library._unsafe_reset_threadpool(threads)
            model = _Model(library._load_for_executorch(str(path)))
            input_shape(model)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return model


def feed(model: Any, images: np.ndarray) -> None:
    """Bind images (batch, c, h, w) float32.

    Raises:
        ValueError: images of another shape than the program takes.
    """
    import torch

    expected = input_shape(model)
    if images.shape != expected:
        raise ValueError(f"the model takes images of shape {expected}, these are {images.shape}")
    model.inputs = [torch.from_numpy(np.array(images, dtype=np.float32))]


def run(model: Any) -> None:
    try:
        model.outputs = model.program.forward(model.inputs, clone_outputs=False)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def result(model: Any) -> np.ndarray:
    return np.array(model.outputs[0].numpy(), dtype=np.float32)


def input_shape(model: Any) -> tuple[int, ...]:
    return tuple(model.program.method_meta("forward").input_tensor_meta(0).sizes())


def _library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.extension.pybindings import portable_lib
    return portable_lib
