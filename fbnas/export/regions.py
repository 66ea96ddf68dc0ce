"""A network whose first part is computed where the image changed, and nowhere else.

A feature of the first layers is made of the pixels around it. Where these are those of the frame
before, it is kept; around what changed it is computed anew, exactly: from a crop so much wider that
no feature that is kept of it has seen the crop's edge.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fbnas.errors import InputError
from fbnas.latency.graph_cost import FUSED, graph_cost
from fbnas.latency.session import open_session, scores

if TYPE_CHECKING:
    import onnx

BROADCAST = ("Add", "Sub", "Mul", "Div", "Min", "Max")
POINTWISE = (*FUSED, *BROADCAST, "QuantizeLinear", "DequantizeLinear", "Round", "Sigmoid",
             "HardSigmoid", "Identity")  # fmt: skip

Prepare = Callable[[np.ndarray], np.ndarray]  # (h, w, c) uint8 to (1, c, h, w) float32


class Box(NamedTuple):
    """Pixels or features: rows top to bottom, columns left to right; the latter are outside."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


class Reach(NamedTuple):
    """What feature i of a side sees: pixels i * stride - radius to i * stride + radius."""

    stride: int
    radius: int

    def window(self, start: int, stop: int, side: int) -> tuple[int, int, int, int]:
        """Return which features of a side may see pixels start to stop, and from which pixels.

        Returns:
            First and last + 1 of the features, at least one, then of the pixels, which begin at a
            multiple of the stride.
        """
        last = min(-(-side // self.stride), (stop - 1 + self.radius) // self.stride + 1)
        first = min(last - 1, max(0, -((self.radius - start) // self.stride)))
        begin = max(0, first - -(-self.radius // self.stride)) * self.stride
        return first, last, begin, min(side, (last - 1) * self.stride + self.radius + 1)


@dataclass(frozen=True)
class Halves:
    """A file's two parts, one after the other.

    share: of the multiply-adds, those of the first part, 0 to 1. tensor: what the first gives the
    second, as the file names it. reach: of its features.
    """

    first: Path
    second: Path
    share: float
    tensor: str
    reach: Reach


class Regions:
    """Computes scores of a changing frame, its features only where it changed.

    Args:
        path: an ONNX file, fp32 or QDQ.
        at: the fraction of its multiply-adds that should be the first part's. More of it saves more
            where a change is small; but the later a feature, the more pixels it sees, and the more
            features a change reaches. It is cut at the nearest place where that can be done.
        threads: of the runtime; None for all cores.

    Raises:
        InputError: a fraction out of its range, no ONNX file, or one that cannot be cut.
    """

    def __init__(self, path: Path | str, *, at: float = 0.4, threads: int | None = 1) -> None:
        with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
            halves = split(path, folder, at=at)
            self.first = open_session(halves.first, threads=threads)
            self.second = open_session(halves.second, threads=threads)
        self.share, self.reach = halves.share, halves.reach
        self.inputs = self.first.get_inputs()[0].name, self.second.get_inputs()[0].name
        self.features: np.ndarray | None = None

    def __call__(
        self, frame: np.ndarray, changed: Box | None, prepare: Prepare
    ) -> tuple[np.ndarray, float]:
        """Return the scores of a frame, and the fraction of the network's work that they took.

        Args:
            frame: (h, w, c) uint8, which outside of `changed` is that of the call before.
            changed: its pixels that may differ; None, as at first, for all.
            prepare: makes of a frame, or a part of one, what the network takes.

        Returns:
            (1, classes), of all heads; 0 to 1.
        """
        rows, columns = frame.shape[:2]
        if changed is None or self.features is None:
            self.features = self._first(prepare(frame))
            part = 1.0
        else:
            top, bottom, above, below = self.reach.window(changed.top, changed.bottom, rows)
            left, right, before, behind = self.reach.window(changed.left, changed.right, columns)
            seen, kept = Box(above, below, before, behind), Box(top, bottom, left, right)
            found = self._first(prepare(frame[seen.slices]))
            y, x = above // self.reach.stride, before // self.reach.stride
            inner = Box(top - y, bottom - y, left - x, right - x)
            self.features[(..., *kept.slices)] = found[(..., *inner.slices)]
            part = seen.area / (rows * columns)
        answer = scores(self.second, {self.inputs[1]: self.features})
        return answer, 1 - self.share * (1 - part)

    def _first(self, images: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.first.run(None, {self.inputs[0]: images})[0]
        return found


def split(path: Path | str, folder: Path | str, *, at: float) -> Halves:
    """Write the two parts of a file, fp32 or QDQ, into a folder: first.onnx and second.onnx.

    It is cut where one tensor holds all that is known of the image, not within a residual block;
    that of a quantized layer in its quantized form. The first part takes images of any size.

    Args:
        at: see `Regions`.

    Raises:
        InputError: see `Regions`.
    """
    import onnx

    if not 0 < at < 1:
        raise InputError(f"at is {at}; expected a fraction of the multiply-adds, between 0 and 1.")
    macs = {step.name: step.macs for step in graph_cost(path).operators}
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    total = sum(macs.values())
    cuts = [cut for cut in _cuts(model.graph, macs) if 0 < cut[0] < total]
    if not cuts:
        raise InputError(
            f"{path} has no place to cut; expected a network that begins with convolutions, and "
            "between them what looks at each feature alone."
        )
    done, tensor, reach = min(reversed(cuts), key=lambda cut: abs(cut[0] / total - at))
    images, outputs = ([value.name for value in x] for x in (model.graph.input, model.graph.output))
    extractor = onnx.utils.Extractor(model)
    files = Path(folder) / "first.onnx", Path(folder) / "second.onnx"
    for file, given, wanted in zip(files, (images, [tensor]), ([tensor], outputs), strict=True):
        part = extractor.extract_model(given, wanted)
        part.metadata_props.extend(model.metadata_props)
        if file == files[0]:
            _take_any_size(part.graph)
        onnx.save(part, str(file))
    return Halves(*files, done / total, tensor, reach)


def _take_any_size(graph: "onnx.GraphProto") -> None:
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for axis in (2, 3):
            value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_{axis}"


def _cuts(graph: "onnx.GraphProto", macs: dict[str, int]) -> Iterator[tuple[int, str, Reach]]:
    """Yield tensors that alone hold what is known, with the multiply-adds up to them."""
    last = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    readers = {name: node.op_type for node in graph.node for name in node.input}
    uneven = _uneven(graph)
    reaches, done = {value.name: Reach(1, 0) for value in graph.input}, 0
    for place, node in enumerate(graph.node):
        done += macs.get(node.name, 0)
        given = [reaches[name] for name in node.input if name in reaches]
        if not given:
            continue
        reach = _reach(node, given)
        placed = uneven.intersection(node.input).difference(reaches)
        if reach is None or (node.op_type in BROADCAST and placed):
            return
        reaches |= dict.fromkeys(node.output, reach)
        alive = [name for name in reaches if last.get(name, -1) > place]
        if len(alive) != 1 or alive[0] not in node.output or node.op_type == "DequantizeLinear":
            continue
        if readers.get(alive[0]) not in (*FUSED, "QuantizeLinear"):
            yield done, alive[0], reach


def _uneven(graph: "onnx.GraphProto") -> set[str]:
    """Return the tensors that may differ from place to place."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    shapes |= {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    return {name for name, shape in shapes.items() if any(side != 1 for side in shape[-2:])}


def _reach(node: "onnx.NodeProto", given: list[Reach]) -> Reach | None:
    """Return what the features of a node see, given those it reads; None where that is all."""
    import onnx

    strides = {reach.stride for reach in given}
    stride, radius = given[0].stride, max(reach.radius for reach in given)
    if len(strides) > 1:
        return None
    if node.op_type in POINTWISE:
        return Reach(stride, radius)
    if node.op_type != "Conv":
        return None
    stated = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    kernel, steps = stated["kernel_shape"], stated.get("strides", [1, 1])
    pads, spread = stated.get("pads", [0] * 4), stated.get("dilations", [1, 1])
    if len(kernel) != 2 or steps[0] != steps[1] or stated.get("auto_pad", b"NOTSET") != b"NOTSET":
        return None
    widths = [(side - 1) * wide for side, wide in zip(kernel, spread, strict=True)]
    if any(pads[axis] + pads[axis + 2] > widths[axis] for axis in (0, 1)):
        return None  # more features than pixels
    return Reach(stride * steps[0], radius + max(*pads, max(widths) - min(pads)) * stride)
