"""Blocks of one layer begin as one function, so that the layers after it meet features they know.

A block with a residual begins as the identity (`initialise_`). Where a layer changes the shape
there is none: nine blocks with weights of their own make nine unrelated sets of features, and
layers behind several of these see other features each step, of which they can learn nothing. In
space `fbnet_cifar`, seven such layers among 22, at 16x16, 300 steps on sampled paths left the
accuracy on 4,000 images of CIFAR-10 at chance; with aligned blocks it came to 21 % (one seed, by a
loop that was not kept; scripts/gpu has a whole search with them).
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from fbnas.space.blocks import ConvBN, InvertedResidual


@torch.no_grad()
def align_(blocks: Collection[nn.Module]) -> None:
    """Let the blocks of a layer without residuals begin as the same projection, in place.

    An inverted residual begins with the input as the first of its channels, the middle pixel of
    each as its depthwise convolution, and the projection of these; its other channels begin as they
    are and count for nothing yet. The 1x1 convolution of a skip begins as the projection alone.
    Blocks of other kinds stay as they are.

    The projection is drawn from torch's global generator: He normal, zero where a grouped block
    among them does not connect an output to an input.
    """
    inverted = [block for block in blocks if isinstance(block, InvertedResidual)]
    if not inverted:
        return
    connected = torch.stack([_connected(block) for block in inverted]).all(dim=0)
    projection = nn.init.kaiming_normal_(torch.empty(connected.shape), mode="fan_out") * connected
    for block in blocks:
        if isinstance(block, InvertedResidual):
            _begin_as_(block, projection)
        elif isinstance(block, ConvBN) and _convolution(block).kernel_size == (1, 1):
            _convolution(block).weight.copy_(projection[:, :, None, None])


def _begin_as_(block: InvertedResidual, projection: Tensor) -> None:
    expand, depthwise, project = map(_convolution, (block.expand, block.depthwise, block.project))
    rows, places = _places(block)
    inputs = torch.arange(len(rows))
    expand.weight[rows] = 0
    expand.weight[rows, inputs % expand.weight.shape[1]] = 1
    middle = depthwise.kernel_size[0] // 2
    depthwise.weight[places] = 0
    depthwise.weight[places, 0, middle, middle] = 1
    outputs, inputs = _connected(block).nonzero(as_tuple=True)
    project.weight.zero_()
    columns = places[inputs] % project.weight.shape[1]
    project.weight[outputs, columns, 0, 0] = projection[outputs, inputs]


def _connected(block: InvertedResidual) -> Tensor:
    """(outputs, inputs): whether the channel that carries an input reaches an output."""
    project = _convolution(block.project)
    group_of_input = _places(block)[1] // project.weight.shape[1]
    group_of_output = torch.arange(project.out_channels) // (project.out_channels // project.groups)
    return group_of_output[:, None] == group_of_input[None, :]


def _places(block: InvertedResidual) -> tuple[Tensor, Tensor]:
    """Return the channel that carries each input, before and after the shuffle."""
    expand = _convolution(block.expand)
    groups, width = expand.groups, expand.out_channels // expand.groups
    inputs = torch.arange(expand.in_channels)
    group, within = inputs // expand.weight.shape[1], inputs % expand.weight.shape[1]
    return group * width + within, within * groups + group


def _convolution(part: ConvBN) -> nn.Conv2d:
    convolution = part[0]
    assert isinstance(convolution, nn.Conv2d)
    return convolution
