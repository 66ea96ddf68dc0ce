"""What compression did to weights holds while they are trained on.

It is read from the values: a weight that is exactly zero was pruned and stays zero; a tensor with
few different values has shared weights, and each value is trained as one (Han et al. 2016, arXiv
1510.00149, section 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

GRADIENTS = {  # of a shared value: the square root of what its sum is multiplied by
    "mean": lambda counts: counts.clamp(min=1).rsqrt(),
    "scaled_sum": lambda counts: (
        ((counts > 0).sum() / counts.sum().clamp(min=1)).sqrt().expand(len(counts))
    ),
    "sum": torch.ones_like,
}
MOST_SHARED = 256  # different values of a tensor of shared weights, beside 0: an index is one byte


@contextmanager
def held(model: nn.Module, *, gradient: str = "scaled_sum") -> Iterator[None]:
    """Keep zeros zero and shared weights shared while the block trains the network in place.

    Args:
        gradient: by what a step of gradient descent moves a shared value, one of GRADIENTS. The
            sum of its weights' gradients, as in the paper; that sum over as many as weights of the
            layer share a value on average; or their mean, which is the step of a network whose
            weights are not shared, projected onto shared weights: it is stable at every rate at
            which that is.
    """
    holding = []
    for module in weighted(model):
        found = shared(module.weight)
        if found is not None:
            parametrize.register_parametrization(
                module, "weight", _Shared(*found, gradient=gradient), unsafe=True
            )
        elif bool((module.weight == 0).any()):
            zero = _Masked((module.weight != 0).to(module.weight.dtype))
            parametrize.register_parametrization(module, "weight", zero)
        else:
            continue
        holding.append(module)
    try:
        yield
    finally:
        for module in holding:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def weighted(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """Return the convolutions and linear layers, whose weights are compressed, each once."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def shared(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the values (k,) that a tensor's weights share and the index of each; None if not.

    They share them where two weights or more, of those that are not zero, come to a value.
    """
    values, indices = weight.detach().unique(return_inverse=True)
    weights = int(weight.count_nonzero())
    few = int(values.count_nonzero()) <= min(MOST_SHARED, weights // 2)
    return (values, indices) if few else None


class _Masked(nn.Module):
    """A weight with its zeros."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class _Shared(nn.Module):
    """A weight as its values, which are what is trained, and their places; a zero stays zero.

    What is trained is value / scale: its gradient is scale times the sum over the value's weights,
    and a step moves the value by scale squared times that sum.
    """

    indices: Tensor
    scale: Tensor

    def __init__(self, values: Tensor, indices: Tensor, *, gradient: str) -> None:
        super().__init__()
        counts = indices.flatten().bincount(minlength=len(values)).to(values.dtype)
        scale = GRADIENTS[gradient](counts * (values != 0))
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("scale", scale * (values != 0), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return (values * self.scale)[self.indices]

    def right_inverse(self, weight: Tensor) -> Tensor:
        values = weight.new_zeros(len(self.scale))
        values.index_put_((self.indices.flatten(),), weight.detach().flatten())
        return values / self.scale.where(self.scale != 0, 1)
