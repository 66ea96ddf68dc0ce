"""What layers cost at narrower widths, and at which of those a device really gets faster.

Every convolution and linear layer is timed alone, once per width of its input and of its output
with the other at its full width, as NetAdapt's tables are made (Yang et al. 2018, arXiv 1804.03230,
section 3.3). What is measured is a latency table: a file that a person can read, and that serves
instead of measuring.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.compression.pruning import Ranked
from fbnas.compression.saliency import as_judged, is_depthwise
from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.latency.table import OVERHEAD, LatencyTable
from fbnas.latency.table_file import Entry, Shape

Measure = Callable[[Sequence[nn.Module]], list[float]]

LEAST_NOISE = 0.01  # the same layer in two files differs by up to that on a quiet machine
LEAST_MS = 1e-6  # of a layer beside the overhead of a run, so that ratios stay finite


class Piece(nn.Module):
    """A layer alone, with a ReLU: `input_shape` (c, h, w) to what the layer makes of it."""

    def __init__(self, layer: nn.Module, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.layer = layer
        self.activation = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        flat = isinstance(self.layer, nn.Linear)
        found: Tensor = self.activation(self.layer(images.flatten(1) if flat else images))
        return found


@dataclass(frozen=True)
class PlacedLayer:
    """A convolution or linear layer, the size of its input, and whose channels it has.

    inputs, outputs: by set, how many of the layer's channels one of the set is.
    """

    module: nn.Conv2d | nn.Linear
    height: int
    width: int
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]

    @property
    def ends(self) -> tuple[int, int]:
        """Input and output channels as they are."""
        if isinstance(self.module, nn.Linear):
            return self.module.in_features, self.module.out_features
        return self.module.in_channels, self.module.out_channels

    def narrowed(self, gone: Mapping[str, int]) -> tuple[int, int]:
        """Return input and output channels without so many channels of the sets."""
        lost = [
            sum(times * gone.get(name, 0) for name, times in of.items())
            for of in (self.inputs, self.outputs)
        ]
        return self.ends[0] - lost[0], self.ends[1] - lost[1]

    def shape(self, ends: tuple[int, int]) -> Shape:
        """Return the row of a latency table that holds the layer at a width."""
        layer = self.module
        if isinstance(layer, nn.Linear):
            return Shape("linear", *ends, 1, 1, 1)
        size = f"{layer.kernel_size[0]}x{layer.kernel_size[1]}"
        if is_depthwise(layer):
            name = f"depthwise{size}"
        else:
            name = f"conv{size}" + (f"_g{layer.groups}" if layer.groups > 1 else "")
        name += f"_d{layer.dilation[0]}" if layer.dilation[0] > 1 else ""
        if isinstance(layer.padding, str) or layer.padding != _same(layer):
            name += f"_p{layer.padding if isinstance(layer.padding, str) else layer.padding[0]}"
        return Shape(name, *ends, layer.stride[0], self.height, self.width)

    def piece(self, ends: tuple[int, int]) -> Piece:
        """Return the layer alone at a width, with fresh weights."""
        layer = self.module
        if isinstance(layer, nn.Linear):
            return Piece(nn.Linear(*ends), (ends[0], 1, 1))
        alone = nn.Conv2d(
            *ends,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            ends[1] if is_depthwise(layer) else layer.groups,
            padding_mode=layer.padding_mode,
        )
        return Piece(alone, (ends[0], self.height, self.width))


def placed_layers(
    model: nn.Module, ranked: Sequence[Ranked], input_shape: tuple[int, int, int]
) -> tuple[PlacedLayer, ...]:
    """Find every convolution and linear layer with its input's size, once per call of it.

    Linear layers on anything but (n, features) are left out: nothing is known of their cost.
    """
    names = dict(model.named_modules())
    inputs: dict[nn.Module, dict[str, int]] = {}
    outputs: dict[nn.Module, dict[str, int]] = {}
    for found in ranked:
        for member in found.members:
            module = names[member.name]
            if member.inputs:
                inputs.setdefault(module, {})[found.name] = member.inputs
            if member.outputs:
                outputs.setdefault(module, {})[found.name] = member.outputs
    placed = []

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        height, width = given[0].shape[2:] if isinstance(module, nn.Conv2d) else (1, 1)
        if isinstance(module, nn.Conv2d) or given[0].ndim == 2:
            ends = inputs.get(module, {}), outputs.get(module, {})
            placed.append(PlacedLayer(module, height, width, *ends))

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    with as_judged(model), torch.no_grad():
        model(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return tuple(placed)


def shapes_to_time(
    layers: Iterable[PlacedLayer], widths: Mapping[str, Sequence[int]], full: Mapping[str, int]
) -> dict[Shape, Piece]:
    """Return what has to be timed: each layer at each width of each of its sets, once per shape."""
    found: dict[Shape, Piece] = {}
    for layer in layers:
        for ends in _grid(layer, widths, full):
            found.setdefault(layer.shape(ends), layer.piece(ends))
    return found


def timed(
    pieces: Mapping[Shape, Piece], whole: nn.Module, measure: Measure
) -> tuple[LatencyTable, float]:
    """Time layers, an idle run and the whole network against each other; return table and ms.

    Every eighth layer is timed twice: by how much the two differ is the table's noise floor.
    """
    shapes = [OVERHEAD, *pieces]
    again = [*range(0, len(shapes), 8)]
    nets: list[nn.Module] = [Piece(nn.Identity(), (1, 1, 1)), *pieces.values()]
    found = measure([whole, *nets, *(nets[i] for i in again)])
    whole_ms, first, second = found[0], found[1 : len(nets) + 1], found[len(nets) + 1 :]
    noise = median(
        2 * abs(first[i] - ms) / (first[i] + ms) for i, ms in zip(again, second, strict=True)
    )
    unknown = {"device": "unknown", "runtime": "unknown", "precision": "unknown", "threads": "1"}
    told = getattr(measure, "fingerprint", None) or unknown
    header = {**told, "batch": "1", "noise_floor": f"{noise:.6g}", "of": "single layers"}
    entries = [Entry(shape, ms, ms, ms, 1) for shape, ms in zip(shapes, first, strict=True)]
    return LatencyTable(header, entries), whole_ms


class LayerCosts:
    """The milliseconds of a network's layers at any width, from a table of single layers.

    A layer with both ends narrowed is taken to cost t(in, full) t(full, out) / t(full, full), each
    without what a run costs that does nothing; between two widths of the table it is interpolated.
    """

    def __init__(
        self,
        table: LatencyTable,
        layers: Sequence[PlacedLayer],
        widths: Mapping[str, Sequence[int]],
        full: Mapping[str, int],
    ) -> None:
        """Look up all that is needed.

        Raises:
            InputError: the table lacks a layer at a width.
        """
        self.table, self.layers, self.full = table, layers, full
        self._of_set: dict[str, list[int]] = {}
        self._curves: list[tuple[_Curve, _Curve]] = []
        for i, layer in enumerate(layers):
            for name in {*layer.inputs, *layer.outputs}:
                self._of_set.setdefault(name, []).append(i)
            grid = _grid(layer, widths, full)
            ms = {ends: self._added_ms(layer.shape(ends)) for ends in grid}
            self._curves.append((_Curve.along(0, ms, layer), _Curve.along(1, ms, layer)))

    def _added_ms(self, shape: Shape) -> float:
        if shape not in self.table:
            raise InputError(
                f"{self.table.name} has no row {shape}; expected every layer at every width: leave "
                "table= out to measure them, and keep channel_steps.csv."
            )
        entry = self.table.lookup(*shape)
        return max(entry.latency_ms - self.table.overhead_ms, LEAST_MS)

    def layer_ms(self, index: int, widths: Mapping[str, int]) -> float:
        """Return what a layer costs at the given widths of the sets, others being full."""
        gone = {name: self.full[name] - width for name, width in widths.items()}
        layer = self.layers[index]
        ends, (by_input, by_output) = layer.narrowed(gone), self._curves[index]
        if is_depthwise(layer.module):
            return by_output(ends[1])
        return by_input(ends[0]) * by_output(ends[1]) / by_output(layer.ends[1])

    def set_ms(self, name: str, widths: Mapping[str, int]) -> float:
        """Return what the layers of a set cost at the given widths."""
        return sum(self.layer_ms(i, widths) for i in self._of_set.get(name, ()))

    def noise_ms(self, name: str) -> float:
        """Return what two timings of a set's layers differ by, each layer timed in its own run."""
        times = [
            self.layer_ms(i, self.full) + self.table.overhead_ms for i in self._of_set.get(name, ())
        ]
        return max(self.table.noise_floor, LEAST_NOISE) * math.hypot(*times)

    def network_ms(self, widths: Mapping[str, int]) -> float:
        """Return what all layers cost at the given widths, and an idle run."""
        layers = sum(self.layer_ms(i, widths) for i in range(len(self.layers)))
        return self.table.overhead_ms + layers


def useful(curve: Mapping[int, float], noise_ms: float = 0.0) -> tuple[int, ...]:
    """Return the widths that are faster than those kept before by more than noise, widest first.

    Gains that are each smaller than the noise add up until they are more. On a staircase these are
    the tops of the steps: of widths that cost the same, the widest.

    Args:
        curve: milliseconds by width.
    """
    kept: list[int] = []
    for width in sorted(curve, reverse=True):
        if not kept or curve[width] < min(curve[w] for w in kept) - noise_ms:
            kept.append(width)
    return tuple(kept)


class Remembered:
    """Measuring that a resumed command need not repeat, nor decide otherwise by.

    What was measured is kept in a file by what the networks are, not by their weights.
    """

    def __init__(self, measure: Measure, file: Path | None) -> None:
        self.measure, self.file = measure, file
        self.fingerprint: Mapping[str, str] | None = getattr(measure, "fingerprint", None)

    def __call__(self, networks: Sequence[nn.Module]) -> list[float]:
        if self.file is None:
            return self.measure(networks)
        known: dict[str, Any] = read_json(self.file) if self.file.is_file() else {}
        told = json.dumps([dict(self.fingerprint or {}), [_structure(net) for net in networks]])
        key = hashlib.sha256(told.encode()).hexdigest()
        if key not in known:
            known[key] = [float(ms) for ms in self.measure(networks)]
            write_json(self.file, known)
        found: list[float] = known[key]
        return found


@dataclass(frozen=True)
class _Curve:
    """Milliseconds by channels, interpolated."""

    channels: tuple[int, ...]
    ms: tuple[float, ...]

    @classmethod
    def along(cls, end: int, ms: Mapping[tuple[int, int], float], layer: PlacedLayer) -> "_Curve":
        other = 1 - end
        both = is_depthwise(layer.module)
        points = sorted(
            (ends[end], found)
            for ends, found in ms.items()
            if both or ends[other] == layer.ends[other]
        )
        return cls(*zip(*points, strict=True))

    def __call__(self, channels: int) -> float:
        return float(np.interp(channels, self.channels, self.ms))


def _grid(
    layer: PlacedLayer, widths: Mapping[str, Sequence[int]], full: Mapping[str, int]
) -> list[tuple[int, int]]:
    """Input and output channels to know a layer at: one end narrowed by one set at a time."""
    found = [layer.ends]
    depthwise = is_depthwise(layer.module)
    for name in {**layer.inputs, **layer.outputs}:
        for width in widths[name]:
            ends = layer.narrowed({name: full[name] - width})
            found += [ends] if depthwise else [(ends[0], layer.ends[1]), (layer.ends[0], ends[1])]
    return list(dict.fromkeys(found))


def _same(layer: nn.Conv2d) -> tuple[int, ...]:
    """The padding with which a stride of 1 keeps the size."""
    sizes = zip(layer.kernel_size, layer.dilation, strict=True)
    return tuple((kernel - 1) * dilation // 2 for kernel, dilation in sizes)


def _structure(network: nn.Module) -> str:
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    return f"{network} {shapes} {getattr(network, 'input_shape', None)}"
