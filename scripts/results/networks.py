"""The known families that a searched network is held against, each with a width multiplier.

Built from plain layers, as their papers and the kept libraries (torchvision, timm) define them, and
checked against the published counts (tests/test_results.py). Left out: dropout, which the recipe
of all other networks here has not either.

The five strides of 2 are made for 224 pixels, which leave 7x7. For small images the first ones are
dropped, as is usual on CIFAR, until the last map is 4x4 or larger: 32 pixels keep three, 16 two.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.space.blocks import ChannelShuffle
from fbnas.space.depthwise import DepthwiseConv2d
from fbnas.space.network import initialise_

STRIDES = 5
SMALLEST_MAP = 4

# MobileNetV1, table 1: channels of a depthwise separable layer, and whether it reduces.
V1 = (
    *((64, False), (128, True), (128, False), (256, True), (256, False), (512, True)),
    *[(512, False)] * 5,
    *((1024, True), (1024, False)),
)
# Rows of (expansion, channels, layers, kernel, whether the first layer reduces).
V2 = (  # MobileNetV2, table 2
    (1, 16, 1, 3, False),
    (6, 24, 2, 3, True),
    (6, 32, 3, 3, True),
    (6, 64, 4, 3, True),
    (6, 96, 3, 3, False),
    (6, 160, 3, 3, True),
    (6, 320, 1, 3, False),
)
LITE0 = (  # EfficientNet, table 1, without squeeze and excitation
    (1, 16, 1, 3, False),
    (6, 24, 2, 3, True),
    (6, 40, 2, 5, True),
    (6, 80, 3, 3, True),
    (6, 112, 3, 5, False),
    (6, 192, 4, 5, True),
    (6, 320, 1, 3, False),
)
SHUFFLE_WIDTHS = (0, 0.5, 1.0, 1.5, 2.0)  # ShuffleNetV2, table 5
SHUFFLE_CHANNELS = (0, 48, 116, 176, 244)  # of its first stage; each further one doubles them
SHUFFLE_LAYERS = (4, 8, 4)


def strides(resolution: int) -> list[int]:
    """Strides of the five places that reduce, first to last: 1 where dropped."""
    kept = min(STRIDES, int(math.log2(max(resolution / SMALLEST_MAP, 1))))
    return [1] * (STRIDES - kept) + [2] * kept


def divisible(channels: float) -> int:
    """The nearest multiple of 8, not 10 % below; as both MobileNets' own code rounds."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def conv(
    inside: int,
    outside: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    depthwise: bool = False,
    activation: type[nn.Module] | None = nn.ReLU6,
) -> nn.Sequential:
    """Convolution without bias, batch normalisation, activation: (n, inside, H, W) to outside."""
    return nn.Sequential(
        (DepthwiseConv2d if depthwise else nn.Conv2d)(
            inside,
            outside,
            kernel,
            stride,
            padding=kernel // 2,
            groups=inside if depthwise else 1,
            bias=False,
        ),
        nn.BatchNorm2d(outside),
        *([activation(inplace=True)] if activation else []),
    )


def classifier(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def mobilenet_v1(width: float, resolution: int, classes: int) -> nn.Sequential:
    """Howard et al. 2017 (arXiv 1704.04861); all channels are multiplied, the last ones too."""
    left = iter(strides(resolution))
    channels = divisible(32 * width)
    layers: list[nn.Module] = [conv(3, channels, 3, next(left), activation=nn.ReLU)]
    for wide, reduces in V1:
        outside = divisible(wide * width)
        stride = next(left) if reduces else 1
        layers += [
            conv(channels, channels, 3, stride, depthwise=True, activation=nn.ReLU),
            conv(channels, outside, activation=nn.ReLU),
        ]
        channels = outside
    return initialise_(nn.Sequential(*layers, *classifier(channels, classes)))


class InvertedBottleneck(nn.Module):
    """Expand by 1x1 (where expansion > 1), KxK depthwise, 1x1; plus the input where shapes allow.

    The last normalisation of a residual block begins at zero, as in fbnas' own blocks.
    """

    def __init__(self, inside: int, outside: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inside * expansion
        project = conv(hidden, outside, activation=None)
        self.body = nn.Sequential(
            *([conv(inside, hidden)] if expansion > 1 else []),
            conv(hidden, hidden, kernel, stride, depthwise=True),
            project,
        )
        self.residual = stride == 1 and inside == outside
        if self.residual:
            nn.init.zeros_(project[1].weight)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return images + features if self.residual else features


def inverted(
    rows: tuple[tuple[int, int, int, int, bool], ...], width: float, resolution: int, classes: int
) -> nn.Sequential:
    """MobileNetV2's scheme; the 1280 last channels grow with the width but never shrink."""
    left = iter(strides(resolution))
    channels = divisible(32 * width)
    layers: list[nn.Module] = [conv(3, channels, 3, next(left))]
    for expansion, wide, count, kernel, reduces in rows:
        outside = divisible(wide * width)
        for place in range(count):
            stride = next(left) if reduces and place == 0 else 1
            layers.append(InvertedBottleneck(channels, outside, expansion, kernel, stride))
            channels = outside
    last = divisible(1280 * max(width, 1.0))
    return initialise_(nn.Sequential(*layers, conv(channels, last), *classifier(last, classes)))


def mobilenet_v2(width: float, resolution: int, classes: int) -> nn.Sequential:
    """Sandler et al. 2018 (arXiv 1801.04381), as torchvision builds it."""
    return inverted(V2, width, resolution, classes)


def efficientnet_lite(width: float, resolution: int, classes: int) -> nn.Sequential:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946; Google's lite variant, as in timm).

    Other widths multiply its channels as MobileNetV2 does: the published Lite1 to Lite4 are deeper
    and larger in resolution too.
    """
    return inverted(LITE0, width, resolution, classes)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: half of the channels passes by, or, where it `begins` a stage, two ways.

    (n, inside, H, W) to (n, outside, H / stride, W / stride).
    """

    def __init__(self, inside: int, outside: int, stride: int, *, begins: bool) -> None:
        super().__init__()
        half = outside // 2
        self.begins = begins
        self.near = nn.Identity()
        if begins:
            self.near = nn.Sequential(
                conv(inside, inside, 3, stride, depthwise=True, activation=None),
                conv(inside, half, activation=nn.ReLU),
            )
        self.far = nn.Sequential(
            conv(inside if begins else half, half, activation=nn.ReLU),
            conv(half, half, 3, stride, depthwise=True, activation=None),
            conv(half, half, activation=nn.ReLU),
        )
        self.shuffle = ChannelShuffle(2)

    def forward(self, images: Tensor) -> Tensor:
        near, far = (images, images) if self.begins else images.chunk(2, dim=1)
        return self.shuffle(torch.cat([self.near(near), self.far(far)], dim=1))


def shufflenet_v2(width: float, resolution: int, classes: int) -> nn.Sequential:
    """Ma et al. 2018 (arXiv 1807.11164), as torchvision builds it.

    The first stage's channels are interpolated between the published widths; 24 in the stem and
    1024 at the end (2048 from width 2 on) stay.
    """
    first, second, *left = strides(resolution)
    outside = max(4, round(np.interp(width, SHUFFLE_WIDTHS, SHUFFLE_CHANNELS) / 4) * 4)
    layers: list[nn.Module] = [conv(3, 24, 3, first, activation=nn.ReLU)]
    if second == 2:
        layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 24
    for count, stride in zip(SHUFFLE_LAYERS, left, strict=True):
        for place in range(count):
            begins = place == 0
            layers.append(ShuffleUnit(channels, outside, stride if begins else 1, begins=begins))
            channels = outside
        outside *= 2
    last = 2048 if width >= 2 else 1024
    return initialise_(
        nn.Sequential(*layers, conv(channels, last, activation=nn.ReLU), *classifier(last, classes))
    )


FAMILIES: dict[str, Callable[[float, int, int], nn.Sequential]] = {
    "MobileNetV1": mobilenet_v1,
    "MobileNetV2": mobilenet_v2,
    "ShuffleNetV2": shufflenet_v2,
    "EfficientNet-Lite": efficientnet_lite,
}
