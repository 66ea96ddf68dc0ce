"""Strided 1x1 convolution: the same numbers as `nn.Conv2d`, and a process that lives on."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fbnas.space.blocks import BLOCKS, build_block, register_block
from fbnas.space.pointwise import PointwiseConv2d
from fbnas.space.structure import factored

STEP = """
import torch
from fbnas.space import build_block
images = torch.randn(64, 8, 64, 64).contiguous(memory_format=torch.channels_last)
block = build_block("skip", 8, 16, 2)
for _ in range(3):
    block(images).square().sum().backward()
print("alive")
"""


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (9, 5), (1, 3)])
@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_numbers_are_those_of_the_plain_layer(
    stride: int | tuple[int, int], size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    ours = PointwiseConv2d(6, 4, 1, stride)
    plain = nn.Conv2d(6, 4, 1, stride)
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(2, 6, *size)
    found = []
    for layer, form in ((ours, memory_format), (plain, torch.contiguous_format)):
        given = images.contiguous(memory_format=form).requires_grad_()
        output = layer(given)
        gradients = torch.autograd.grad(output.square().sum(), [given, *layer.parameters()])
        found.append([output, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_users_block_is_as_safe() -> None:
    register_block("shortcut")(lambda i, o, s: nn.Sequential(nn.Conv2d(i, o, 1, s), nn.ReLU()))
    assert isinstance(build_block("shortcut", 8, 16, 2)[0], PointwiseConv2d)
    assert type(build_block("shortcut", 8, 16, 1)[0]) is nn.Conv2d
    BLOCKS.pop("shortcut")


def test_a_factored_layer_is_as_safe() -> None:
    assert isinstance(factored(PointwiseConv2d(8, 16, 1, 2), rank=4)[0], PointwiseConv2d)


def test_files_hold_one_strided_layer() -> None:
    layer, images = PointwiseConv2d(6, 4, 1, 2), torch.randn(1, 6, 8, 8)
    nodes = {node.kind() for node in torch.jit.trace(layer, images).inlined_graph.nodes()}
    assert "aten::slice" not in nodes


def test_the_weight_gradient_does_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
