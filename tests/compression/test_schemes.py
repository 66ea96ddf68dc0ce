"""Grids of int8 files by their definition: scales and zero points as they are stored."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from random_images import random_images
from torch import Tensor, nn

from fbnas.compression import StaticQuantization, calibration_images, quantize_file
from fbnas.latency.lowering import write_onnx

DATA = random_images(3, 6)
LAYERS = 24  # so many that a zero point which the last bit of a float decides is seen to vary


@dataclass(frozen=True)
class Grid:
    """What a DequantizeLinear holds: its scale and zero point, and the codes where stored."""

    scale: np.ndarray
    zero: np.ndarray
    axis: int
    codes: np.ndarray | None

    def values(self) -> np.ndarray:
        """The numbers that the codes stand for."""
        shape = [-1] + [1] * (self.codes.ndim - 1)
        return (self.codes - self.zero.astype(float).reshape(shape)) * self.scale.reshape(shape)


def weighted(network: nn.Module) -> list[nn.Module]:
    return [module for module in network if isinstance(module, nn.Conv2d | nn.Linear)]


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    """Layers of which every fourth reads what is never negative, with weights not about zero."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for i in range(LAYERS - 1):
        modules += [nn.Conv2d(3 if i == 0 else 8, 8, 1), *[nn.ReLU()] * (i % 4 == 0)]
    network = nn.Sequential(*modules, nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    with torch.no_grad():
        for i, layer in enumerate(weighted(network)):
            nn.init.orthogonal_(layer.weight)  # so that the last layers have something to read
            layer.weight.add_(0.1 * (-1) ** i)
    return network


def read_by_layers(network: nn.Sequential, method: StaticQuantization) -> list[Tensor]:
    """What each layer with weights reads of the calibration images."""
    images = torch.cat([torch.from_numpy(x) for x in calibration_images(DATA, method)])
    found: list[Tensor] = []
    for module in network:
        found += [images] if module in weighted(network) else []
        with torch.no_grad():
            images = module(images)
    return found


def grids(
    network: nn.Sequential, method: StaticQuantization, folder: Path
) -> list[tuple[Grid, Grid]]:
    """What a layer reads and its weights, layer by layer, of the int8 file."""
    write_onnx(network, (3, 6, 6), folder / "fp32.onnx", batch=None)
    quantize_file(folder / "fp32.onnx", folder / "int8.onnx", DATA, method)
    graph = onnx.load(folder / "int8.onnx").graph
    stored = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":  # by the grid by which it is read again
            assert [x.input[1:] for x in graph.node if node.output[0] in x.input] == [
                node.input[1:]
            ]
        if node.op_type == "DequantizeLinear":
            axis = next((x.i for x in node.attribute if x.name == "axis"), 1)
            scale, zero = (stored[name] for name in node.input[1:])
            found[node.output[0]] = Grid(scale, zero, axis, stored.get(node.input[0]))
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == LAYERS
    return [(found[layer.input[0]], found[layer.input[1]]) for layer in layers]


def ends(values: Tensor) -> tuple[float, float]:
    """The least and the largest, and 0 between them: it has a code of its own."""
    return min(float(values.min()), 0.0), max(float(values.max()), 0.0)


@pytest.mark.parametrize("activations", ["asymmetric", "symmetric"])
def test_activations_have_the_scale_and_the_zero_point_of_their_scheme(
    network: nn.Sequential, activations: str, tmp_path: Path
) -> None:
    """uint8: code = x / scale + zero.

    asymmetric: 255 steps from the least to the largest. symmetric: zero is 128, and 127 steps
    reach max |x|; of what is never negative zero is 0, and 255 steps reach the largest.
    """
    method = StaticQuantization(activations=activations)
    read = read_by_layers(network, method)
    assert {float(x.min()) < 0 for x in read} == {True, False}
    for (grid, _), values in zip(grids(network, method, tmp_path), read, strict=True):
        low, high = ends(values)
        assert grid.zero.dtype == np.uint8
        assert grid.scale.shape == grid.zero.shape == ()
        if activations == "asymmetric":
            assert grid.scale == pytest.approx((high - low) / 255, rel=1e-4)
            assert abs(int(grid.zero) + low / grid.scale) < 0.51  # the nearest whole number
        else:
            zero, steps = (0, 255) if low == 0 else (128, 127)
            assert (grid.zero, grid.scale) == (
                zero,
                pytest.approx(max(-low, high) / steps, rel=1e-4),
            )


@pytest.mark.parametrize(
    ("weights", "per_channel"), [("symmetric", True), ("symmetric", False), ("asymmetric", False)]
)
def test_weights_have_the_scale_and_the_zero_point_of_their_scheme(
    network: nn.Sequential, weights: str, per_channel: bool, tmp_path: Path
) -> None:
    """int8: code = w / scale + zero.

    symmetric: zero is 0, and 127 steps reach max |w|, of each output channel or of the whole
    tensor. asymmetric: 255 steps from the least, which is -128, to the largest.
    """
    method = StaticQuantization(weights=weights, per_channel=per_channel, reduce_range=False)
    found = [grid for _, grid in grids(network, method, tmp_path)]
    for grid, layer in zip(found, weighted(network), strict=True):
        exact = layer.weight.detach()
        low, high = ends(exact)
        assert grid.zero.dtype == grid.codes.dtype == np.int8
        assert grid.scale.shape == grid.zero.shape == ((len(exact),) if per_channel else ())
        if weights == "symmetric":
            largest = exact.abs().flatten(1).amax(1) if per_channel else exact.abs().max()
            assert grid.scale == pytest.approx(largest.numpy() / 127, rel=1e-5)
            assert not grid.zero.any()
        else:
            assert grid.scale == pytest.approx((high - low) / 255, rel=1e-5)
            assert abs(int(grid.zero) + 128 + low / grid.scale) < 0.51
        assert not per_channel or grid.axis == 0
        step = grid.scale.reshape([-1] + [1] * (exact.ndim - 1))
        assert (np.abs(grid.values() - exact.numpy()) < 0.51 * step + 1e-9).all()
    assert any(grid.zero.any() for grid in found) == (weights == "asymmetric")
