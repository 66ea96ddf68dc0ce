"""The nine FBNet blocks and the registry that a user's own blocks join.

A block factory takes (in_channels, out_channels, stride) and returns a module that maps
(n, in_channels, H, W) to (n, out_channels, ceil(H / stride), ceil(W / stride)).
Source: Wu et al. 2019 (arXiv 1812.03443), table 2 and figure 3; the batch normalisations, which the
figure leaves out, as in the authors' code.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fbnas.errors import InputError, unknown
from fbnas.space.depthwise import DepthwiseConv2d
from fbnas.space.pointwise import secure_

BlockFactory = Callable[[int, int, int], nn.Module]
BLOCKS: dict[str, BlockFactory] = {}


def register_block(name: str) -> Callable[[BlockFactory], BlockFactory]:
    """Register a block factory under `name`, for use in a space file's `blocks`.

    Raises:
        ValueError: the name is taken by another factory; both are named.
    """

    def register(factory: BlockFactory) -> BlockFactory:
        taken = BLOCKS.get(name)
        if taken is not None and _origin(taken) != _origin(factory):
            raise ValueError(
                f"Block '{name}' is registered twice: {_origin(taken)} and {_origin(factory)}."
            )
        BLOCKS[name] = factory
        return factory

    return register


def _origin(factory: BlockFactory) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


def build_block(name: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Build one block.

    Raises:
        InputError: unknown block, or channels that its groups do not divide.
    """
    if name not in BLOCKS:
        raise unknown("block", name, BLOCKS)
    return secure_(BLOCKS[name](in_channels, out_channels, stride))


class ConvBN(nn.Sequential):
    """Convolution without bias, batch normalisation and, unless `relu` is off, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        depthwise = groups == in_channels == out_channels > 1
        super().__init__(
            (DepthwiseConv2d if depthwise else nn.Conv2d)(
                in_channels,
                out_channels,
                kernel,
                stride,
                padding=kernel // 2,
                groups=groups,
                bias=False,
            ),
            nn.BatchNorm2d(out_channels),
            *([nn.ReLU(inplace=True)] if relu else []),
        )


class ChannelShuffle(nn.Module):
    """Interleave the channels of `groups` groups: (n, g * c, H, W) to (n, c * g, H, W).

    Source: Zhang et al. 2018 (ShuffleNet, arXiv 1707.01083), section 3.1.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, images: Tensor) -> Tensor:
        # -1 for the batch keeps shape arithmetic out of exported graphs with a dynamic batch.
        _, channels, height, width = images.shape
        grouped = images.reshape(-1, self.groups, channels // self.groups, height, width)
        return grouped.transpose(1, 2).reshape(-1, channels, height, width)


class WaveletSplit(nn.Module):
    """One level of the Haar wavelet: (n, c, H, W) to (n, 4 c, H / 2, W / 2), H and W even.

    Of each channel its low-frequency half-size image (a mean of 2x2 pixels, times 2), then three of
    high frequencies: columns, rows and diagonals. Nothing is lost: the transform is orthonormal.
    Source: Haar 1910; Mallat 1989.
    """

    haar: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        signs = torch.tensor(
            [
                [[1.0, 1.0], [1.0, 1.0]],
                [[1.0, -1.0], [1.0, -1.0]],
                [[1.0, 1.0], [-1.0, -1.0]],
                [[1.0, -1.0], [-1.0, 1.0]],
            ]
        )
        kernel = (signs / 2).unsqueeze(1).repeat(channels, 1, 1, 1)  # (4 c, 1, 2, 2)
        self.register_buffer("haar", kernel, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        haar = self.haar.to(images.dtype)
        return nn.functional.conv2d(images, haar, stride=2, groups=len(haar) // 4)


class InvertedResidual(nn.Module):
    """1x1 conv (C_in to e * C_in), KxK depthwise conv, 1x1 conv (to C_out), plus the input.

    The input is added if and only if stride == 1 and C_in == C_out; no activation follows.
    The expansion is present for e = 1 too. With groups > 1 both 1x1 convolutions are grouped and a
    channel shuffle follows the first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        expansion: int,
        kernel: int,
        groups: int = 1,
    ) -> None:
        super().__init__()
        for channels in (in_channels, out_channels):
            if channels % groups:
                raise InputError(
                    f"{channels} channels cannot be divided into {groups} groups; expected a "
                    f"multiple of {groups}: change the stage's channels or leave the grouped "
                    "blocks out."
                )
        middle = expansion * in_channels
        self.expand = ConvBN(in_channels, middle, groups=groups)
        self.shuffle = ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.depthwise = ConvBN(middle, middle, kernel=kernel, stride=stride, groups=middle)
        self.project = ConvBN(middle, out_channels, groups=groups, relu=False)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, images: Tensor) -> Tensor:
        features = self.project(self.depthwise(self.shuffle(self.expand(images))))
        return images + features if self.residual else features


def _inverted_residual(*, expansion: int, kernel: int, groups: int = 1) -> BlockFactory:
    def build(in_channels: int, out_channels: int, stride: int) -> nn.Module:
        return InvertedResidual(
            in_channels, out_channels, stride, expansion=expansion, kernel=kernel, groups=groups
        )

    return build


register_block("k3_e1")(_inverted_residual(kernel=3, expansion=1))
register_block("k3_e1_g2")(_inverted_residual(kernel=3, expansion=1, groups=2))
register_block("k3_e3")(_inverted_residual(kernel=3, expansion=3))
register_block("k3_e6")(_inverted_residual(kernel=3, expansion=6))
register_block("k5_e1")(_inverted_residual(kernel=5, expansion=1))
register_block("k5_e1_g2")(_inverted_residual(kernel=5, expansion=1, groups=2))
register_block("k5_e3")(_inverted_residual(kernel=5, expansion=3))
register_block("k5_e6")(_inverted_residual(kernel=5, expansion=6))


@register_block("skip")
def skip(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity; where the shape changes a strided 1x1 conv, BN, ReLU (the authors' code)."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return ConvBN(in_channels, out_channels, stride=stride)


def output_shape(block: nn.Module, in_channels: int, side: int) -> tuple[int, ...]:
    """Return (channels, height, width) of a block's output for a square input."""
    with torch.device("meta"):
        images = torch.empty(2, in_channels, side, side)
    with torch.no_grad():
        return tuple(block.to("meta")(images).shape[1:])
