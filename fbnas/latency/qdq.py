"""An int8 ONNX file (QDQ form) with exactly the grids that a network was trained on.

The trace of a network with rounded activations holds QuantizeLinear and DequantizeLinear for them.
What is left to do is what ONNX Runtime's quantizer does too: weights in int8, biases in int32, and
a rounding behind every operator that only moves values, so that integer kernels fit together.
Weights of fewer bits are whole numbers of that few bits in int8 tensors, which run everywhere.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fbnas.latency.fake_quantization import QuantizedForm
from fbnas.latency.lowering import FOLLOWING, ROUNDINGS, float_nodes

if TYPE_CHECKING:
    import onnx

MOVING = ("Reshape", "Transpose", "Flatten", "MaxPool", "Squeeze", "Unsqueeze", "DepthToSpace")
OUT_AXIS = {"Conv": 0, "Gemm": 0, "MatMul": 1}  # of the weights; Gemm's are as torch's, transposed
OFF_GRID = 1e-2  # of a step: what is further from it is no weight of the form, and stays fp32
BIAS_STEPS = 2.0**30  # that a bias may take, of the 2^31 that int32 has


def with_int8_weights(
    traced: "onnx.ModelProto", form: QuantizedForm, float_layers: Collection[str] = ()
) -> "onnx.ModelProto":
    """Return the int8 form of a traced `as_deployed` network: uint8 activations, int8 weights.

    The trace is left as it is.

    Args:
        float_layers: names of layers, as of `layer_names`, that compute in float: their weights
            stay what they are, and what float makes is not rounded where all that reads it
            computes in float.
    """
    model = copy.deepcopy(traced)
    in_float = float_nodes(model.graph, float_layers) if float_layers else frozenset[str]()
    _Lowering(model.graph, form, in_float).run()
    return model


@dataclass
class _Lowering:
    """A graph that is written anew, node by node.

    in_float: names of the nodes that compute in float.
    grids: of each dequantized tensor, the names of its scale and zero point and the scale.
    values: of all constant tensors. stored: names of the tensors of an activation's grid.
    makers, readers: of each tensor. renamed: tensors whose rounding is gone, to what they are now.
    """

    graph: "onnx.GraphProto"
    form: QuantizedForm
    in_float: frozenset[str] = frozenset()
    grids: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    nodes: list["onnx.NodeProto"] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    stored: dict[tuple[float, int], tuple[str, str]] = field(default_factory=dict)
    makers: dict[str, "onnx.NodeProto"] = field(default_factory=dict)
    readers: dict[str, list["onnx.NodeProto"]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        self.values = _constants(self.graph)
        rounded = {n.input[0] for n in self.graph.node if n.op_type == "QuantizeLinear"}
        outputs = {output.name for output in self.graph.output}
        for node in self.graph.node:
            self.makers |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        for node in self.graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = self.renamed.get(name, name)
            if self._is_idle(node):
                self._leave_out(node, outputs)
                continue
            self.nodes.append(node)
            if node.op_type == "QuantizeLinear":
                self._name_grid(node)
            elif node.op_type == "DequantizeLinear":
                scale, zero = self._name_grid(node)
                self.grids[node.output[0]] = (scale, zero, float(self.values[scale]))
            elif node.op_type in MOVING and node.input[0] in self.grids:
                if not {node.output[0]} & (rounded | outputs):
                    self._round_moved(node)
            elif node.op_type in OUT_AXIS and node.name not in self.in_float:
                self._lower_weights(node)
        self._keep_what_is_used()

    def _is_idle(self, node: "onnx.NodeProto") -> bool:
        """Whether a node is part of a rounding of what float made for float."""
        if node.op_type not in ROUNDINGS or node.name not in self.in_float:
            return False
        if node.op_type == "DequantizeLinear":  # as what is before it
            maker = self.makers.get(node.input[0])
            return maker is None or maker.op_type != "QuantizeLinear"
        return all(self._reads_in_float(reader) for reader in self._readers(node))

    def _reads_in_float(self, node: "onnx.NodeProto") -> bool:
        if node.op_type not in (*FOLLOWING, *ROUNDINGS):
            return node.name in self.in_float
        return all(self._reads_in_float(reader) for reader in self._readers(node))

    def _readers(self, node: "onnx.NodeProto") -> list["onnx.NodeProto"]:
        return [reader for name in node.output for reader in self.readers.get(name, [])]

    def _leave_out(self, node: "onnx.NodeProto", outputs: set[str]) -> None:
        """Let what reads a node's output read its input; an output of the graph keeps its name."""
        before, after = node.input[0], node.output[0]
        if after in outputs:
            maker = self.makers[before]
            maker.output[list(maker.output).index(before)] = after
            self.renamed[before] = after
        else:
            self.renamed[after] = before

    def _name_grid(self, node: "onnx.NodeProto") -> tuple[str, str]:
        """Give a node its scale and zero point as tensors of the file."""
        scale = np.array(self.values[node.input[1]], np.float32)
        zero = np.array(self.values[node.input[2]], np.uint8)
        key = (float(scale), int(zero))
        if key not in self.stored:
            number = len(self.stored)
            self.stored[key] = (
                self._store(f"scale_{number}", scale),
                self._store(f"zero_point_{number}", zero),
            )
        node.input[1], node.input[2] = self.stored[key]
        return self.stored[key]

    def _round_moved(self, node: "onnx.NodeProto") -> None:
        import onnx

        scale, zero, step = self.grids[node.input[0]]
        name = node.output[0]
        node.output[0] = f"{name}_moved"
        self.nodes += [
            onnx.helper.make_node(
                "QuantizeLinear", [f"{name}_moved", scale, zero], [f"{name}_int8"]
            ),
            onnx.helper.make_node("DequantizeLinear", [f"{name}_int8", scale, zero], [name]),
        ]
        self.grids[name] = (scale, zero, step)

    def _lower_weights(self, node: "onnx.NodeProto") -> None:
        """Store a layer's weights in int8 and, where its input is rounded, its bias in int32."""
        weight, axis = self.values.get(node.input[1]), OUT_AXIS[node.op_type]
        as_torch = node.op_type != "Gemm" or any(a.name == "transB" and a.i for a in node.attribute)
        if weight is None or weight.ndim not in (2, 4) or not as_torch:
            return
        rows = np.moveaxis(weight, axis, 0)
        scale, zero = self._grid(rows)
        if np.abs(rows / scale - (rows / scale).round()).max() > OFF_GRID:
            return
        bias = self.values.get(node.input[2]) if len(node.input) > 2 else None
        step = self.grids[node.input[0]][2] if node.input[0] in self.grids else None
        if bias is not None and step is not None:
            least = np.abs(bias) / (step * BIAS_STEPS)
            if zero:  # no kernel takes it with a step for every channel
                scale = np.maximum(scale, np.float32(least.max()))
            else:
                scale = _wide_enough(scale, rows, least)
            steps = (step * scale.flatten()).astype(np.float32)
            whole = (bias / steps).round().astype(np.int32)
            self._put_dequantized(node, 2, whole, steps, axis=0)
        whole = np.moveaxis(((rows / scale).round() + zero).astype(np.int8), 0, axis)
        steps = scale.flatten()
        self._put_dequantized(node, 1, whole, steps[0] if zero else steps, axis=axis, zero=zero)

    def _grid(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the step of each output channel's grid, (out, 1, ...), and the zero point."""
        scale, zero = self.form.grids.of(torch.from_numpy(rows.copy()))
        wide = scale.reshape(-1, *[1] * (rows.ndim - 1)).expand(len(rows), *[1] * (rows.ndim - 1))
        found: np.ndarray = wide.numpy().astype(np.float32)
        return found, int(zero) if zero.ndim == 0 else 0

    def _put_dequantized(
        self,
        node: "onnx.NodeProto",
        place: int,
        whole: np.ndarray,
        steps: np.ndarray,
        *,
        axis: int,
        zero: int = 0,
    ) -> None:
        """Replace a constant input by whole numbers and the node that gives them their steps.

        Args:
            steps: one for every place along the axis, or () for all.
        """
        import onnx

        name = node.input[place]
        names = [
            self._store(f"{name}_quantized", whole),
            self._store(f"{name}_scale", steps),
            self._store(f"{name}_zero_point", np.full(steps.shape, zero, whole.dtype)),
        ]
        output = f"{name}_dequantized"
        along = axis if steps.ndim else None
        made = onnx.helper.make_node("DequantizeLinear", names, [output], axis=along)
        self.nodes.insert(len(self.nodes) - 1, made)
        node.input[place] = output

    def _store(self, name: str, value: np.ndarray) -> str:
        """Keep a tensor in the file under a name that is free; return the name."""
        import onnx

        while name in self.values:
            name += "_"
        self.values[name] = value
        self.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    def _keep_what_is_used(self) -> None:
        """Write the nodes and the tensors that the output depends on."""
        wanted, kept = {output.name for output in self.graph.output}, []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                kept.append(node)
        tensors = [tensor for tensor in self.graph.initializer if tensor.name in wanted]
        for holder in (self.graph.node, self.graph.initializer, self.graph.value_info):
            del holder[:]
        self.graph.node.extend(reversed(kept))
        self.graph.initializer.extend(tensors)


def _wide_enough(scale: np.ndarray, rows: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Widen the steps of channels whose bias int32 could not hold; zero weights take any step."""
    over = tuple(range(1, rows.ndim))
    needed = np.where(rows.any(axis=over), scale.flatten(), 0)
    wide = np.maximum(needed, least).astype(np.float32)
    return np.where(wide > 0, wide, 1).astype(np.float32).reshape(scale.shape)


def _constants(graph: "onnx.GraphProto") -> dict[str, np.ndarray]:
    """Return every tensor of a graph that is constant: stored, made by a node, or cast from one."""
    import onnx

    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        stated: dict[str, Any] = {
            a.name: onnx.helper.get_attribute_value(a) for a in node.attribute
        }
        if node.op_type == "Constant" and "value" in stated:
            values[node.output[0]] = onnx.numpy_helper.to_array(stated["value"])
        elif node.op_type == "Cast" and node.input[0] in values:
            kind = onnx.helper.tensor_dtype_to_np_dtype(stated["to"])
            values[node.output[0]] = values[node.input[0]].astype(kind)
    return values
