"""How sensitive each layer is: accuracy against sparsity where it alone is pruned, untrained.

Han et al. 2015 (arXiv 1506.02626), figure 6 and section 4: the most sensitive layer gets the
smallest threshold, and convolutions are more sensitive than fully connected layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from fbnas.compression.magnitude import Layers, kind_of, zero_smallest_
from fbnas.compression.method import Tools
from fbnas.files import atomic_write
from fbnas.training.data import Subset, stratified_order
from fbnas.training.evaluation import evaluate

SCAN_FILE = "sparsity_scan.csv"  # which fbnas.report.sparsity_scan draws


@dataclass(frozen=True)
class LayerScan:
    """What a layer alone did to the accuracy.

    weights: how many it has. std: their standard deviation. points: (sparsity, accuracy, 0 to 1),
    by sparsity, the first of the layer as it was. tolerated: the sparsity at which the accuracy
    leaves the tolerance. threshold: magnitudes under it are that fraction of the layer.
    """

    layer: str
    kind: str
    weights: int
    std: float
    points: tuple[tuple[float, float], ...]
    tolerated: float
    threshold: float


def scan(
    model: nn.Module,
    layers: Layers,
    tools: Tools,
    *,
    sparsities: Sequence[float],
    tolerance: float,
    images: int,
) -> dict[str, LayerScan]:
    """Prune each layer alone to each sparsity, judge, and put it back.

    Args:
        tolerance: what the accuracy may lose, 0 to 1.
        images: at most so many validation images judge, the same ones throughout, class by class.

    Raises:
        InputError: there are no images.
    """
    data = tools.images()
    order = stratified_order(data.validation.labels, tools.seed)[:images].sort().values
    shown = Subset(data.validation, order)

    def accuracy() -> float:
        return evaluate(model, shown, mean=data.mean, std=data.std, task=tools.task)[1]

    whole, found = accuracy(), {}
    for name, layer in layers.items():
        before = layer.weight.detach().clone()
        zeros = 1 - int(before.count_nonzero()) / before.numel()
        points = [(zeros, whole)]
        for sparsity in sorted(s for s in sparsities if s > zeros):
            zero_smallest_({name: layer}, sparsity)
            points.append((sparsity, accuracy()))
        with torch.no_grad():
            layer.weight.copy_(before)
        tolerated = within(points, whole - tolerance)
        found[name] = LayerScan(
            name,
            kind_of(layer),
            before.numel(),
            float(before.std()),
            tuple(points),
            tolerated,
            threshold_at(before, tolerated),
        )
    return found


def within(points: Sequence[tuple[float, float]], least: float) -> float:
    """Return the sparsity at which the accuracy first falls under `least`.

    Straight between two points; the last sparsity where it never does.
    """
    for (left, before), (right, after) in pairwise(points):
        if after < least:
            return left + (right - left) * (before - least) / (before - after)
    return points[-1][0]


def threshold_at(weight: torch.Tensor, sparsity: float) -> float:
    """Return the magnitude under which that fraction of a layer's weights lies; more than 0."""
    magnitudes = weight.abs().flatten().sort().values
    place = min(int(sparsity * len(magnitudes)), len(magnitudes) - 1)
    return max(float(magnitudes[place]), torch.finfo(torch.float32).tiny)


def write_scan(folder: Path, scans: Sequence[LayerScan], *, tolerance: float) -> Path:
    """Write `sparsity_scan.csv`, a row per layer and sparsity; `threshold_std` is Han et al.'s q.

    threshold = q * std of the layer's weights (section 4); it and `tolerated` are the layer's.
    """
    lines = [
        f"# tolerance: {tolerance:g}",
        "layer,kind,weights,sparsity,accuracy,tolerated,threshold,threshold_std",
    ]
    for found in scans:
        relative = found.threshold / found.std if found.std else 0.0
        for sparsity, accuracy in found.points:
            lines.append(
                f"{found.layer},{found.kind},{found.weights},{sparsity:.6g},{accuracy:.6g},"
                f"{found.tolerated:.6g},{found.threshold:.6g},{relative:.6g}"
            )
    path = folder / SCAN_FILE
    atomic_write(path, "\n".join(lines) + "\n")
    return path
