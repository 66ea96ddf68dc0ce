"""A part of a network without its batch normalisations, for statistics that change often."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Folded:
    """A part in eval mode whose batch normalisations are folded into the convolutions before them.

    On a CPU an eval pass takes half the time so. Only a normalisation that directly follows a
    convolution in an `nn.Sequential` is folded; any other one is given its statistics.

    Args:
        part: it stays as it is.
        fold: whether to; without, each normalisation is given its statistics.
    """

    def __init__(self, part: nn.Module, *, fold: bool = True) -> None:
        self.part = deepcopy(part).eval()
        self.given: Sequence[Tensor] | None = None  # that it is folded by
        norms = tracked(self.part)
        self.places = {norm: 2 * number for number, norm in enumerate(norms)}
        self.pairs = [(conv, deepcopy(conv), norm) for conv, norm in _pairs(self.part) if fold]
        for conv, _, _ in self.pairs:
            if conv.bias is None:
                conv.bias = nn.Parameter(conv.weight.new_zeros(len(conv.weight)), False)
        folded = {norm for _, _, norm in self.pairs}
        self.others = [norm for norm in norms if norm not in folded]
        for sequence in [m for m in self.part.modules() if isinstance(m, nn.Sequential)]:
            for name, module in sequence.named_children():
                if module in folded:
                    setattr(sequence, name, nn.Identity())

    def __call__(self, features: Tensor, statistics: Sequence[Tensor]) -> Tensor:
        """Run the part.

        Args:
            statistics: mean and variance of each batch normalisation in turn, each (channels,).
                Those of the call before, the same object, cost nothing.
        """
        if statistics is not self.given:
            self._fold(statistics)
            self.given = statistics
        return self.part(features)

    def _fold(self, statistics: Sequence[Tensor]) -> None:
        for norm in self.others:
            mean, variance = self._of(norm, statistics)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        for conv, before, norm in self.pairs:
            mean, variance = self._of(norm, statistics)
            scale = torch.rsqrt(variance + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight
            shift = -mean if before.bias is None else before.bias - mean
            assert conv.bias is not None
            conv.bias.copy_(shift * scale if norm.bias is None else shift * scale + norm.bias)
            conv.weight.copy_(before.weight * scale.view(-1, *[1] * (before.weight.dim() - 1)))

    def _of(self, norm: _BatchNorm, statistics: Sequence[Tensor]) -> Sequence[Tensor]:
        place = self.places[norm]
        return statistics[place : place + 2]


def folded(part: nn.Module, features: Tensor, statistics: Sequence[Tensor]) -> Folded:
    """Fold a part, unless its forward pass is such that these features then come to something else.

    Args:
        features: (n, channels, height, width), some that it may meet.
        statistics: as `Folded` takes them.
    """
    made, plain = Folded(part), Folded(part, fold=False)
    some = features[:2]
    expected = plain(some, statistics)
    close = torch.allclose(made(some, statistics), expected, rtol=1e-3, atol=1e-4)
    return made if close else plain


def tracked(part: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalisations that hold statistics, in turn."""
    norms = [m for m in part.modules() if isinstance(m, _BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


def _pairs(part: nn.Module) -> Iterator[tuple[nn.Conv2d, _BatchNorm]]:
    """Convolutions with the batch normalisation that directly follows, each used in one place."""
    used = [m for parent in part.modules() for m in parent.children()]
    norms = tracked(part)
    for sequence in part.modules():
        if isinstance(sequence, nn.Sequential):
            for conv, norm in pairwise(sequence):
                if not isinstance(conv, nn.Conv2d) or not isinstance(norm, _BatchNorm):
                    continue
                if norm in norms and used.count(conv) == used.count(norm) == 1:
                    yield conv, norm
