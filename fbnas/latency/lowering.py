"""From a module to a file that runtimes execute: ONNX, and its static int8 form.

torch.export needs 640 ms for one block, the TorchScript exporter 17 ms (torch 2.13, 2 x86 cores);
a profile exports some hundred blocks and torch is pinned exactly, so the latter is used.
"""

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fbnas.errors import InputError, check_known
from fbnas.files import atomic_write
from fbnas.latency.ranges import CALIBRATION_RANGES, PERCENTILE, activation_ranges, symmetric

if TYPE_CHECKING:
    import onnx

INPUT_NAME = "images"
OUTPUT_NAME = "scores"
OPSET = 17
OPSETS = range(13, 21)  # from the first with scales per channel, to the last of this exporter
SYMMETRIES = ("asymmetric", "symmetric")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FOLLOWING = (  # ONNX Runtime quantizes them where their input is
    *("Relu", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
    *("Slice", "Pad", "MaxPool", "AveragePool", "Constant"),
)
ROUNDINGS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Scheme:
    """How a graph becomes int8: weights of 8 bits, activations with ranges from calibration images.

    Args:
        per_channel: one weight scale per output channel instead of one per tensor.
        activations: asymmetric: a zero point of its own per tensor; symmetric: 128, in the middle
            of the levels, with 127 steps to max |x|, or 0 for what is never negative, as after a
            ReLU (Nagel et al. 2021, arXiv 2106.08295, section 2.2.1). Both are uint8.
        weights: symmetric: int8 about zero; asymmetric: with a zero point, one for a whole tensor.
        ranges: how observed values become a range: minmax, percentile or entropy.
        percentile: of the values that its range encloses.
        reduce_range: weights in 7 bits, for x86 CPUs without VNNI, whose sums saturate at 16 bits.

    Raises:
        InputError: an unknown name, or options that do not go together.
    """

    per_channel: bool = True
    activations: str = "asymmetric"
    weights: str = "symmetric"
    ranges: str = "minmax"
    percentile: float = PERCENTILE
    reduce_range: bool = False

    def __post_init__(self) -> None:
        check_known("calibration ranges", [self.ranges], CALIBRATION_RANGES)
        check_known("symmetry of activations:", [self.activations], SYMMETRIES)
        check_known("symmetry of weights:", [self.weights], SYMMETRIES)
        if self.per_channel and self.weights == "asymmetric":
            raise InputError(
                "weights are asymmetric per channel, which ONNX Runtime's convolutions do not "
                "compute; expected per_channel=false, or weights=symmetric."
            )
        if not 50 < self.percentile <= 100:
            raise InputError(
                f"percentile is {self.percentile:g}; expected above 50, to 100 at most: the part "
                "of the values that a range encloses."
            )


_PREPROCESSED = "onnx.quant.pre_process"  # ONNX Runtime's mark; silences its advice to pre-process


def write_onnx(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path | str,
    *,
    batch: int | None = 1,
    metadata: dict[str, str] | None = None,
    opset: int = OPSET,
) -> None:
    """Write `module` in eval mode as ONNX: "images" (batch, c, h, w) to "scores".

    The module itself is left as it is: a copy on the CPU is exported.

    Args:
        input_shape: (c, h, w) of one image.
        batch: images per run; None leaves it open.
        metadata: key-value pairs stored in the file.
        opset: version of ONNX's operators, one of OPSETS.

    Raises:
        InputError: another opset, or the module uses an operation that ONNX has no form for.
    """
    model = trace_onnx(module, input_shape, batch=batch, opset=opset)
    store_onnx(model, path, metadata=metadata)


def trace_onnx(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    *,
    batch: int | None,
    opset: int = OPSET,
) -> "onnx.ModelProto":
    """Return what `write_onnx` writes.

    Raises:
        InputError: another opset, or the module uses an operation that ONNX has no form for.
    """
    if opset not in OPSETS:
        raise InputError(f"opset={opset!r}; expected {OPSETS[0]} to {OPSETS[-1]}.")
    module = copy.deepcopy(module).cpu().float().eval()
    if batch is None:
        model = _trace_any_batch(module, input_shape, opset)
    else:
        model = _trace(module, (batch, *input_shape), opset)
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


def _trace_any_batch(
    module: nn.Module, input_shape: tuple[int, int, int], opset: int
) -> "onnx.ModelProto":
    """Trace with fixed shapes, so that shape arithmetic folds into constants, then free the batch.

    Two batch sizes that leave the same graph show that no constant in it depends on the batch;
    otherwise the exporter's own dynamic axes serve, with the arithmetic left in the graph.
    """
    traces = [_free_batch_(_trace(module, (batch, *input_shape), opset)) for batch in (2, 3)]
    if traces[0].SerializeToString() == traces[1].SerializeToString():
        return traces[0]
    axes = {INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}}
    return _trace(module, (2, *input_shape), opset, dynamic_axes=axes)


def _trace(
    module: nn.Module, shape: tuple[int, ...], opset: int, **options: Any
) -> "onnx.ModelProto":
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
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                **options,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(
            f"{type(module).__name__} has no ONNX form ({str(error).splitlines()[0]}); expected "
            f"operations of ONNX opset {opset}: replace that one in the block."
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
    scheme: Scheme | None = None,
    float_layers: Collection[str] = (),
) -> None:
    """Write the static int8 (QDQ) form of an ONNX file.

    Args:
        calibration: arrays (n, c, h, w) float32 of model input, from which the ranges of
            activations are read.
        scheme: how; the default one where not given.
        float_layers: as of `quantize_graph`.

    Raises:
        ValueError: `calibration` is empty.
    """
    import onnx

    scheme = scheme or Scheme()
    model = onnx.load(source)
    ranges = activation_ranges(
        model, calibration, ranges=scheme.ranges, percentile=scheme.percentile
    )
    graph = quantize_graph(model, ranges, scheme, float_layers=float_layers)
    atomic_write(path, graph.SerializeToString())


def quantize_graph(
    model: "onnx.ModelProto",
    ranges: Mapping[str, tuple[float, float]],
    scheme: Scheme,
    *,
    float_layers: Collection[str] = (),
) -> "onnx.ModelProto":
    """Return the int8 (QDQ) form of a graph, which is left as it is; metadata are carried over.

    Args:
        ranges: as of `activation_ranges`.
        float_layers: names of layers, as of `layer_names`, that go on computing in float; where
            these are all, so does the rest.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    if float_layers and set(layer_names(model.graph)) <= set(float_layers):
        return model
    left_out = [*float_layers, *_between_float(model.graph, frozenset(float_layers))]
    found = {
        name: tuple(
            map(np.float32, symmetric(*seen) if scheme.activations == "symmetric" else seen)
        )
        for name, seen in ranges.items()
    }
    quantizer = QDQQuantizer(
        onnx.shape_inference.infer_shapes(model),
        scheme.per_channel,
        scheme.reduce_range,
        QuantType.QInt8,
        QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, found),
        [],
        left_out,
        sorted({*QLinearOpsRegistry, *QDQRegistry}),
        {"WeightSymmetric": scheme.weights == "symmetric"},
    )
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(quantized, metadata)
    return quantized


def layer_names(graph: "onnx.GraphProto") -> tuple[str, ...]:
    """Return the names of the nodes with weights, in order: convolutions and linear layers."""
    weights = {weight.name for weight in graph.initializer}
    return tuple(
        node.name
        for node in graph.node
        if node.op_type in LAYERS and any(name in weights for name in node.input[1:2])
    )


def float_nodes(graph: "onnx.GraphProto", float_layers: Collection[str]) -> frozenset[str]:
    """Return the names of all nodes that compute in float where these layers do.

    Args:
        graph: sorted; it may have roundings (QuantizeLinear, DequantizeLinear) already.
    """
    layers = set(layer_names(graph))
    found = {*float_layers, *_between_float(graph, frozenset(float_layers))}
    makers = {name: node.name for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in (*FOLLOWING, *ROUNDINGS) and node.name not in layers and node.input:
            maker = makers.get(node.input[0])
            if maker is None or maker in found:
                found.add(node.name)
    return frozenset(found)


def _between_float(graph: "onnx.GraphProto", float_layers: frozenset[str]) -> list[str]:
    """Return the names of sums, poolings and the like that are to compute in float too.

    They are those for which more than half of the layers around them, through other operations,
    do: every change of precision costs time. Activations and moves follow what is before them.
    """
    if not float_layers:
        return []
    layers = set(layer_names(graph))
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        if node.name in layers or node.op_type in (*FOLLOWING, *ROUNDINGS):
            continue
        before = _nearest(node, layers, lambda x: [makers[i] for i in x.input if i in makers])
        after = _nearest(node, layers, lambda x: [r for o in x.output for r in readers.get(o, [])])
        around = before | after
        if around and 2 * len(around & float_layers) > len(around):
            found.append(node.name)
    return found


def _nearest(
    start: "onnx.NodeProto",
    layers: Collection[str],
    neighbours: "Callable[[onnx.NodeProto], list[onnx.NodeProto]]",
) -> set[str]:
    found: set[str] = set()
    seen, waiting = {start.name}, [start]
    while waiting:
        for node in neighbours(waiting.pop()):
            if node.name in layers:
                found.add(node.name)
            elif node.name not in seen:
                seen.add(node.name)
                waiting.append(node)
    return found
