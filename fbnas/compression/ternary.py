"""Trained ternary weights: {-Wn, 0, +Wp} with two scales per layer, trained with what is ternary.

Zhu et al. 2017 (arXiv 1612.01064). Full-precision weights, divided by their largest, live on behind
the ternary ones while the network is trained and are then forgotten.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fbnas.compression.dataflow import layer_calls
from fbnas.compression.holding import held, weighted
from fbnas.compression.method import Applied, Method
from fbnas.errors import InputError
from fbnas.space.heads import separate_classifiers

if TYPE_CHECKING:
    from fbnas.compression.method import Tools


@dataclass(frozen=True)
class Ternary(Method):
    """Train the network with ternary weights, from the weights it has.

    Zeros that an earlier method left stay zero. Without `train` weights are made ternary as they
    are, with the mean of those above and below the threshold as scales.

    Args:
        threshold: t: weights of at most t * max |w| become zero, 0 <= t < 1 (section 3.2; 0.05 in
            the paper's experiments).
        ends: make the first and the last layer ternary too; the paper leaves them in float. Of
            heads that were joined each has a last layer.
    """

    NAME: ClassVar[str] = "ternary"
    SECTION: ClassVar[str] = "ternary"

    threshold: float = 0.05
    ends: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise InputError(
                f"threshold is {self.threshold}; expected a fraction of the largest weight, "
                "0 <= threshold < 1."
            )

    def apply_(self, model: nn.Module, tools: "Tools") -> Applied:
        """Train with ternary weights and leave them."""
        chosen = self._layers(model, tools)
        others = [module for module in weighted(model) if module not in chosen.values()]
        trained = None
        with held(nn.ModuleList(others)), ternary(list(chosen.values()), self.threshold):
            if tools.train is not None:
                trained = tools.train(model)
        return Applied(tuple(_change(name, layer) for name, layer in chosen.items()), trained)

    def _layers(self, model: nn.Module, tools: "Tools") -> dict[str, nn.Conv2d | nn.Linear]:
        layers = {call.name: call.layer for call in layer_calls(model, tools.input_shape)}
        left = set[nn.Module]() if self.ends else _ends(model, list(layers.values()))
        chosen = {name: layer for name, layer in layers.items() if layer not in left}
        if not chosen:
            raise InputError(
                f"The network has {len(layers)} convolutions and linear layers, and the first and "
                "the last of every head stay in float; expected more, or ends=true."
            )
        return chosen


def _ends(model: nn.Module, layers: Sequence[nn.Module]) -> set[nn.Module]:
    """Return the first layer and the last of every head, of layers in the order of their calls."""
    found = {*layers[:1], *layers[-1:]}
    for classifier in separate_classifiers(model):
        inside = set(classifier.modules())
        found.update([layer for layer in layers if layer in inside][-1:])
    return found


@dataclass(frozen=True)
class Ternarized:
    """A layer's two scales, and the fraction of its weights that are zero."""

    layer: str
    positive: float
    negative: float
    zeros: float


def _change(name: str, layer: nn.Conv2d | nn.Linear) -> Ternarized:
    weight = layer.weight.detach()
    positive, negative = float(weight.max().clamp(min=0)), float((-weight).max().clamp(min=0))
    return Ternarized(name, positive, negative, float((weight == 0).float().mean()))


@contextmanager
def ternary(layers: Sequence[nn.Conv2d | nn.Linear], threshold: float) -> Iterator[None]:
    """Make weights ternary, with what trains them behind, and leave them plain and ternary."""
    for layer in layers:
        made = _Ternary(layer.weight.detach(), threshold)
        parametrize.register_parametrization(layer, "weight", made)
    try:
        yield
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class _Ternary(nn.Module):
    """From latent weights, at first w / max |w|, to ternary ones.

    scales: (2,), Wp and Wn, at first the means of |w| on either side of the threshold.
    """

    kept: Tensor

    def __init__(self, weight: Tensor, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        limit = threshold * weight.abs().max()
        sides = [weight[weight > limit], -weight[weight < -limit]]
        means = [side.mean() if len(side) else weight.new_zeros(()) for side in sides]
        self.scales = nn.Parameter(torch.stack(means))
        self.register_buffer("kept", weight != 0, persistent=False)

    def forward(self, latent: Tensor) -> Tensor:
        return ternarized(latent * self.kept, self.scales, self.threshold)

    def right_inverse(self, weight: Tensor) -> Tensor:
        largest = weight.abs().max()
        return weight / largest if largest > 0 else weight.clone()


def ternarized(latent: Tensor, scales: Tensor, threshold: float) -> Tensor:
    """Return +Wp where latent > D, -Wn where latent < -D, else 0, with D = t * max |latent|.

    Equation 6. Gradients: of Wp the sum of those of the weights that are +Wp (equation 7); of Wn
    minus the sum of those that are -Wn, by the chain rule (the paper leaves the minus out, the
    authors' code has it); of the latent weights those of the ternary ones times Wp, 1 or Wn
    (equation 8). A scale does not fall below zero.

    Args:
        latent: any shape.
        scales: (2,), Wp and Wn.
    """
    return _Ternarize.apply(latent, scales, threshold)


class _Ternarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, scales: Tensor, threshold: float) -> Tensor:
        limit = threshold * latent.abs().max()
        positive, negative = latent > limit, latent < -limit
        up, down = scales.clamp(min=0).to(latent.dtype)
        ctx.save_for_backward(positive, negative, up, down)
        return positive * up - negative * down

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        positive, negative, up, down = ctx.saved_tensors
        of_scales = torch.stack([(gradient * positive).sum(), -(gradient * negative).sum()])
        factor = torch.where(positive, up, torch.where(negative, down, torch.ones_like(up)))
        return gradient * factor, of_scales, None
