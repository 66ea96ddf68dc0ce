"""Which single weights become zero: the smallest of the layers that are pruned."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from fbnas.errors import InputError, check_known

CONVOLUTION, DEPTHWISE, LINEAR = "convolution", "depthwise", "linear"
KINDS = (CONVOLUTION, DEPTHWISE, LINEAR)

Layers = Mapping[str, nn.Conv2d | nn.Linear]


def kind_of(layer: nn.Conv2d | nn.Linear) -> str:
    """Return which of KINDS a layer is; depthwise: every filter sees a single channel of many."""
    if isinstance(layer, nn.Linear):
        return LINEAR
    return DEPTHWISE if layer.groups > 1 and layer.weight.shape[1] == 1 else CONVOLUTION


def prunable(
    model: nn.Module, *, kinds: Collection[str] = KINDS, min_weights: int = 0
) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the layers to prune by name, in the network's order.

    Biases and batch normalisation are never among the weights: they are few, and what is pruned in
    the literature are connections.

    Args:
        kinds: those of KINDS.
        min_weights: leave smaller layers alone.

    Raises:
        InputError: there is no such layer.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and kind_of(module) in kinds
        and module.weight.numel() >= min_weights
    }
    if not found:
        raise InputError(
            f"The network has no layer of kind {' or '.join(kinds)} with at least {min_weights} "
            "weights; expected one to prune. Name more kinds, or lower min_weights."
        )
    return found


@torch.no_grad()
def zero_smallest_(
    layers: Layers,
    sparsity: float,
    *,
    each: bool = False,
    scales: Mapping[str, float] | None = None,
    max_sparsity: float = 1.0,
) -> None:
    """Zero the smallest |w| / scale in place, so that round(sparsity * weights) are zero.

    Weights that are zero already come first. What is zeroed is an exact number, also among equal
    magnitudes.

    Args:
        sparsity: the fraction of all weights of the layers that is zero afterwards.
        each: that fraction of every layer, instead of all ranked against each other.
        scales: of a layer's magnitudes, by its name: its threshold (Han et al. 2015, arXiv
            1506.02626). All thresholds times one factor are what then tells zeros apart.
        max_sparsity: no layer loses more; the number asked for is missed where that forbids it.
    """
    groups = [{name: layer} for name, layer in layers.items()] if each else [layers]
    for group in groups:
        scores = [
            _scores(layer.weight, scales[name] if scales else 1.0, max_sparsity)
            for name, layer in group.items()
        ]
        joined = torch.cat(scores)
        count = min(round(sparsity * len(joined)), int(joined.isfinite().sum()))
        zeroed = torch.zeros_like(joined, dtype=torch.bool)
        zeroed[joined.argsort(stable=True)[:count]] = True
        parts = zeroed.split([len(part) for part in scores])
        for layer, part in zip(group.values(), parts, strict=True):
            layer.weight.masked_fill_(part.view(layer.weight.shape), 0.0)


def _scores(weight: Tensor, scale: float, max_sparsity: float) -> Tensor:
    """Return |w| / scale, flat in float64, infinite where the weight must stay."""
    magnitudes = weight.abs().flatten()
    most = int(max_sparsity * len(magnitudes) + 1e-9)
    scores = magnitudes.double() / scale
    scores[magnitudes.argsort(stable=True)[most:]] = torch.inf
    return scores


def sparsity_of(layers: Layers) -> float:
    """Return the fraction of the layers' weights that is zero."""
    total = sum(layer.weight.numel() for layer in layers.values())
    return 1 - sum(int(layer.weight.count_nonzero()) for layer in layers.values()) / total


def gradual(begin: float, end: float, steps: int) -> list[float]:
    """Return the sparsity after each step, the last being `end`.

    s_t = s_end + (s_begin - s_end) * (1 - t / steps)^3 for t = 1 .. steps: much while weights are
    redundant, less and less when few are left (Zhu & Gupta 2017, arXiv 1710.01878, section 3).
    """
    return [end + (begin - end) * (1 - t / steps) ** 3 for t in range(1, steps + 1)]


def check_fraction(name: str, value: float) -> None:
    """Refuse what is no fraction of weights to prune.

    Raises:
        InputError: it is not at least 0 and less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{name} is {value}; expected a fraction, 0 <= {name} < 1.")


def check_layers(kinds: Collection[str], min_weights: int) -> tuple[str, ...]:
    """Return the kinds as a tuple.

    Raises:
        InputError: an unknown kind, none, or a negative size.
    """
    if isinstance(kinds, str) or not kinds:
        raise InputError(f"kinds is {kinds!r}; expected a list of {', '.join(KINDS)}.")
    check_known("kind of layer", kinds, KINDS)
    if min_weights < 0:
        raise InputError(f"min_weights is {min_weights}; expected a whole number of at least 0.")
    return tuple(kinds)
