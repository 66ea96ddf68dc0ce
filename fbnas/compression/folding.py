"""Batch normalisation folded into the convolution or linear layer before it."""

import torch
from torch import nn

from fbnas.compression.dataflow import layer_calls


@torch.no_grad()
def fold_bn_(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Fold in place every normalisation that alone takes what a layer gives out.

    w' = w gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta, by filter; an
    identity takes the normalisation's place. The network computes the same in eval mode. Those of
    layers that are called more than once stay. (Jacob et al. 2018, arXiv 1712.05877, section 3.2)

    Args:
        input_shape: (c, h, w) of one image.

    Returns:
        The names of the normalisations that are gone.
    """
    folded = []
    for call in layer_calls(model, input_shape):
        layer, norm = call.layer, call.norm
        if norm is None or not call.once:
            continue
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        bias = -norm.running_mean.double()
        if layer.bias is not None:
            bias = bias + layer.bias.double()
        if norm.affine:
            scale = scale * norm.weight.double()
        bias = bias * scale + (norm.bias.double() if norm.affine else 0)
        by_filter = scale.view(-1, *[1] * (layer.weight.ndim - 1))
        layer.weight.copy_(layer.weight.double() * by_filter)
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
        model.set_submodule(call.norm_name, nn.Identity())
        folded.append(call.norm_name)
    return tuple(folded)
