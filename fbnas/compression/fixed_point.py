"""Dynamic fixed point: few bits, with the binary point where each layer and feature map needs it.

A number of b bits, sign included, and fractional length f is i * 2^-f with -2^(b-1) <= i < 2^(b-1).
Qiu et al. 2016 (Going Deeper with Embedded FPGA Platform for CNN, section 4) and Gysel et al. 2016
(Ristretto, arXiv 1604.03168, section 3): f is one for the weights of a layer and one for a feature
map, and differs between them; a static format has one f for all weights and one for all feature
maps.

What is left behind is a network in floats that computes with fixed-point numbers: weights and
biases on their grids, a `Rounding` before each layer. It says what such a device would answer; the
runtimes here compute in floats all the same, and are slower by the rounding.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fbnas.compression.dataflow import Call, layer_calls
from fbnas.compression.folding import fold_bn_
from fbnas.compression.method import Applied, Method
from fbnas.compression.responses import inputs_of, training_images
from fbnas.errors import InputError
from fbnas.modes import modes_kept
from fbnas.space.structure import Rounding

if TYPE_CHECKING:
    from fbnas.compression.method import Tools

PLACES = 32  # of a feature map of an image that are compared


@dataclass(frozen=True)
class FixedPoint(Method):
    """Round weights, biases and feature maps to fixed point, without training.

    Batch normalisation is folded into the layer before it first. Fractional lengths of weights and
    biases are then the longest that no value overflows. Those of feature maps, which are what
    layers read, follow in the order of execution (greedy): with all before in fixed point, of
    `candidates` lengths from the longest without overflow on, the one whose map is nearest to that
    of the network in floats, sum |x - x'|.

    Args:
        bits: of each number, sign included, 2 to 16.
        static: one fractional length for all weights and biases, and one for all feature maps,
            of which the scores are compared: what the dynamic format is judged against.
        saturate: give weights and biases too the length of the least squared error, of as many
            candidates, which may cut the largest off.
        candidates: fractional lengths that are compared, from the longest without overflow on.
        images: training images that feature maps are taken from.
    """

    NAME: ClassVar[str] = "fixed_point"
    SECTION: ClassVar[str] = "fixed_point"

    bits: int = 8
    static: bool = False
    saturate: bool = False
    candidates: int = 4
    images: int = 256

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InputError(f"bits is {self.bits}; expected a whole number from 2 to 16.")
        for name in ("candidates", "images"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1.")

    def apply_(self, model: nn.Module, tools: "Tools") -> Applied:
        """Fold, round the weights, then give every feature map its format."""
        images = training_images(tools, self.images, next(model.parameters()).device)
        fold_bn_(model, tools.input_shape)
        calls = list({call.name: call for call in layer_calls(model, tools.input_shape)}.values())
        calls = [call for call in calls if call.name]
        reference = deepcopy(model)
        parameters = _round_parameters_(calls, self)
        maps = Maps(model, reference, calls, images, tools.seed)
        fractions = maps.static_(self) if self.static else maps.dynamic_(self)
        return Applied(
            tuple(Rounded(x.name, *parameters[x.name], fractions[x.name]) for x in calls)
        )


@dataclass(frozen=True)
class Rounded:
    """Fractional lengths of a layer's weights, its biases (None without), and what it reads."""

    layer: str
    weights: int
    biases: int | None
    inputs: int


def round_to(values: Tensor, bits: int, fraction: int) -> Tensor:
    """Return the nearest numbers of a format; those beyond its range become its ends."""
    step, largest = 2.0**-fraction, 2 ** (bits - 1)
    return (values / step).round().clamp(-largest, largest - 1) * step


def longest_fraction(values: Tensor, bits: int) -> int:
    """Return the longest fractional length with which none of the values overflows.

    b - 1 - ceil(log2 max |x|), or one less where the largest would round up to 2^(b-1).
    """
    largest = float(values.abs().max())
    if largest == 0:
        return bits - 1
    fraction = bits - 1 - math.ceil(math.log2(largest))
    scaled = (values.double() * 2.0**fraction).round()
    overflows = scaled.max() > 2 ** (bits - 1) - 1 or scaled.min() < -(2 ** (bits - 1))
    return fraction - 1 if overflows else fraction


def _round_parameters_(
    calls: Sequence[Call], method: FixedPoint
) -> dict[str, tuple[int, int | None]]:
    """Round weights and biases in place; return their fractional lengths by layer."""
    weights = {call.name: call.layer.weight for call in calls}
    biases = {call.name: call.layer.bias for call in calls if call.layer.bias is not None}
    every = [x.detach() for x in (*weights.values(), *biases.values())]
    common = _fraction(every, method) if method.static else None

    def rounded_(parameter: Tensor) -> int:
        values = parameter.detach()
        fraction = _fraction([values], method) if common is None else common
        values.copy_(round_to(values, method.bits, fraction))
        return fraction

    return {
        name: (rounded_(weight), rounded_(biases[name]) if name in biases else None)
        for name, weight in weights.items()
    }


def _fraction(tensors: Sequence[Tensor], method: FixedPoint) -> int:
    """Choose one fractional length for all the tensors given."""
    shortest = min(longest_fraction(values, method.bits) for values in tensors)
    if not method.saturate:
        return shortest

    def error(fraction: int) -> float:
        return sum(float((x - round_to(x, method.bits, fraction)).square().sum()) for x in tensors)

    return min(range(shortest, shortest + method.candidates), key=error)


class Maps:
    """The feature maps of a network, with a `Rounding` before each layer that reads one."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        calls: Sequence[Call],
        images: Sequence[Tensor],
        seed: int,
    ) -> None:
        self.model, self.reference, self.calls = model, reference, calls
        self.images, self.seed = images, seed
        self._layers = {call.name: reference.get_submodule(call.name) for call in calls}

    def dynamic_(self, method: FixedPoint) -> dict[str, int]:
        """Give each feature map its own format, in order; return fractional lengths by layer."""
        exact = inputs_of(self.reference, self._layers, self.images, places=PLACES, seed=self.seed)
        ranges = self._ranges()
        by_source: dict[int, int] = {}
        for call in self.calls:
            if call.source not in by_source:
                found = self._inputs(call)
                shortest = longest_fraction(ranges[call.name], method.bits)
                by_source[call.source] = min(
                    range(shortest, shortest + method.candidates),
                    key=lambda f: _distance(exact[call.name], round_to(found, method.bits, f)),
                )
            self._insert_(call, method.bits, by_source[call.source])
        return {call.name: by_source[call.source] for call in self.calls}

    def static_(self, method: FixedPoint) -> dict[str, int]:
        """Give all feature maps one format: that whose scores are nearest to those in floats."""
        exact = self._scores(self.reference)
        every = torch.cat(list(self._ranges().values()))
        shortest = longest_fraction(every, method.bits)
        distances = {}
        plain = deepcopy(self.model)
        for fraction in range(shortest, shortest + method.candidates):
            tried = deepcopy(plain)
            for call in self.calls:
                _insert_(tried, call.name, Rounding(method.bits, fraction))
            distances[fraction] = _distance(exact, self._scores(tried))
        chosen = min(distances, key=lambda fraction: distances[fraction])
        for call in self.calls:
            self._insert_(call, method.bits, chosen)
        return dict.fromkeys(self._layers, chosen)

    def _inputs(self, call: Call) -> Tensor:
        layer = self.model.get_submodule(call.name)
        found = inputs_of(
            self.model, {call.name: layer}, self.images, places=PLACES, seed=self.seed
        )
        return found[call.name]

    def _insert_(self, call: Call, bits: int, fraction: int) -> None:
        _insert_(self.model, call.name, Rounding(bits, fraction))

    @torch.no_grad()
    def _ranges(self) -> dict[str, Tensor]:
        """Return the least and the largest value (2,) that each layer of the reference reads."""
        found: dict[str, Tensor] = {}

        def hook(name: str) -> object:
            def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                ends = torch.stack([inputs[0].min(), inputs[0].max(), *found.get(name, ())])
                found[name] = torch.stack([ends.min(), ends.max()])

            return note

        hooks = [
            layer.register_forward_pre_hook(hook(name))  # type: ignore[arg-type]
            for name, layer in self._layers.items()
        ]
        self._scores(self.reference)
        for registered in hooks:
            registered.remove()
        return found

    @torch.no_grad()
    def _scores(self, model: nn.Module) -> Tensor:
        with modes_kept(model):
            model.eval()
            return torch.cat([model(batch) for batch in self.images])


def _insert_(model: nn.Module, name: str, rounding: Rounding) -> None:
    layer = model.get_submodule(name)
    rounding = rounding.to(next(layer.parameters()).device).train(layer.training)
    model.set_submodule(name, nn.Sequential(rounding, layer))


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().sum())
