"""Shared weights: k-means by its definition, centroids that learn by summed gradients."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from digits_network import Trained, accuracy, fit
from torch import Tensor, nn

from fbnas.compression import WeightSharing, compress_, held, shared, sharing_rate
from fbnas.compression.holding import GRADIENTS
from fbnas.compression.weight_sharing import INITS, cluster, share_
from fbnas.errors import InputError


def test_the_rate_is_that_of_the_paper() -> None:
    assert sharing_rate(16, 4, 32) == pytest.approx(3.2)  # Han et al. 2016, section 3
    assert sharing_rate(1000, 16, 32) == pytest.approx(32000 / (4000 + 512))


def squared_error(values: np.ndarray, parts: list[np.ndarray]) -> float:
    return sum(float(((part - part.mean()) ** 2).sum()) for part in parts)


def test_k_means_is_near_the_best_of_all_partitions() -> None:
    values = np.sort(np.random.default_rng(0).normal(size=14))
    best = min(
        squared_error(values, np.split(values, cuts)) for cuts in combinations(range(1, 14), 3)
    )
    found = []
    for init in INITS:
        centroids, nearest = cluster(values, 4, init=init)
        assert (abs(values[:, None] - centroids).argmin(1) == nearest).all()
        for i, centroid in enumerate(centroids):
            assert centroid == pytest.approx(values[nearest == i].mean())
        found.append(((centroids[nearest] - values) ** 2).sum())
    assert min(found) < 1.1 * best
    assert min(found) >= best - 1e-12


def test_initialisations_are_those_of_the_paper() -> None:
    values = np.array([-4.0, 0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 4.0])
    generator = np.random.default_rng(0)
    assert INITS["linear"](values, 3, generator).tolist() == [-4, 0, 4]
    heavy = np.concatenate([np.zeros(90), np.linspace(1, 10, 10)])
    assert (INITS["density"](heavy, 10, generator) == 0).sum() == 9  # where the weights are
    assert set(INITS["random"](values, 3, generator)) <= set(values)


@pytest.mark.parametrize("init", sorted(INITS))
def test_a_layer_takes_few_values_and_keeps_its_zeros(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=8), nn.Flatten(), nn.Linear(64, 50))
    for layer in (model[0], model[2]):
        layer.weight.data[layer.weight.abs() < 0.05] = 0
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    changes = share_(model, WeightSharing(conv_bits=3, linear_bits=4, init=init))
    assert [change.layer for change in changes] == ["0", "2"]
    for layer, old, clusters, change in zip(
        (model[0], model[2]), before, (8, 16), changes, strict=True
    ):
        assert ((layer.weight == 0) == (old == 0)).all()
        values = layer.weight[old != 0].unique()
        assert len(values) == clusters == change.clusters
        assert change.weights == int(old.count_nonzero())
        error = ((layer.weight.detach() - old) ** 2).sum() / (old**2).sum()
        assert change.error == pytest.approx(float(error), rel=1e-3)
        assert change.rate == pytest.approx(sharing_rate(change.weights, clusters, 32))
        assert shared(layer.weight) is not None


def test_all_of_256_values_and_zeros_are_still_read_as_shared() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 100)
    layer.weight.data[:, ::3] = 0
    share_(nn.Sequential(layer), WeightSharing(linear_bits=8))
    assert len(layer.weight.unique()) == 257
    found = shared(layer.weight)
    assert found is not None
    assert torch.equal(found[0][found[1]], layer.weight)


def test_small_layers_get_no_more_values_than_half_of_their_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 3, 3)
    (change,) = share_(nn.Sequential(layer), WeightSharing(conv_bits=8))
    assert change.clusters == len(layer.weight.unique()) == 13
    assert shared(layer.weight) is not None


@pytest.mark.parametrize("gradient", ["sum", "scaled_sum", "mean"])
def test_values_learn_by_the_gradients_of_their_weights(gradient: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].weight.data[0, :5] = 0
    method = WeightSharing(linear_bits=2, gradient=gradient)
    share_(model, method)
    images, labels = torch.randn(32, 12), torch.randint(0, 3, (32,))
    plain = copy.deepcopy(model)
    nn.functional.cross_entropy(plain(images), labels).backward()
    rate = 0.01

    def step(network: nn.Module) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    if gradient == "scaled_sum":  # what every later fine-tuning does
        again = copy.deepcopy(model)
        with held(again):
            step(again)
    compress_(model, method, input_shape=(12,), train=step)
    for layer, old in ((model[0], plain[0]), (model[2], plain[2])):
        expected = old.weight.detach().clone()
        for value in old.weight.unique():
            members = old.weight == value
            if value != 0:
                total = old.weight.grad[members].sum()
                kept = old.weight[old.weight != 0]
                over = {
                    "sum": 1,
                    "scaled_sum": len(kept) / len(kept.unique()),
                    "mean": members.sum(),
                }
                expected[members] = value.item() - rate * total / over[gradient]
        torch.testing.assert_close(layer.weight.detach(), expected)
        assert not torch.equal(layer.weight, old.weight)
    if gradient == "scaled_sum":
        assert torch.equal(again[0].weight, model[0].weight)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_layer_of_zeros_stays_one(gradient: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(model[0].weight)
    with held(model, gradient=gradient):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.tensor([0, 1] * 4)).backward()
        optimizer.step()
    assert torch.equal(model[0].weight, torch.zeros(4, 4))


def weights(network: nn.Module) -> list[Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_digits_are_still_read_with_shared_weights(trained: Trained) -> None:
    network, data = copy.deepcopy(trained.network), trained.data
    report = compress_(
        network,
        WeightSharing(conv_bits=5, linear_bits=3),
        input_shape=trained.card.input_shape,
        train=lambda model: fit(model, data, epochs=2, rate=0.02),
        data=data,
    )
    assert accuracy(network, data) > accuracy(trained.network, data) - 0.02
    bits = {nn.Conv2d: 5, nn.Linear: 3}
    for module in network.modules():
        if type(module) in bits:
            assert len(module.weight.unique()) <= 2 ** bits[type(module)]
    assert report.after.stored_bytes < 0.35 * report.before.stored_bytes
    assert report.after.dense_bytes == report.before.dense_bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conv_bits": 9}, "conv_bits is 9; expected a whole number from 1 to 8"),
        ({"linear_bits": 0}, "linear_bits is 0; expected a whole number from 1 to 8"),
        ({"init": "linaer"}, "Did you mean 'linear'"),
        ({"gradient": "means"}, "Did you mean 'mean'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        WeightSharing(**options)
