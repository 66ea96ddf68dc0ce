"""Strided 1x1 convolution that does not end the process in training."""

import torch
from torch import Tensor, nn
from torch.nn import functional

REGISTER = 16  # float32 in one of AVX-512


class PointwiseConv2d(nn.Conv2d):
    """A strided 1x1 `nn.Conv2d` that, in training on a CPU, leaves out first what it skips.

    The numbers are the same. With fewer input channels than a vector register holds, oneDNN's
    weight gradient of the strided layer, of images that lie channels last, writes past its memory:
    it is wrong, or the process dies (oneDNN issue 6035, open on 2026-11-26; torch 2.13.0, AVX-512).
    Everything else (other devices, tracing, more channels, the forward pass alone) is `nn.Conv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_unsafe(input, weight):
            rows, columns = self.stride
            return functional.conv2d(
                input[..., ::rows, ::columns], weight, bias, 1, 0, 1, self.groups
            )
        return super()._conv_forward(input, weight, bias)

    def _is_unsafe(self, input: Tensor, weight: Tensor) -> bool:
        return (
            not torch.jit.is_tracing()
            and not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and weight.requires_grad
            and weight.shape[1] < REGISTER
            and weight.shape[2:] == (1, 1)
            and self.stride != (1, 1)
            and self.padding == (0, 0)
            and input.device.type == "cpu"
        )


def secure_(block: nn.Module) -> nn.Module:
    """Make the plain strided 1x1 convolutions of a block, a user's own too, safe; return it."""
    for module in block.modules():
        plain = type(module) is nn.Conv2d
        if plain and module.kernel_size == (1, 1) and module.stride != (1, 1):
            module.__class__ = PointwiseConv2d
    return block
