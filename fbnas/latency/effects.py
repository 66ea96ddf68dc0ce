"""What is known of a block's cost before anything is measured: which entries are likely alike.

A device that gives only the total of a network cannot tell blocks apart by itself: a hundred
totals, a hundred entries. But a block's cost has known causes: multiply-adds, bytes moved, weights,
operators; and what one kind of block or one shape costs more, it costs more everywhere. Each cause
is a group of effects, a matrix (entries, effects) that says how an effect enters each entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.latency.profiling import build, plan
from fbnas.latency.table import OVERHEAD, LatencyTable, Shape
from fbnas.space import Architecture, SearchSpace

Prior = LatencyTable | Literal["macs", "none"]
FIXED = (
    "overhead",
    "stem",
    "wavelet_stem",
    "head",
    "classifier",
)  # part of every network: the base
REFERENCE_NETWORKS = 1000
REFERENCE_SEED = 0


@dataclass(frozen=True)
class Sizes:
    """What a block consists of, for one image: counts, which have no unit of time yet."""

    operators: int
    dense_macs: int
    depthwise_macs: int
    weights: int
    values_moved: int

    @property
    def macs(self) -> int:
        """Multiply-adds of all convolutions."""
        return self.dense_macs + self.depthwise_macs


@dataclass(frozen=True)
class Entries:
    """The entries of a space's table that a choice decides: tied where block and shape agree.

    `index`: (layers, blocks), the entry of each choice, -1 where not offered. `identities`:
    (entries,) bool, those of no cost. `sizes`: what each consists of.
    """

    space: SearchSpace
    shapes: tuple[Shape, ...]
    index: np.ndarray
    identities: np.ndarray
    sizes: tuple[Sizes, ...]

    def places(self) -> list[tuple[list[int], int]]:
        """Return, for each distinct shape, its entries and how many layers have it."""
        rows = [tuple(row[row >= 0].tolist()) for row in self.index]
        return [(list(row), rows.count(row)) for row in dict.fromkeys(rows)]

    def counts(self, paths: np.ndarray) -> np.ndarray:
        """Return how often each network (networks, layers) uses each entry: (networks, entries)."""
        counts = np.zeros((len(paths), len(self.shapes)))
        for layer in range(self.index.shape[0]):
            np.add.at(counts, (np.arange(len(paths)), self.index[layer, paths[:, layer]]), 1.0)
        return counts


def entries_of(space: SearchSpace) -> Entries:
    """Return the entries of a space in the order of its layers."""
    shapes = [shape for shape in plan(space) if shape.block not in FIXED]
    position = {shape: i for i, shape in enumerate(shapes)}
    index = np.full((len(space.layers), len(space.blocks)), -1)
    for layer in space.layers:
        ends = (layer.in_channels, layer.out_channels, layer.stride, layer.height, layer.width)
        for block in layer.blocks:
            index[layer.index, space.blocks.index(block)] = position[Shape(block, *ends)]
    modules = [build(shape, space) for shape in shapes]
    identities = np.array([isinstance(module, nn.Identity) for module in modules])
    sizes = [
        sizes_of(module, (shape.in_channels, shape.height, shape.width))
        for module, shape in zip(modules, shapes, strict=True)
    ]
    return Entries(space, tuple(shapes), index, identities, tuple(sizes))


def sizes_of(module: nn.Module, input_shape: tuple[int, int, int]) -> Sizes:
    """Count a block's work for one image of `input_shape` (c, h, w), without computing it.

    An operator is a leaf module; normalisations and activations are part of the one before them.
    """
    totals = np.zeros(5, dtype=np.int64)

    def add(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        moved = inputs[0][0].numel() + output[0].numel()
        macs = weights = depthwise = 0
        if isinstance(part, nn.Conv2d | nn.Linear):
            weights = part.weight.numel()
            macs = weights * (output[0, 0].numel() if isinstance(part, nn.Conv2d) else 1)
            depthwise = int(isinstance(part, nn.Conv2d) and 1 < part.groups == part.in_channels)
        totals[:] += (1, macs * (1 - depthwise), macs * depthwise, weights, moved)

    folded = (nn.Identity, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)
    module = module.to("meta").eval()
    leaves = [m for m in module.modules() if not list(m.children()) and not isinstance(m, folded)]
    hooks = [leaf.register_forward_hook(add) for leaf in leaves]
    with torch.no_grad():
        module(torch.empty(1, *input_shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return Sizes(*(int(total) for total in totals))


def reference_counts(entries: Entries) -> np.ndarray:
    """Return the counts of random networks of the space, by which effects are made comparable."""
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    drawn = [Architecture.random(entries.space, generator) for _ in range(REFERENCE_NETWORKS)]
    return entries.counts(np.array([architecture.path(entries.space) for architecture in drawn]))


def effects(entries: Entries, prior: Prior) -> list[np.ndarray]:
    """Return groups of effects, each (entries, effects), the one that is believed in first.

    Each is scaled so that the totals of random networks vary by 1 in all.

    Args:
        prior: "macs": multiply-adds; a table of another device; "none": nothing but that an entry
            is the same in every network.
    """
    counts = reference_counts(entries)
    real = (~entries.identities).astype(float)
    if prior == "none":
        return [_unit(np.eye(len(real)), counts)]
    moved = _relative([size.values_moved for size in entries.sizes]) * real
    kinds = _one_hot([shape.block for shape in entries.shapes]) * real[:, None]
    places = _one_hot([shape[1:] for shape in entries.shapes]) * real[:, None]
    columns = [
        _relative([getattr(size, name) for size in entries.sizes]) * real
        for name in ("macs", "dense_macs", "depthwise_macs", "values_moved", "weights", "operators")
    ]
    told = [] if prior == "macs" else [_told(entries, prior)]
    groups = [
        *(column[:, None] for column in (*told, *columns)),
        real[:, None],
        kinds,
        kinds * moved[:, None],
        places,
        np.diag(real),
        np.diag(real * moved),
    ]
    return [_unit(group, counts) for group in groups if np.ptp(counts @ group, axis=0).any()]


def prior_order(entries: Entries, prior: Prior) -> np.ndarray | None:
    """Return the prior's own word on each entry (entries,), None where there is none."""
    if prior == "none":
        return None
    if isinstance(prior, str):
        return np.array([float(size.macs) for size in entries.sizes])
    return _told(entries, prior)


def _told(entries: Entries, table: LatencyTable) -> np.ndarray:
    """Another device's latencies in ms, in the order of the entries."""
    overhead_ms = table.lookup(*OVERHEAD).latency_ms if OVERHEAD in table else 0.0
    told = [table.lookup(*shape, space=entries.space.name).latency_ms for shape in entries.shapes]
    return np.maximum(np.array(told) - overhead_ms, 0.0) * ~entries.identities


def _relative(values: Sequence[int]) -> np.ndarray:
    array = np.array(values, dtype=float)
    return array / array[array > 0].mean() if (array > 0).any() else array


def _one_hot(labels: Sequence[object]) -> np.ndarray:
    distinct = list(dict.fromkeys(labels))
    return np.array([[float(label == other) for other in distinct] for label in labels])


def _unit(group: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return group / np.sqrt((counts @ group).var(axis=0).sum())
