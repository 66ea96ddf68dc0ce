"""Depthwise convolution whose training step is fast on CPUs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FAST_COLUMNS = 3  # of a kernel: oneDNN 3.x has a fast weight gradient up to that width only


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise `nn.Conv2d` that finds the weight gradient of wide kernels by narrow ones.

    The gradient of a 5x5 kernel is that of a 5x3 and of a 5x2 kernel on the input moved by three
    columns, for which oneDNN has fast code. The gradient of the input is a forward pass of the
    kernel turned by 180 degrees where nothing is strided. Everything else (other devices, dtypes,
    autocast, tracing, and the forward pass) is `nn.Conv2d`.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_slow(input, weight):
            found = _Depthwise.apply(input, weight, self.stride, self.padding)
            return found if bias is None else found + bias[:, None, None]
        return super()._conv_forward(input, weight, bias)

    def _is_slow(self, input: Tensor, weight: Tensor) -> bool:
        return (
            not torch.jit.is_tracing()
            and not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and weight.requires_grad
            and weight.shape[-1] > FAST_COLUMNS
            and weight.shape[1] == 1 == weight.shape[0] // self.groups
            and self.dilation == (1, 1)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and input.device.type == "cpu"
            and input.dim() == 4
            and input.shape[-1] > weight.shape[-1] // 2  # every part of the kernel meets the input
            and input.dtype == weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(images, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        images, weight = ctx.saved_tensors
        rows, columns = ctx.padding
        of_images = of_weight = None
        if ctx.needs_input_grad[0] and _is_its_own_transpose(weight, ctx.stride, ctx.padding):
            turned = weight.flip(2, 3)
            of_images = functional.conv2d(gradient, turned, None, 1, ctx.padding, 1, len(weight))
        elif ctx.needs_input_grad[0]:
            of_images = _gradients(gradient, images, weight, ctx.stride, ctx.padding)[0]
        if ctx.needs_input_grad[1]:
            below = _missing(images, gradient, weight, dim=2, start=-rows, stride=ctx.stride[0])
            parts: list[Tensor] = []
            for part in weight.contiguous().split(FAST_COLUMNS, dim=3):
                start = FAST_COLUMNS * len(parts) - columns  # of the part's first column
                right = _missing(images, gradient, part, dim=3, start=start, stride=ctx.stride[1])
                # padded here, because oneDNN is slow too where the kernel hangs over small images
                moved = functional.pad(images, (-start, right, rows, below))  # below 0 crops
                parts.append(
                    _gradients(gradient, moved, part, ctx.stride, (0, 0), of_weight=True)[1]
                )
            of_weight = torch.cat(parts, dim=3)
        return of_images, of_weight, None, None


def _is_its_own_transpose(
    weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> bool:
    """Whether input and output have the same shape, so that the transpose is such a layer too."""
    return stride == (1, 1) and all(
        size == 2 * p + 1 for size, p in zip(weight.shape[2:], padding, strict=True)
    )


def _missing(
    images: Tensor, gradient: Tensor, weight: Tensor, *, dim: int, start: int, stride: int
) -> int:
    """How far the kernel reaches over the end of the images, starting before or after theirs."""
    return start + (gradient.shape[dim] - 1) * stride + weight.shape[dim] - images.shape[dim]


def _gradients(
    gradient: Tensor,
    images: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    *,
    of_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the images, or of the weight, in its place of a triple."""
    return torch.ops.aten.convolution_backward(
        gradient,
        images,
        weight,
        None,
        stride,
        padding,
        (1, 1),
        False,
        (0, 0),
        len(weight),
        (not of_weight, of_weight, False),
    )
