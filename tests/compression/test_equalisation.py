"""Weight equalisation: the function stays, the ranges meet, int8 gains (Nagel et al. 2019)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from digits_network import Trained
from torch import nn

from fbnas.compression import StaticQuantization, equalise_, quantize_file
from fbnas.export import accuracy_of_file, export_onnx
from fbnas.latency.lowering import write_onnx
from fbnas.latency.profiling import enliven_
from fbnas.space import build_block

SHAPE = (8, 9, 9)


class Residual(nn.Module):
    """A layer whose output goes two ways, and a pair within one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.inside = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.after = nn.Conv2d(8, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.before(images)
        return self.after(features + self.inside(features))


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.LeakyReLU(0.1), nn.MaxPool2d(2),
        nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10), nn.ReLU(),
        nn.Linear(10, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many pairs it has
    "k3_e3": (lambda: build_block("k3_e3", 8, 16, 2), 2),
    "k5_e1_g2": (lambda: build_block("k5_e1_g2", 8, 8, 1), 2),  # channels are shuffled
    "classifier": (classifier, 3),  # maps become inputs of a linear layer
    "residual": (Residual, 1),
    "relu6": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1)), 0),
    "sigmoid": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 1)), 0),
}


def uneven(build: Callable[[], nn.Module]) -> nn.Module:
    """A network whose channels are of very different sizes."""
    torch.manual_seed(0)
    network = enliven_(build()).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                sizes = torch.exp(2 * torch.randn(len(module.weight)))
                module.weight *= sizes.reshape(-1, *[1] * (module.weight.dim() - 1))
    return network


def loaded(network: nn.Module, folder: Path) -> onnx.ModelProto:
    write_onnx(network, SHAPE, folder / "fp32.onnx", batch=None)
    return onnx.load(folder / "fp32.onnx")


def scores(model: onnx.ModelProto) -> np.ndarray:
    images = np.random.default_rng(0).standard_normal((5, *SHAPE)).astype(np.float32)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0]


def weight(model: onnx.ModelProto, layer: str) -> np.ndarray:
    name = next(node.input[1] for node in model.graph.node if node.name == layer)
    return onnx.numpy_helper.to_array(next(w for w in model.graph.initializer if w.name == name))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_every_pair_is_found(name: str, tmp_path: Path) -> None:
    build, expected = NETWORKS[name]
    model = loaded(uneven(build), tmp_path)
    before, weights = scores(model), [w.raw_data for w in model.graph.initializer]
    pairs = equalise_(model)
    assert len(pairs) == expected
    np.testing.assert_allclose(scores(model), before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
    moved = weights != [w.raw_data for w in model.graph.initializer]
    assert moved is (expected > 0)


def test_the_ranges_of_a_pair_meet_in_the_geometric_mean(tmp_path: Path) -> None:
    network = uneven(lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    model = loaded(network, tmp_path)
    (pair,) = equalise_(model)
    first, second = weight(model, pair.first), weight(model, pair.second)
    with torch.no_grad():
        r1 = network[0].weight.abs().amax((1, 2, 3)).numpy()
        r2 = network[2].weight.abs().amax((0, 2, 3)).numpy()
    np.testing.assert_allclose(np.abs(first).max((1, 2, 3)), np.sqrt(r1 * r2), rtol=1e-5)
    np.testing.assert_allclose(np.abs(second).max((0, 2, 3)), np.sqrt(r1 * r2), rtol=1e-5)


def test_a_chain_converges_with_the_depthwise_layer_in_both_pairs(tmp_path: Path) -> None:
    model = loaded(uneven(NETWORKS["k5_e1_g2"][0]), tmp_path)
    for pair in equalise_(model):
        first, second = weight(model, pair.first), weight(model, pair.second)
        inside = second.shape[1]
        r1 = np.abs(first).max((1, 2, 3))[pair.sources]
        groups = len(r1) // inside
        per_group = np.abs(second).reshape(groups, len(second) // groups, inside, -1)
        np.testing.assert_allclose(r1, per_group.max((1, 3)).reshape(-1), rtol=0.01)
    assert not np.array_equal(equalise_(model)[0].sources, np.arange(8))  # the shuffle is seen


def test_a_pruned_channel_stays_zero(tmp_path: Path) -> None:
    network = uneven(lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    with torch.no_grad():
        network[0].weight[2] = 0
        network[2].weight[:, 4] = 0
    model = loaded(network, tmp_path)
    before = scores(model)
    (pair,) = equalise_(model)
    np.testing.assert_allclose(scores(model), before, rtol=1e-4, atol=1e-5 * np.abs(before).max())
    assert not weight(model, pair.first)[2].any()
    assert not weight(model, pair.second)[:, 4].any()


def test_int8_per_tensor_needs_it_where_channels_are_uneven(
    trained: Trained, tmp_path: Path
) -> None:
    export_onnx(trained.network, tmp_path / "fp32.onnx", card=trained.card)
    model, data = onnx.load(tmp_path / "fp32.onnx"), trained.data
    generator = np.random.default_rng(0)
    stored = {w.name: w for w in model.graph.initializer}
    for pair in equalise_(model):  # the same function with channels of very different sizes
        layers = {node.name: node for node in model.graph.node}
        first, second = layers[pair.first], layers[pair.second]
        names = (*first.input[1:3], second.input[1])
        w1, b1, w2 = (onnx.numpy_helper.to_array(stored[name]).copy() for name in names)
        size = np.exp(1.5 * generator.standard_normal(len(w1))).astype(np.float32)
        inside = w2.shape[1]
        groups = len(pair.sources) // inside
        apart = w2.reshape(groups, len(w2) // groups, inside, -1)
        apart /= size[pair.sources].reshape(groups, 1, inside, 1)
        changed = (w1 * size.reshape(-1, 1, 1, 1), b1 * size, apart.reshape(w2.shape))
        for name, array in zip(names, changed, strict=True):
            stored[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "uneven.onnx")
    found = {}
    for equalise in (False, True):
        method = StaticQuantization(per_channel=False, equalise=equalise)
        quantize_file(tmp_path / "uneven.onnx", tmp_path / "int8.onnx", data, method)
        found[equalise] = accuracy_of_file(
            tmp_path / "int8.onnx", data.validation, mean=data.mean, std=data.std
        )
    assert found[True] > 0.9
    assert found[True] > found[False] + 0.1
