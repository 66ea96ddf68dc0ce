"""From a module to a file that runtimes execute: ONNX, and its static int8 form.

torch.export needs 640 ms for one block, the TorchScript exporter 17 ms (torch 2.13, 2 x86 cores);
a profile exports some hundred blocks and torch is pinned exactly, so the latter is used.
"""

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fbnas.errors import InputError, unknown
from fbnas.files import atomic_write

if TYPE_CHECKING:
    import onnx

INPUT_NAME = "images"
OUTPUT_NAME = "scores"
OPSET = 17
CALIBRATION_RANGES = {"minmax": "MinMax", "percentile": "Percentile"}
_PREPROCESSED = "onnx.quant.pre_process"  # ONNX Runtime's mark; silences its advice to pre-process


def write_onnx(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path | str,
    *,
    batch: int | None = 1,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write `module` in eval mode as ONNX: "images" (batch, c, h, w) to "scores".

    The module itself is left as it is: a copy on the CPU is exported.

    Args:
        input_shape: (c, h, w) of one image.
        batch: images per run; None leaves it open.
        metadata: key-value pairs stored in the file.

    Raises:
        InputError: the module uses an operation that ONNX has no form for.
    """
    store_onnx(trace_onnx(module, input_shape, batch=batch), path, metadata=metadata)


def trace_onnx(
    module: nn.Module, input_shape: tuple[int, int, int], *, batch: int | None
) -> "onnx.ModelProto":
    """Return what `write_onnx` writes.

    Raises:
        InputError: the module uses an operation that ONNX has no form for.
    """
    module = copy.deepcopy(module).cpu().float().eval()
    if batch is None:
        model = _trace_any_batch(module, input_shape)
    else:
        model = _trace(module, (batch, *input_shape))
    _remove_identities_(model.graph)
    return model


def store_onnx(
    model: "onnx.ModelProto", path: Path | str, *, metadata: dict[str, str] | None = None
) -> None:
    """Write a checked model with its metadata."""
    import onnx

    onnx.helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    atomic_write(path, model.SerializeToString())


def compile_onnx(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    precision: str,
    batch: int | None,
    calibration: Iterable[np.ndarray],
) -> None:
    """Write `module` as ONNX at a precision, for the runtimes that read ONNX.

    Args:
        input_shape: (c, h, w) of one image.
        precision: fp32, or int8: static QDQ, per channel.
        batch: images per run; None leaves it open.
        calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges.
    """
    if precision == "fp32":
        write_onnx(module, input_shape, path, batch=batch)
        return
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        source = Path(folder) / "fp32.onnx"
        write_onnx(module, input_shape, source, batch=batch)
        quantize_onnx(source, path, calibration)


def _trace_any_batch(module: nn.Module, input_shape: tuple[int, int, int]) -> "onnx.ModelProto":
    """Trace with fixed shapes, so that shape arithmetic folds into constants, then free the batch.

    Two batch sizes that leave the same graph show that no constant in it depends on the batch;
    otherwise the exporter's own dynamic axes serve, with the arithmetic left in the graph.
    """
    traces = [_free_batch_(_trace(module, (batch, *input_shape))) for batch in (2, 3)]
    if traces[0].SerializeToString() == traces[1].SerializeToString():
        return traces[0]
    axes = {INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}}
    return _trace(module, (2, *input_shape), dynamic_axes=axes)


def _trace(module: nn.Module, shape: tuple[int, ...], **options: Any) -> "onnx.ModelProto":
    import onnx

    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # deprecation of this exporter; traced shapes
            torch.onnx.export(
                module,
                (torch.zeros(shape),),
                buffer,  # type: ignore[arg-type]  # a stream is taken by this exporter alone
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                **options,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(
            f"{type(module).__name__} has no ONNX form ({str(error).splitlines()[0]}); expected "
            f"operations of ONNX opset {OPSET}: replace that one in the block."
        ) from error
    return onnx.load_from_string(buffer.getvalue())


def _free_batch_(model: "onnx.ModelProto") -> "onnx.ModelProto":
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    return model


def _remove_identities_(graph: "onnx.GraphProto") -> None:
    """Give every consumer of a deduplicated weight a copy of its own; drop the other identities.

    The exporter lets equal weights share one initializer behind Identity nodes, for which the
    quantizer then finds no initializer.
    """
    weights = {weight.name: weight for weight in graph.initializer}
    source: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in weights:
            weight = copy.deepcopy(weights[node.input[0]])
            weight.name = node.output[0]
            graph.initializer.append(weight)
            weights[weight.name] = weight
        elif node.op_type == "Identity" and node.output[0] != OUTPUT_NAME:
            source[node.output[0]] = source.get(node.input[0], node.input[0])
        else:
            for position, name in enumerate(node.input):
                node.input[position] = source.get(name, name)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def quantize_onnx(
    source: Path | str,
    path: Path | str,
    calibration: Iterable[np.ndarray],
    *,
    per_channel: bool = True,
    ranges: str = "minmax",
    reduce_range: bool = False,
) -> None:
    """Write the static int8 (QDQ) form of an ONNX file: uint8 activations, int8 weights.

    Args:
        calibration: arrays (n, c, h, w) float32 of model input, from which the ranges of
            activations are read.
        per_channel: one weight scale per output channel instead of one per tensor.
        ranges: how observed values become a range: minmax, or percentile (99.999), which
            keeps every activation in memory.
        reduce_range: weights in 7 bits, for x86 CPUs without VNNI, whose sums saturate at 16 bits.

    Raises:
        InputError: unknown `ranges`.
        ValueError: `calibration` is empty.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    if ranges not in CALIBRATION_RANGES:
        raise unknown("calibration ranges", ranges, CALIBRATION_RANGES)
    model = onnx.load(source)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**metadata, _PREPROCESSED: "onnxruntime.quant"})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quantized = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            quantized,
            _reader(calibration),
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[CALIBRATION_RANGES[ranges]],
        )
        model = onnx.load(quantized)
    onnx.helper.set_model_props(model, metadata)
    atomic_write(path, model.SerializeToString())


def _reader(calibration: Iterable[np.ndarray]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        batch = None
        for batch in calibration:
            yield {INPUT_NAME: np.ascontiguousarray(batch, dtype=np.float32)}
        if batch is None:
            raise ValueError("No calibration images were given; expected at least one array.")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = feeds()

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    return Reader()
