"""Batch normalisation folded into the convolution or linear layer before it."""

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fbnas.errors import InputError

LARGEST_DIFFERENCE = 1e-3  # of scores after folding, relative to the largest; rounding is 1e-6


def fold_bn_(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Fold in place, in eval mode's sense; returns the names of the normalisations that are gone.

    w' = w gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta; an identity
    takes the normalisation's place. One that follows no convolution or linear layer stays. (Jacob
    et al. 2018, arXiv 1712.05877, section 3.2)

    Raises:
        InputError: the scores change, because something else uses what the convolution returns.
    """
    images = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    images = images.to(next(model.parameters()).device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    pairs = _pairs(model, images)
    with torch.no_grad():
        expected = model(images)
        for name, layer, norm in pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            statistics = norm.running_mean, norm.running_var, norm.eps
            weight, bias = fuse_conv_bn_weights(
                layer.weight, layer.bias, *statistics, norm.weight, norm.bias
            )
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
            model.set_submodule(name, nn.Identity())
        found = model(images)
    for module, training in modes.items():
        module.training = training
    _check(expected, found)
    return tuple(name for name, _, _ in pairs)


Layer = nn.Conv2d | nn.Linear
Norm = nn.BatchNorm1d | nn.BatchNorm2d


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, Layer, Norm]]:
    """Normalisations by name, each with the layer whose output is its input, both used once."""
    made: dict[int, Layer] = {}
    kept: list[Tensor] = []
    calls: dict[nn.Module, int] = {}
    takers: dict[int, int] = {}
    found: list[tuple[Layer, Norm, int]] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        source = args[0]
        calls[module] = calls.get(module, 0) + 1
        takers[id(source)] = takers.get(id(source), 0) + 1
        kept.extend((source, output))
        if isinstance(module, Layer):
            made[id(output)] = module
        elif isinstance(module, Norm) and id(source) in made and module.track_running_stats:
            found.append((made[id(source)], module, id(source)))

    leaves = [m for m in names if next(m.children(), None) is None]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (names[norm], layer, norm)
        for layer, norm, key in found
        if calls[layer] == calls[norm] == 1 == takers[key] and names[norm]
    ]


def _check(expected: Tensor, found: Tensor) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= LARGEST_DIFFERENCE:
        raise InputError(
            f"Folding batch normalisation changes the scores by {difference:.1e} of the largest; "
            "expected the same: something else uses what a convolution returns. Give the "
            "normalisation an input of its own."
        )
