"""Depthwise convolution: the same numbers as `nn.Conv2d`, by another way back."""

import pytest
import torch
from torch import Tensor, nn

from fbnas.space.depthwise import DepthwiseConv2d


def pair(kernel: int, stride: int, channels: int = 6) -> tuple[DepthwiseConv2d, nn.Conv2d]:
    torch.manual_seed(0)
    options = {"padding": kernel // 2, "groups": channels, "bias": False}
    ours = DepthwiseConv2d(channels, channels, kernel, stride, **options)
    plain = nn.Conv2d(channels, channels, kernel, stride, **options)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def gradients(layer: nn.Conv2d, images: Tensor) -> list[Tensor]:
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(images)
    towards = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    first = torch.autograd.grad(output, (images, layer.weight), towards, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (images, layer.weight))
    return [output, *first, *second]


def is_ours(output: Tensor) -> bool:
    return "_Depthwise" in type(output.grad_fn).__name__


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (3, 3), (2, 2), (9, 5), (1, 7)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_gradients_are_those_of_the_plain_layer(
    kernel: int, stride: int, size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    layers = pair(kernel, stride)
    images = torch.randn(4, 6, *size, generator=torch.Generator().manual_seed(2))
    images = images.contiguous(memory_format=memory_format)
    ours, plain = (gradients(layer.to(memory_format=memory_format), images) for layer in layers)
    assert is_ours(ours[0]) == (kernel > 3 and size[1] > kernel // 2)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_frozen_part_gets_no_gradient() -> None:
    ours, _ = pair(5, 1)
    images = torch.randn(2, 6, 8, 8)
    ours(images).sum().backward()
    assert images.grad is None and ours.weight.grad is not None
    ours.requires_grad_(False)
    assert not is_ours(ours(images.requires_grad_()))


def test_everything_but_training_is_plain() -> None:
    ours, plain = pair(5, 1)
    images = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        assert torch.equal(ours(images), plain(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ours(ours(images))
    traced = torch.jit.trace(ours, images)
    assert not any(node.kind() == "prim::PythonOp" for node in traced.graph.nodes())
    assert not is_ours(ours.double()(images.double()))


def test_a_bias_is_added_and_has_its_gradient() -> None:
    torch.manual_seed(0)
    ours = DepthwiseConv2d(6, 6, 5, padding=2, groups=6)
    plain = nn.Conv2d(6, 6, 5, padding=2, groups=6)
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(2, 6, 8, 8)
    for layer in (ours, plain):
        layer(images).square().sum().backward()
    assert "Add" in type(ours(images).grad_fn).__name__
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-4, atol=1e-4)
    for found, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-3)
