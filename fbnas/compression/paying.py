"""Layers that int8 makes slower on the device, found by measuring, and left in float."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from fbnas.latency.devices import Measurement, allowed_ratio
from fbnas.progress import progress

AT_ONCE = 16  # files measured against each other, beside the two that all are compared with
MARGINS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04)  # of the int8 latency, asked of every change

Measure = Callable[[Sequence[Path]], Measurement]


class Mixable(Protocol):
    """What can be written with any of its layers in float, calibrated by some images."""

    @property
    def images(self) -> int:
        """How many."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Their names, in order."""

    def write(self, path: Path, float_layers: Collection[str] = (), *, draft: bool = False) -> Path:
        """Write the file with these in float; a draft only has to take as long."""


@dataclass(frozen=True)
class LayerCost:
    """What int8 of a layer saves in its network, in ms; negative where float is the faster.

    `change_ms`: what it costs if the next layer is of the other precision; 0 for the last.
    """

    layer: str
    saved_ms: float
    change_ms: float


@dataclass(frozen=True)
class Latencies:
    """Of the float, the int8 and the mixed file, in ms, measured against each other at last.

    `mixed_ms`: None where no layer is better left in float. `noise_floor`: a fraction.
    `layer_costs`: of every layer that was free to be either, where there were several.
    """

    fp32_ms: float
    int8_ms: float
    mixed_ms: float | None
    noise_floor: float
    layer_costs: tuple[LayerCost, ...] = field(default=(), compare=False)

    @property
    def fastest(self) -> str:
        """int8, mixed or fp32: the first that no other beats by more than the noise."""
        found = {"int8": self.int8_ms, "mixed": self.mixed_ms, "fp32": self.fp32_ms}
        known = {name: ms for name, ms in found.items() if ms is not None}
        limit = min(known.values()) * allowed_ratio(self.noise_floor)
        return next(name for name, ms in known.items() if ms <= limit)

    @property
    def fastest_ms(self) -> float:
        """The latency of that."""
        found = {"int8": self.int8_ms, "mixed": self.mixed_ms, "fp32": self.fp32_ms}[self.fastest]
        assert found is not None
        return found


@dataclass(frozen=True)
class ChainCosts:
    """What a network of n layers takes: `int8_ms`, and for each layer in float, and each change.

    `float_ms`: (n,), what a layer takes more in float than in int8, negative where int8 loses.
    `change_ms`: (n - 1,), where a layer and the next differ in precision.
    """

    int8_ms: float
    float_ms: np.ndarray
    change_ms: np.ndarray

    def of(self, layers: Sequence[str]) -> tuple[LayerCost, ...]:
        """Return the costs by the names of the n layers."""
        changes = [*self.change_ms.tolist(), 0.0]
        return tuple(map(LayerCost, layers, self.float_ms.tolist(), changes))


def paying_layers(
    network: Mixable,
    fp32: Path,
    measure: Measure,
    *,
    folder: Path,
    always_float: Collection[str] = (),
) -> tuple[tuple[str, ...], Latencies]:
    """Return the layers to leave in float so that the file is as fast as can be, and the proof.

    At every border between two layers two files are measured: float up to there and int8 after it,
    and the other way round. Half their difference tells what the layers before it gain, half their
    sum what the change of precision costs (`chain_costs`), and the best choice follows exactly
    (`best_choice`). As measured numbers are noisy and networks no chains, the choices for several
    margins are measured as files, and the fastest once more against fp32 and int8.

    Args:
        fp32: the file with all layers in float.
        measure: times files against each other.
        folder: for files in between.
        always_float: layers that are in float anyway.

    Returns:
        No layers where plain int8 or fp32 turned out as fast; `Latencies` says which.
    """
    free = [name for name in network.layers if name not in set(always_float)]

    def write(place: Path, name: str, layers: Iterable[str], *, draft: bool = False) -> Path:
        return network.write(place / name, [*always_float, *layers], draft=draft)

    with tempfile.TemporaryDirectory(dir=folder, prefix=".pays.") as kept:
        place = Path(kept)
        int8 = write(place, f"int8{fp32.suffix}", ())
        choices: list[tuple[str, ...]] = []
        layer_costs: tuple[LayerCost, ...] = ()
        if len(free) > 1:
            costs = _measured_costs(free, fp32, write, measure, place)
            choices, layer_costs = _choices(free, costs), costs.of(free)
        files = [write(place, f"{i:03d}{fp32.suffix}", layers) for i, layers in enumerate(choices)]
        anchors = [fp32, int8]
        if files:
            times = _times(measure([*anchors, *files]))[2:]
            best = int(np.argmin(times))
            found = measure([*anchors, files[best]])
        else:
            found = measure(anchors)
        times = _times(found)
    mixed_ms = float(times[2]) if files else None
    fp32_ms, int8_ms = map(float, times[:2])
    latencies = Latencies(fp32_ms, int8_ms, mixed_ms, found.noise_floor, layer_costs)
    return (choices[best] if latencies.fastest == "mixed" else ()), latencies


def chain_costs(up_to: np.ndarray, after: np.ndarray, int8_ms: float, fp32_ms: float) -> ChainCosts:
    """Return the costs of a chain from what n - 1 borders say.

    With A_k what the network takes where its first k layers are float and changes are free, and b_k
    the cost of a change at border k: up_to_k = A_k + b_k, after_k = int8 + fp32 - A_k + b_k.

    Args:
        up_to: (n - 1,) ms with the first k layers in float, k from 1.
        after: (n - 1,) ms with the first k layers in int8 and the others in float.
    """
    inner = (up_to - after + int8_ms + fp32_ms) / 2
    float_ms = np.diff(np.concatenate([[int8_ms], inner, [fp32_ms]]))
    change_ms = np.maximum((up_to + after - int8_ms - fp32_ms) / 2, 0.0)
    return ChainCosts(int8_ms, float_ms, change_ms)


def best_choice(costs: ChainCosts, *, margin_ms: float = 0.0) -> tuple[bool, ...]:
    """Return which layers to leave in float so that a chain takes least; ties go to int8.

    Exact, by dynamic programming over the layers.

    Args:
        margin_ms: what every change of precision is asked to gain on top of its cost.
    """
    changes = np.concatenate([costs.change_ms + margin_ms, [0.0]])
    best = (0.0, float(costs.float_ms[0]))  # of the layers so far, by the precision of the last
    came_from: list[tuple[bool, bool]] = []
    for layer in range(1, len(costs.float_ms)):
        change = float(changes[layer - 1])
        to_int8 = best[1] + change < best[0]
        to_float = best[1] <= best[0] + change
        came_from.append((to_int8, to_float))
        best = (
            min(best[0], best[1] + change),
            min(best[1], best[0] + change) + float(costs.float_ms[layer]),
        )
    chosen = [best[1] < best[0]]
    for steps in reversed(came_from):
        chosen.append(steps[chosen[-1]])
    return tuple(reversed(chosen))


def _measured_costs(
    free: Sequence[str],
    fp32: Path,
    write: Callable[..., Path],
    measure: Measure,
    place: Path,
) -> ChainCosts:
    """Measure two files per border, some at a time; those of another time are scaled to this one.

    Files are drafts, and are deleted when they were measured.
    """
    int8 = write(place, f"draft{fp32.suffix}", (), draft=True)
    plan = [free[:k] for k in range(1, len(free))] + [free[k:] for k in range(1, len(free))]
    anchors, rows = [], []
    for start in range(0, len(plan), AT_ONCE):
        files, some = [], plan[start : start + AT_ONCE]
        with progress("Writing files of int8 and float layers", total=len(some)) as advance:
            for i, layers in enumerate(some):
                name = f"border_{start + i:03d}{fp32.suffix}"
                files.append(write(place, name, layers, draft=True))
                advance(1)
        times = _times(measure([fp32, int8, *files]))
        anchors.append(times[:2])
        rows.append(times[2:] / times[:2].sum())
        for file in files:
            file.unlink()
    fp32_ms, int8_ms = np.mean(anchors, axis=0)
    up_to, after = np.split(np.concatenate(rows) * (fp32_ms + int8_ms), 2)
    return chain_costs(up_to, after, float(int8_ms), float(fp32_ms))


def _choices(free: Sequence[str], costs: ChainCosts) -> list[tuple[str, ...]]:
    """Return the layers in float for each margin, where they are neither none nor all."""
    found = {best_choice(costs, margin_ms=margin * costs.int8_ms) for margin in MARGINS}
    named = [tuple(x for x, left in zip(free, chosen, strict=True) if left) for chosen in found]
    return sorted({layers for layers in named if 0 < len(layers) < len(free)})


def _times(found: Measurement) -> np.ndarray:
    return np.array([timing.latency_ms for timing in found.whole])
