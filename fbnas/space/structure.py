"""What compression may do to a network's structure, and how names in a weights file tell of it.

A layer NAME that was factored is two, NAME.0 and NAME.1. One whose input is rounded is NAME.1,
behind a `Rounding` NAME.0. A batch normalisation that a file has nothing of was folded into the
layer before it, which the file then has a bias of.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fbnas.space.pointwise import PointwiseConv2d


class Rounding(nn.Module):
    """A feature map in fixed point: step * clamp(round(x / step), -2^(b-1), 2^(b-1) - 1).

    bits: b, sign included. fraction: bits behind the binary point, so that step = 2^-fraction; it
    may be negative, or more than b. In training the gradient passes where nothing is cut off.
    """

    step: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, bits: int = 8, fraction: int = 0) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(2.0**-fraction))
        self.register_buffer("low", torch.tensor(-(2.0 ** (bits - 1))))
        self.register_buffer("high", torch.tensor(2.0 ** (bits - 1) - 1))

    def forward(self, features: Tensor) -> Tensor:
        scaled = (features / self.step).clamp(self.low, self.high)
        rounded = scaled.round()
        if self.training:
            rounded = scaled + (rounded - scaled).detach()
        return rounded * self.step


def rounds(network: nn.Module) -> bool:
    """Whether a network rounds feature maps.

    Where sums are not exact, another order of them then moves a map by a whole step here and there.
    """
    return any(isinstance(module, Rounding) for module in network.modules())


def factored(layer: nn.Conv2d | nn.Linear, rank: int) -> nn.Sequential:
    """Return two layers in the place of one, their weights still to be given.

    `rank` filters with kernel, stride, padding and dilation of the layer; then 1x1 to its width,
    with a bias. Of a linear layer: two linear ones.
    """
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        first: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
        second: nn.Module = nn.Linear(rank, layer.out_features)
    else:
        first = (PointwiseConv2d if isinstance(layer, PointwiseConv2d) else nn.Conv2d)(
            layer.in_channels,
            rank,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=layer.padding_mode,
        )
        second = nn.Conv2d(rank, layer.out_channels, 1)
    return nn.Sequential(first, second).to(weight.device, weight.dtype).train(layer.training)


def restructure_(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a freshly built network the structure that the names of stored tensors tell of."""
    bias_given = False  # to the layer before
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear) and name:
            bias_given = module.bias is None and _has_bias(name, tensors)
            network.set_submodule(name, _stored(name, module, tensors))
        elif isinstance(module, nn.BatchNorm2d) and bias_given:
            if f"{name}.running_mean" not in tensors:
                network.set_submodule(name, nn.Identity())
            bias_given = False


def _has_bias(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a bias is stored of a layer, or of what came in its place."""
    if f"{name}.weight" in tensors:
        return f"{name}.bias" in tensors
    return any(key.startswith(f"{name}.") and key.endswith(".bias") for key in tensors)


def _stored(
    name: str, layer: nn.Conv2d | nn.Linear, tensors: Mapping[str, Tensor]
) -> nn.Conv2d | nn.Linear | nn.Sequential:
    """Return the layer, or what is stored in its place; widths are still to be those stored."""
    if f"{name}.weight" in tensors:
        if layer.bias is None and f"{name}.bias" in tensors:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
        return layer
    if f"{name}.0.step" in tensors:
        return nn.Sequential(Rounding(), _stored(f"{name}.1", layer, tensors))
    if any(key.startswith(f"{name}.1.") for key in tensors):
        pair = factored(layer, 1)
        for place in ("0", "1"):
            half: Any = pair.get_submodule(place)
            pair.set_submodule(place, _stored(f"{name}.{place}", half, tensors))
        return pair
    return layer
