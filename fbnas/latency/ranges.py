"""The ranges of a network's activations, from what calibration images make of them.

ONNX Runtime's own entropy calibration compares 128 bins with 128 levels, and so always keeps the
whole range (1.31); its histograms keep every activation in memory. Here images are seen twice, once
for the extremes and once for the counts.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fbnas.errors import unknown

if TYPE_CHECKING:
    import onnx

CALIBRATION_RANGES = ("minmax", "percentile", "entropy")
PERCENTILE = 99.99  # of the values that are kept
BINS = 2048  # of a histogram, as in NVIDIA's calibrators
LEVELS = 128  # of int8 on either side of zero; Migacz 2017, "8-bit Inference with TensorRT"
SMOOTH = 1e-4  # of a distribution, as in MXNet's and ONNX Runtime's calibration
STRIDE = 8  # bins between two thresholds that are compared

Range = tuple[float, float]
Key = TypeVar("Key", bound=Hashable)
Watch = Callable[[np.ndarray], Mapping[Key, np.ndarray]]


def activation_ranges(
    model: "onnx.ModelProto",
    calibration: Iterable[np.ndarray],
    *,
    ranges: str = "minmax",
    percentile: float = PERCENTILE,
) -> dict[str, Range]:
    """Return (lowest, highest) of every float tensor between operations, the input included.

    Args, Raises: as of `watched_ranges`.
    """
    shown = [np.ascontiguousarray(batch, dtype=np.float32) for batch in calibration]
    return watched_ranges(_watch(model), shown, ranges=ranges, percentile=percentile)


def watched_ranges(
    watch: Watch[Key],
    shown: Sequence[np.ndarray],
    *,
    ranges: str = "minmax",
    percentile: float = PERCENTILE,
) -> dict[Key, Range]:
    """Return (lowest, highest) of all that `watch` tells of batches of images, by its key.

    minmax: what was seen. percentile: what encloses that part of the values, as much cut off below
    as above. entropy: [-T, T] within what was seen, T as `entropy_bins` chooses it of |values|.

    Args:
        shown: arrays (n, c, h, w) float32 of model input.
        percentile: of the values kept, above 50 to 100.

    Raises:
        InputError: unknown `ranges`.
        ValueError: nothing is shown.
    """
    if ranges not in CALIBRATION_RANGES:
        raise unknown("calibration ranges", ranges, CALIBRATION_RANGES)
    if not shown:
        raise ValueError("No calibration images were given; expected at least one array.")
    seen = _extremes(watch, shown)
    if ranges == "minmax":
        return seen
    if ranges == "percentile":
        counts = _counts(watch, shown, seen)
        return {name: _within(counts[name], seen[name], (100 - percentile) / 200) for name in seen}
    reach = {name: (0.0, max(abs(low), abs(high))) for name, (low, high) in seen.items()}
    counts = _counts(lambda images: {k: np.abs(v) for k, v in watch(images).items()}, shown, reach)
    return {name: _entropy_range(counts[name], seen[name]) for name in seen}


def entropy_bins(counts: np.ndarray, levels: int) -> int:
    """Return how many of the first bins to keep: the i with the least KL(P_i || Q_i).

    P_i: the first i counts, with all that lies beyond added to the last. Q_i: the first i counts
    merged into `levels` levels, each spread again evenly over those of its bins that hold anything;
    its last bin holds `SMOOTH` of all where it would be empty, so that outliers can be cut off.
    Source: Migacz 2017 (GTC S7310), "8-bit Inference with TensorRT"; bin 0, which holds the zeros
    of a ReLU, counts as much as bin 1, as in NVIDIA's pytorch-quantization: zero costs nothing.

    Args:
        counts: (bins,), of absolute values, bins of equal width from 0.
    """
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    total, bins = counts.sum(), len(counts)
    if total == 0 or bins <= levels:
        return bins
    kept = np.arange(bins, levels - 1, -STRIDE)  # every i, the whole range first
    edges = -(-np.arange(levels + 1) * kept[:, None] // levels)  # (i, levels + 1)
    sums = np.diff(_until(counts)[edges])
    means = sums / np.maximum(np.diff(_until(counts > 0)[edges]), 1)
    inside = _until(counts)[kept]
    beyond, last = total - inside, counts[kept - 1]
    of_p = _until(_x_log(counts, counts))[kept - 1] + _x_log(last + beyond, last + beyond)
    of_last = np.where(last > 0, means[:, -1], SMOOTH * inside)
    some = inside > 0
    divergence = np.full(len(kept), np.inf)
    of_q = _x_log(sums, means).sum(axis=1)[some] + _x_log(beyond[some], of_last[some])
    divergence[some] = (of_p[some] - of_q) / total + np.log(inside[some] / total)
    return int(kept[np.argmin(divergence)])


def _until(values: np.ndarray) -> np.ndarray:
    """Return the sum of the first i values at i, from 0 to all."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _x_log(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return x log y, 0 where x is."""
    return x * np.log(np.where(x > 0, y, 1.0))


def _watch(model: "onnx.ModelProto") -> Watch[str]:
    """Return what runs the model on (n, c, h, w) and tells every float tensor by name."""
    import onnx
    import onnxruntime

    model = onnx.shape_inference.infer_shapes(model)
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    floats = [
        value
        for value in model.graph.value_info
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and value.name not in given
    ]
    model.graph.output.extend(floats)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    taken = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]

    def watch(images: np.ndarray) -> dict[str, np.ndarray]:
        return {taken: images, **dict(zip(names, session.run(names, {taken: images}), strict=True))}

    return watch


def symmetric(low: float, high: float) -> Range:
    """Widen a range until its zero point is 128, or 0 where nothing is negative.

    256 levels have no middle: of -reach to reach, the zero point would be 127.5, which a float
    rounds to 127 or 128 by chance.
    """
    reach = max(abs(low), abs(high))
    return (0.0 if low >= 0 else -reach * 128 / 127, reach)


def _extremes(watch: Watch[Key], shown: Iterable[np.ndarray]) -> dict[Key, Range]:
    seen: dict[Key, Range] = {}
    for images in shown:
        for name, values in watch(images).items():
            low, high = seen.get(name, (np.inf, -np.inf))
            seen[name] = (min(low, float(values.min())), max(high, float(values.max())))
    return seen


def _counts(
    watch: Watch[Key], shown: Iterable[np.ndarray], reach: Mapping[Key, Range]
) -> dict[Key, np.ndarray]:
    """Count the values of every tensor in bins of equal width over its reach."""
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in reach}
    for images in shown:
        for name, values in watch(images).items():
            counts[name] += np.histogram(values, BINS, range=reach[name])[0]
    return counts


def _within(counts: np.ndarray, seen: Range, cut: float) -> Range:
    """Return the range without the given fraction of the values on either side."""
    low, high = seen
    if low == high:
        return seen
    edges = np.linspace(low, high, len(counts) + 1)
    below = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    first = int(np.searchsorted(below, cut, side="right")) - 1
    last = int(np.searchsorted(below, 1 - cut, side="left"))
    return float(edges[first]), float(edges[min(last, len(counts))])


def _entropy_range(counts: np.ndarray, seen: Range) -> Range:
    low, high = seen
    levels = LEVELS if low < 0 < high else 2 * LEVELS  # one-sided values have all 256
    threshold = max(abs(low), abs(high)) * entropy_bins(counts, levels) / len(counts)
    return max(low, -threshold), min(high, threshold)
