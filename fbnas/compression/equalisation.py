"""Cross-layer weight equalisation of an ONNX graph or a network, before it is quantized.

Nagel et al. 2019 (arXiv 1906.04721), section 4.1: relu(s x) = s relu(x) for s > 0, so channel i of
a layer may be divided by s_i, and what the next layer does with it be multiplied by s_i, without a
change of the function. s_i = sqrt(r1_i / r2_i), with r_i = max |weight| of channel i, makes the
ranges of both layers' weights equal to sqrt(r1_i r2_i).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.latency.lowering import trace_onnx

if TYPE_CHECKING:
    import onnx

ROUNDS = 100  # over all pairs, "until convergence"
CONVERGED = 1e-3  # largest |log s| of a round
SCALED = ("Conv", "Gemm")
PASSING = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity")
MOVING = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # a channel shuffle, say


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but activations, poolings and moves of channels between them.

    `sources`: for every input channel of `second` the output channel of `first` that it is.
    """

    first: str
    second: str
    sources: np.ndarray


def equalise_(model: "onnx.ModelProto") -> tuple[Pair, ...]:
    """Equalise the weights of a graph in place, and return the pairs of layers that were.

    Pairs are visited in rounds until no scale changes any more. Left as they are: a channel whose
    weights are all zero in either layer, and layers whose weights others share.
    """
    import onnx

    graph = model.graph
    pairs = _pairs(model)
    nodes = {node.name: node for node in graph.node}
    stored = {weight.name: weight for weight in graph.initializer}
    used = {
        name for pair in pairs for x in (pair.first, pair.second) for name in nodes[x].input[1:]
    }
    arrays = {
        name: onnx.numpy_helper.to_array(stored[name]).astype(np.float64)
        for name in used
        if name in stored
    }
    for _ in range(ROUNDS if pairs else 0):
        moved = max(_equalise_pair_(nodes, arrays, pair) for pair in pairs)
        if moved < CONVERGED:
            break
    for name, array in arrays.items():
        stored[name].CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return pairs


def equalise_network_(
    network: nn.Module, input_shape: tuple[int, int, int]
) -> tuple[tuple[str, str], ...]:
    """Equalise a network whose batch normalisation is folded, in place; return pairs of layers.

    Layers are told by the names of their modules; the graph that is equalised is the network's own.

    Args:
        input_shape: (c, h, w) of one image.

    Raises:
        InputError: the network cannot be traced.
    """
    import onnx

    model = trace_onnx(network, input_shape, batch=1)
    pairs = equalise_(model)
    inputs = {node.name: list(node.input[1:]) for node in model.graph.node}
    changed = {name for pair in pairs for x in (pair.first, pair.second) for name in inputs[x]}
    parameters = dict(network.named_parameters())
    stored = {weight.name: weight for weight in model.graph.initializer}
    lost = sorted(changed - parameters.keys())
    if lost:
        raise InputError(
            f"equalise: {lost[0]} of the traced network is no parameter of it, so it cannot be "
            "changed there; expected equalise=false."
        )
    with torch.no_grad():
        for name in changed:
            found = onnx.numpy_helper.to_array(stored[name])
            parameters[name].copy_(torch.from_numpy(found.copy()))
    return tuple(
        (_module_of(inputs[pair.first]), _module_of(inputs[pair.second])) for pair in pairs
    )


def _module_of(names: list[str]) -> str:
    return names[0].removesuffix(".weight")


def _equalise_pair_(
    nodes: Mapping[str, "onnx.NodeProto"], arrays: dict[str, np.ndarray], pair: Pair
) -> float:
    """Scale a pair by s, and return the largest |log s|."""
    first, second = nodes[pair.first], nodes[pair.second]
    outputs = _by_output(first, arrays[first.input[1]])
    inputs = _by_input(second, arrays[second.input[1]])
    groups, _, inside, _ = inputs.shape
    r1 = np.abs(outputs).max(axis=1)
    r2 = np.zeros_like(r1)
    np.maximum.at(r2, pair.sources, np.abs(inputs).max(axis=(1, 3)).reshape(-1))
    alive = (r1 > 0) & (r2 > 0)
    scale = np.ones_like(r1)
    scale[alive] = np.sqrt(r1[alive] / r2[alive])
    outputs /= scale[:, None]
    inputs *= scale[pair.sources].reshape(groups, 1, inside, 1)
    for name in first.input[2:3]:
        arrays[name] /= scale
    return float(np.abs(np.log(scale)).max())


def _by_output(node: "onnx.NodeProto", weight: np.ndarray) -> np.ndarray:
    """Return a layer's weight as (output channels, all else); writing to it writes the weight."""
    if node.op_type == "Gemm" and not _attribute(node, "transB", 0):
        return weight.T
    return weight.reshape(len(weight), -1)


def _by_input(node: "onnx.NodeProto", weight: np.ndarray) -> np.ndarray:
    """Return a layer's weight as (groups, outputs and inputs of a group, kernel), likewise."""
    if node.op_type == "Gemm":
        return (weight if _attribute(node, "transB", 0) else weight.T)[None, :, :, None]
    groups = _attribute(node, "group", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def _attribute(node: "onnx.NodeProto", name: str, default: int) -> int:
    return next((int(x.i) for x in node.attribute if x.name == name), default)


def _pairs(model: "onnx.ModelProto") -> tuple[Pair, ...]:
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input)
    }
    stored = {weight.name: list(weight.dims) for weight in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for output in graph.output:
        readers.setdefault(output.name, []).append(onnx.NodeProto(op_type="output"))
    layers = [node for node in graph.node if _is_own(node, stored, readers)]
    own = {node.name for node in layers}
    found = []
    for first in layers:
        chain, second = _until_a_layer(first, readers)
        if second is None or second.name not in own:
            continue
        sources = _sources(model, _outputs(first, stored), shapes.get(first.output[0], []), chain)
        if sources is not None:
            found.append(Pair(first.name, second.name, sources))
    return tuple(found)


def _is_own(
    node: "onnx.NodeProto",
    stored: Mapping[str, list[int]],
    readers: Mapping[str, list["onnx.NodeProto"]],
) -> bool:
    """Whether a node is a layer whose weights are constant, and are no other node's."""
    held = node.input[1:]
    return (
        node.op_type in SCALED
        and len(held) > 0
        and all(name in stored and len(readers[name]) == 1 for name in held)
        and all(stored[name][-1:] == [_outputs(node, stored)] for name in held[1:])
        and not (node.op_type == "Gemm" and _attribute(node, "transA", 0))
    )


def _outputs(node: "onnx.NodeProto", stored: Mapping[str, list[int]]) -> int:
    transposed = node.op_type == "Gemm" and not _attribute(node, "transB", 0)
    return stored[node.input[1]][1 if transposed else 0]


def _until_a_layer(
    first: "onnx.NodeProto", readers: Mapping[str, list["onnx.NodeProto"]]
) -> tuple[list["onnx.NodeProto"], "onnx.NodeProto | None"]:
    """Return what alone follows a layer up to the next one, and that; None where there is none."""
    chain: list[onnx.NodeProto] = []
    node = first
    while True:
        after = readers.get(node.output[0], [])
        if len(after) != 1 or len(node.output) != 1 or after[0].input[:1] != node.output[:1]:
            return chain, None
        node = after[0]
        if node.op_type in SCALED:
            return chain, node
        if node.op_type not in (*PASSING, *MOVING):
            return chain, None
        chain.append(node)


def _sources(
    model: "onnx.ModelProto", channels: int, shape: list[int], chain: list["onnx.NodeProto"]
) -> np.ndarray | None:
    """Return which channel each input of the second layer is; None where they do not stay whole.

    Where channels are moved, numbers of channels are sent through the chain to see it.

    Args:
        shape: of the first layer's output, (n, channels, ...).
        chain: the nodes between the layers.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    if not any(node.op_type in MOVING for node in chain):
        return np.arange(channels)
    if len(shape) < 2 or 0 in shape[2:]:
        return None
    start, end = chain[0].input[0], chain[-1].output[0]
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    needed = {name for node in chain for name in node.input[1:]}
    part = onnx.helper.make_graph(
        [*(node for node in constants if node.output[0] in needed), *chain],
        "chain",
        [onnx.helper.make_tensor_value_info(start, onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None)],
        [weight for weight in model.graph.initializer if weight.name in needed],
    )
    numbers = np.arange(1.0, channels + 1, dtype=np.float32).reshape(1, -1, *[1] * len(shape[2:]))
    sent = np.ascontiguousarray(np.broadcast_to(numbers, (1, channels, *shape[2:])))
    chained = onnx.helper.make_model(part, opset_imports=model.opset_import)
    (arrived,) = ReferenceEvaluator(chained).run(None, {start: sent})
    arrived = np.asarray(arrived)
    apart = arrived.reshape(*arrived.shape[:2], -1)[0]
    if len(arrived) != 1 or not (apart == apart[:, :1]).all():
        return None
    return apart[:, 0].round().astype(np.int64) - 1
