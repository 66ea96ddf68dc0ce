"""Images of noise, for tests in which the pixels do not matter."""

import torch

from fbnas.training.data import Data, TensorImages


def random_images(channels: int, side: int, *, classes: int = 10, count: int = 64) -> Data:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(
        0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8
    )
    images = TensorImages(pixels, torch.randint(0, classes, (count,), generator=generator))
    return Data(
        name="noise",
        class_names=tuple(map(str, range(classes))),
        channels=channels,
        resolution=side,
        train=images,
        validation=images,
        load_test=lambda: images,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )
