"""The paper's two networks, its densities and bits, and the images they are trained on."""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.compression import Applied, Method, Tools
from fbnas.training.data import Data, Subset, TensorImages

VALIDATION = 5000  # of the 60,000 training images


@dataclass(frozen=True)
class Paper:
    """What Han et al. 2016 (arXiv 1510.00149) report: tables 1, 2 and 3.

    density: of each layer's weights that stay, by its place among the weighted layers.
    error: the top-1 error before and after. ratio: of the sizes.
    """

    density: tuple[float, ...]
    conv_bits: int
    linear_bits: int
    error: tuple[float, float]
    ratio: int


PAPER = {
    "lenet_300_100": Paper((0.08, 0.09, 0.26), 6, 6, (0.0164, 0.0158), 40),
    "lenet_5": Paper((0.66, 0.12, 0.08, 0.19), 8, 5, (0.0080, 0.0074), 39),
}


def lenet(name: str) -> nn.Sequential:
    """Build LeNet-300-100, or Caffe's LeNet-5 (20 and 50 filters of 5x5, 500 units)."""
    if name == "lenet_300_100":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 300), nn.ReLU(),
            nn.Linear(300, 100), nn.ReLU(),
            nn.Linear(100, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(),
        nn.Linear(500, 10),
    )  # fmt: skip


def idx_data(name: str, folder: Path) -> Data:
    """Read MNIST or Fashion-MNIST in its own format; the last training images validate.

    Args:
        folder: holds train-images-idx3-ubyte.gz and the other three.
    """
    pixels, labels = _images(folder, "train")
    train = TensorImages(pixels, labels)
    places = torch.arange(len(labels))
    scaled = pixels[:-VALIDATION].double() / 255
    return Data(
        name=name,
        class_names=tuple(str(i) for i in range(10)),
        channels=1,
        resolution=28,
        train=Subset(train, places[:-VALIDATION]),
        validation=Subset(train, places[-VALIDATION:]),
        load_test=lambda: TensorImages(*_images(folder, "t10k")),
        mean=(float(scaled.mean()),),
        std=(float(scaled.std()),),
    )


def _images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return pixels (n, 1, 28, 28) and labels (n,)."""
    pixels = _idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = _idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(labels).long()


def _idx(path: Path) -> np.ndarray:
    """Read an IDX file: two zero bytes, type, dimensions, their sizes, bytes."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", dimensions, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


@dataclass(frozen=True)
class LayerDensities(Method):
    """Keep the stated fraction of each layer's weights, by magnitude, in steps with retraining.

    Step t of n keeps density**(t / n): the same fraction of what is left each time.
    """

    NAME = "layer_densities"
    SECTION = "none"

    density: tuple[float, ...]
    steps: int

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        trained = None
        for step in range(1, self.steps + 1):
            for layer, density in zip(layers, self.density, strict=True):
                kept = round(layer.weight.numel() * density ** (step / self.steps))
                magnitudes = layer.weight.detach().abs().flatten()
                smallest = magnitudes.argsort(stable=True)[: len(magnitudes) - kept]
                with torch.no_grad():
                    layer.weight.view(-1)[smallest] = 0.0
            trained = tools.tune(model)
        return Applied((), trained)
