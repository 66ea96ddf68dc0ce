"""One ONNX file for several heads of one backbone: an output for each."""

from pathlib import Path

import numpy as np

from fbnas.files import atomic_write
from fbnas.latency.lowering import OUTPUT_NAME
from fbnas.space.heads import Heads


def divide_scores(path: Path, heads: Heads) -> None:
    """Give a file an output (batch, classes) for each head, by its name, in the place of "scores".

    Where the network puts the heads' scores side by side at its end, that is undone; otherwise they
    are cut apart there.

    Args:
        path: of an ONNX file whose one output (batch, sum of classes) has the scores of all heads.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    (scores,) = graph.output
    (maker,) = (node for node in graph.node if OUTPUT_NAME in node.output)
    sizes = [len(class_names) for class_names in heads.values()]
    if maker.op_type == "Concat":
        makers = {node.output[0]: node for node in graph.node}
        for name, before in zip(heads, maker.input, strict=True):
            makers[before].output[0] = name
        graph.node.remove(maker)
    else:
        maker.output[0] = together = f"{OUTPUT_NAME}_of_all_heads"
        lengths = onnx.numpy_helper.from_array(np.array(sizes, np.int64), "classes_of_heads")
        graph.initializer.append(lengths)
        graph.node.append(
            onnx.helper.make_node("Split", [together, lengths.name], list(heads), axis=1)
        )
    for name, size in zip(heads, sizes, strict=True):
        output = graph.output.add()
        output.CopyFrom(scores)
        output.name = name
        output.type.tensor_type.shape.dim[1].dim_value = size
    graph.output.remove(scores)
    onnx.checker.check_model(model)
    atomic_write(path, model.SerializeToString())
