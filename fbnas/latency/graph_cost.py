"""What an ONNX graph costs without running it: multiply-adds, bytes moved, peak memory.

Counted as a runtime executes it: normalisations and activations are part of the convolution before
them, reshapes are free, quantization is a matter of element size.
"""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fbnas.errors import InputError

if TYPE_CHECKING:
    import onnx

MATRIX_OPERATORS = ("Conv", "Gemm", "MatMul")
FUSED = ("Relu", "Clip", "LeakyRelu", "HardSwish", "BatchNormalization")  # into the one before
FREE = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "Dropout")  # no work
NOTHING = ("Constant", "Shape", "ConstantOfShape")
BIAS_BYTES = 4  # int8 keeps its biases in 32 bits


@dataclass(frozen=True)
class Operator:
    """One step of a runtime: `bytes` of what it reads, weights included, and writes."""

    name: str
    op_type: str
    macs: int
    bytes: int


@dataclass(frozen=True)
class GraphCost:
    """A run of a graph on one image.

    `params`: numbers among its weights; `weight_bytes`: their size. `peak_bytes`: the most
    activations alive at once, the input and the output of the running operator included.
    `quantized`: whether it computes in int8.
    """

    operators: tuple[Operator, ...]
    params: int
    weight_bytes: int
    peak_bytes: int
    quantized: bool = False

    @property
    def macs(self) -> int:
        return sum(operator.macs for operator in self.operators)

    @property
    def bytes(self) -> int:
        return sum(operator.bytes for operator in self.operators)


def module_cost(
    module: nn.Module, input_shape: tuple[int, int, int], precision: str = "fp32"
) -> GraphCost:
    """Return the cost of a module on one image; int8 as its quantized form has it.

    Args:
        input_shape: (c, h, w).
        precision: fp32 or int8.

    Raises:
        InputError: the module uses an operation that ONNX has no form for.
    """
    from fbnas.latency.lowering import write_onnx

    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        path = Path(folder) / "module.onnx"
        write_onnx(module, input_shape, path)
        return graph_cost(path, element_bytes=1 if precision == "int8" else None)


def graph_cost(path: Path | str, *, element_bytes: int | None = None) -> GraphCost:
    """Return the cost of an ONNX file, fp32 or QDQ, for one image.

    Args:
        element_bytes: of activations and weights, where it is not to be the file's own.

    Raises:
        InputError: no such file, not an ONNX file, or shapes that cannot be inferred.
    """
    import onnx

    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such model file") from None
    except Exception as error:  # protobuf's and onnx's own
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: not a whole ONNX file ({reason}); expected one of fbnas"
        ) from None
    return _Graph(model.graph, element_bytes, str(path)).cost()


class _Graph:
    """The graph's tensors by the name of the one that a runtime would hold in their place."""

    def __init__(self, graph: "onnx.GraphProto", element_bytes: int | None, name: str) -> None:
        import onnx

        self.graph, self.element_bytes, self.name = graph, element_bytes, name
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.shapes = {
            value.name: [side.dim_value or 1 for side in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self.sizes = {
            value.name: onnx.helper.tensor_dtype_to_np_dtype(
                value.type.tensor_type.elem_type
            ).itemsize
            for value in (*graph.input, *graph.value_info, *graph.output)
        }
        readers = [name for node in graph.node for name in node.input]
        self.alone = {name for name in readers if readers.count(name) == 1}
        self.held: dict[str, str] = {}
        self.makers: dict[str, str] = {}
        self.steps = [node for node in graph.node if self._is_step(node)]

    def _is_step(self, node: "onnx.NodeProto") -> bool:
        """Whether a node is work of its own; else its output is held as another tensor."""
        source = self._held(node.input[0]) if node.input else ""
        if node.op_type in NOTHING:
            return False
        fused = node.op_type in FUSED and self.makers.get(source) in MATRIX_OPERATORS
        free = node.op_type in (*FREE, "QuantizeLinear", "DequantizeLinear")
        if not free and not (fused and node.input[0] in self.alone):
            self.makers[node.output[0]] = node.op_type
            return True
        if node.op_type == "QuantizeLinear":
            self.sizes[source] = 1
        self.held[node.output[0]] = source
        return False

    def _held(self, name: str) -> str:
        return self.held.get(name, name)

    def cost(self) -> GraphCost:
        operators = []
        last = {self._held(value.name): len(self.steps) for value in self.graph.output}
        born = {self._held(value.name): 0 for value in self.graph.input}
        used: dict[str, int] = {}
        for index, node in enumerate(self.steps):
            inputs = list(dict.fromkeys(self._held(name) for name in node.input if name))
            output = node.output[0]
            born[output] = index
            for position, name in enumerate(inputs):
                if name in self.weights:
                    used[name] = self._weight_bytes(name, bias=position == 2)
                else:
                    last[name] = max(last.get(name, 0), index)
            moved = sum(used.get(name) or self._bytes(name) for name in inputs)
            operators.append(
                Operator(node.name, node.op_type, self._macs(node), moved + self._bytes(output))
            )
        alive = [
            sum(self._bytes(name) for name in born if born[name] <= i <= last.get(name, born[name]))
            for i in range(len(self.steps))
        ]
        return GraphCost(
            tuple(operators),
            sum(math.prod(self.weights[name].dims) for name in used),
            sum(used.values()),
            max(alive, default=sum(self._bytes(name) for name in born)),
            self.element_bytes == 1 or any(n.op_type == "QuantizeLinear" for n in self.graph.node),
        )

    def _bytes(self, name: str) -> int:
        if name not in self.shapes:
            raise InputError(
                f"{self.name}: the shape of {name} cannot be inferred; expected a graph of fixed "
                "shapes but for the batch"
            )
        return math.prod(self.shapes[name]) * (self.element_bytes or self.sizes[name])

    def _weight_bytes(self, name: str, *, bias: bool) -> int:
        import onnx

        tensor = self.weights[name]
        own = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = own if self.element_bytes is None else BIAS_BYTES if bias else self.element_bytes
        return math.prod(tensor.dims) * size

    def _macs(self, node: "onnx.NodeProto") -> int:
        """Multiply-adds: for every output value, as many as weights meet in it."""
        if node.op_type not in MATRIX_OPERATORS:
            return 0
        weight = self._held(node.input[1])
        dims = list(self.weights[weight].dims) if weight in self.weights else self.shapes[weight]
        outputs = math.prod(self.shapes[node.output[0]])
        if node.op_type == "Conv":
            return outputs * math.prod(dims[1:])
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        return outputs * (dims[-1] if transposed else dims[-2])
