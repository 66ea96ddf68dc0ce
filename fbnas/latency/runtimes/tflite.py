"""LiteRT (TensorFlow Lite), with the XNNPACK delegate.

Files are of LiteRT's own layout: images (batch, height, width, channels), and so is an output of
four sizes. `feed` and `result` transpose, outside the timed part: in the timed one, a block would
pay for two transpositions that it does not need within a network. int8 is static, by
ai-edge-quantizer: weights per channel, ranges by calibration; input and output stay float, and are
(de)quantized in the timed part. Files with int8 input or output from elsewhere are taken too: they
are (de)quantized by `feed` and `result`. The batch is fixed in the file.
"""

import importlib.metadata
import importlib.util
import io
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

NAME = "litert"
INSTALL = "pip install ai-edge-litert"
SUFFIX = ".tflite"
PRECISIONS = ("fp32", "int8")
PROVIDERS = {"XNNPACK": INSTALL}
TOLERANCE = {"fp32": 1e-3, "int8": 0.3}
CONVERTER = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
MIXES = True


def available() -> bool:
    return importlib.util.find_spec("ai_edge_litert") is not None


def version() -> str:
    return importlib.metadata.version("ai-edge-litert")


def providers() -> list[str]:
    return ["XNNPACK"]  # part of every build that pip brings


def compile(
    module: "torch.nn.Module",
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    precision: str,
    batch: int | None,
    calibration: Sequence[np.ndarray],
    float_layers: Sequence[bool] = (),
) -> None:
    """Write a .tflite file.

    Args:
        module: in eval mode, on the CPU, or the module of an exported program.
        input_shape: (channels, height, width) of one image.
        precision: fp32 or int8.
        batch: images per run; None is 1.
        calibration: arrays (batch, c, h, w) float32, from which int8 takes its ranges.
        float_layers: of every convolution and linear layer, in the order of computing, whether int8
            leaves it in float, with what follows it; () for none.

    Raises:
        ValueError: the module has another number of layers.
    """
    import litert_torch
    import torch

    channels, height, width = input_shape
    with torch.no_grad():
        four_sizes = module(torch.zeros(batch or 1, *input_shape)).dim() == 4
    images = torch.zeros(batch or 1, height, width, channels)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = litert_torch.to_channel_last_io(
            module, args=[0], outputs=[0] if four_sizes else []
        )
        with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
            source = Path(folder) / "fp32.tflite"
            litert_torch.convert(wrapped, (images,)).export(str(source))
            if precision == "int8" and not (float_layers and all(float_layers)):
                _quantize(source, path, calibration, float_layers)
            else:
                path.write_bytes(source.read_bytes())


def _quantize(
    source: Path, path: Path, calibration: Sequence[np.ndarray], float_layers: Sequence[bool]
) -> None:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import qtyping, quantizer, recipe
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    work = quantizer.Quantizer(str(source), recipe.static_wi8_ai8())
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        work.update_quantization_recipe(
            regex=".*", operation_name=end, algorithm_key=AlgorithmName.NO_QUANTIZE
        )
    for scope in _left_in_float(source, float_layers) if float_layers else ():
        work.update_quantization_recipe(
            regex=f"^{re.escape(scope)}$",
            operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
            algorithm_key=AlgorithmName.NO_QUANTIZE,
        )
    signatures = Interpreter(str(source), num_threads=1).get_signature_list()
    name, signature = next(iter(signatures.items()))
    shown = [{signature["inputs"][0]: _channels_last(images)} for images in calibration]
    ranges = work.calibrate({name: shown}, num_threads=1)
    result = work.quantize(ranges, enable_progress_report=False)
    result.export_model(str(path), overwrite=True)


def _left_in_float(source: Path, float_layers: Sequence[bool]) -> list[str]:
    """Return the scopes of the operations of layers in float, each with those up to the next.

    What comes before the first layer is of it.
    """
    from ai_edge_litert.schema_py_generated import BuiltinOperator
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils

    weighted = {
        BuiltinOperator.CONV_2D,
        BuiltinOperator.DEPTHWISE_CONV_2D,
        BuiltinOperator.FULLY_CONNECTED,
    }
    model = tfl_flatbuffer_utils.read_model(str(source))
    graph = model.subgraphs[0]
    layers, left = 0, []
    for operation in graph.operators:
        layers += model.operatorCodes[operation.opcodeIndex].builtinCode in weighted
        if layers <= len(float_layers) and float_layers[max(layers, 1) - 1]:
            left.append(tfl_flatbuffer_utils.get_op_scope(operation, graph.tensors))
    if layers != len(float_layers):
        raise ValueError(f"the file has {layers} layers, float_layers is of {len(float_layers)}")
    return left


class _Model:
    def __init__(self, interpreter: Any) -> None:
        self.interpreter = interpreter
        self.input = interpreter.get_input_details()[0]
        self.output = interpreter.get_output_details()[0]


def load(path: Path, settings: Mapping[str, Any]) -> Any:
    """Return an interpreter.

    Raises:
        ValueError: not a model that LiteRT can load, or a provider that it lacks.
    """
    from ai_edge_litert.interpreter import Interpreter

    provider = settings.get("provider") or "XNNPACK"
    if provider not in providers():
        raise ValueError(f"LiteRT has no {provider} here, only {', '.join(providers())}")
    try:
        interpreter = Interpreter(str(path), num_threads=int(settings.get("threads", 1)))
        interpreter.allocate_tensors()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return _Model(interpreter)


def feed(model: Any, images: np.ndarray) -> None:
    """Bind images (batch, c, h, w) float32.

    Raises:
        ValueError: images of another shape than the model takes.
    """
    expected = input_shape(model)
    if images.shape != expected:
        raise ValueError(
            f"the model takes images of shape {expected}, these are {images.shape} (a LiteRT file "
            "is read as: batch, height, width, channels)"
        )
    values = _channels_last(images)
    if model.input["dtype"] != np.float32:
        scale, zero = model.input["quantization"]
        bounds = np.iinfo(model.input["dtype"])
        values = np.clip(np.round(values / scale) + zero, bounds.min, bounds.max)
    model.interpreter.set_tensor(model.input["index"], values.astype(model.input["dtype"]))


def run(model: Any) -> None:
    try:
        model.interpreter.invoke()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def result(model: Any) -> np.ndarray:
    values = model.interpreter.get_tensor(model.output["index"])
    if model.output["dtype"] != np.float32:
        scale, zero = model.output["quantization"]
        values = (values.astype(np.float32) - zero) * scale
    if values.ndim == 4:
        values = values.transpose(0, 3, 1, 2)
    return np.array(values, dtype=np.float32, order="C")


def input_shape(model: Any) -> tuple[int, ...]:
    sizes = [int(size) for size in model.input["shape"]]
    if len(sizes) == 4:
        return sizes[0], sizes[3], sizes[1], sizes[2]
    return tuple(sizes)


def _channels_last(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1), dtype=np.float32)
