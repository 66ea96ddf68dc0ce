"""The supernet against the networks that it stands for."""

import pytest
import torch
from torch.nn import functional

from fbnas.search import ArchitectureDistribution, Supernet
from fbnas.space import Architecture, SearchSpace


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    net = Supernet(SearchSpace.load("quickstart"), classes=10)
    for part in net.modules():  # residual blocks begin as the identity, which would hide mistakes
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
    path = [3, 1, 4, 8, 0, 5, 7]
    for _ in range(2):  # BN statistics that are not those of initialisation
        net(torch.randn(8, 1, 16, 16), path)
    return net.eval()


@pytest.mark.parametrize("seed", range(5))
def test_one_hot_gates_path_and_network_agree_bit_for_bit(supernet: Supernet, seed: int) -> None:
    architecture = Architecture.random(supernet.space, torch.Generator().manual_seed(seed))
    path = architecture.path(supernet.space)
    one_hot = functional.one_hot(torch.tensor(path), 9).float()
    images = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        by_path = supernet(images, path)
        by_zero_free_gates = supernet(images, one_hot)
        by_network = supernet.network(architecture)(images)
    by_all_branches = supernet(images, one_hot.clone().requires_grad_(True)).detach()
    assert torch.equal(by_path, by_zero_free_gates)
    assert torch.equal(by_path, by_all_branches)
    assert torch.equal(by_path, by_network)


def test_soft_gates_are_the_weighted_sum(supernet: Supernet) -> None:
    layer = supernet.layers[2]
    features = torch.randn(2, 32, 8, 8)
    gate = torch.rand(9).softmax(0)
    with torch.no_grad():
        expected = sum(gate[i] * layer.branch(i)(features) for i in range(9))
        assert torch.allclose(layer(features, gate), expected, atol=1e-6)


def test_only_the_path_is_computed(supernet: Supernet) -> None:
    ran: list[str] = []
    hooks = [
        block.register_forward_hook(lambda *_, n=f"{i}.{name}": ran.append(n))
        for i, layer in enumerate(supernet.layers)
        for name, block in layer.branches.items()
    ]
    supernet(torch.randn(1, 1, 16, 16), [0] * 7)
    for hook in hooks:
        hook.remove()
    assert ran == [f"{i}.k3_e1" for i in range(7)]


def test_theta_learns_through_hard_gates(supernet: Supernet) -> None:
    theta = ArchitectureDistribution(supernet.space)
    scores = supernet(torch.randn(4, 1, 16, 16), theta.gates(1.0, hard=True))
    functional.cross_entropy(scores, torch.tensor([0, 1, 2, 3])).backward()
    assert (theta.logits.grad.abs().sum(dim=1) > 0).all()


def straightforward(supernet: Supernet, images: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The sum over all branches as equation 4 is written, all of it in the graph."""
    features = supernet.stem(images)
    for layer, gate in zip(supernet.layers, gates, strict=True):
        features = sum(gate[i] * layer.branch(i)(features) for i in layer.index)
    return supernet.classifier(supernet.head(features))


@pytest.mark.parametrize("kind", ["hard", "all"])
def test_gates_have_the_gradient_of_the_straightforward_sum(supernet: Supernet, kind: str) -> None:
    theta = ArchitectureDistribution(supernet.space)
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 3])
    gradients = []
    for forward in (straightforward, lambda net, *given: net(*given)):
        gates = theta.gates(1.0, hard=kind == "hard", generator=torch.Generator().manual_seed(2))
        images = images.detach().clone().requires_grad_(True)
        functional.cross_entropy(forward(supernet, images, gates), labels).backward()
        gradients.append((theta.logits.grad, images.grad))
        theta.logits.grad = None
    assert gradients[0][0].abs().max() > 1e-4
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_two_paths_compute_two_blocks_and_have_their_gradient(supernet: Supernet) -> None:
    theta = ArchitectureDistribution(supernet.space)
    gates, among = theta.two_path_gates(1.0, generator=torch.Generator().manual_seed(1))
    ran: list[tuple[int, str]] = []
    hooks = [
        block.register_forward_hook(lambda *_, where=(i, name): ran.append(where))
        for i, layer in enumerate(supernet.layers)
        for name, block in layer.branches.items()
    ]
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 1, 2, 3])
    functional.cross_entropy(supernet(images, gates, among), labels).backward()
    for hook in hooks:
        hook.remove()
    names = supernet.space.blocks
    assert sorted(ran) == sorted((i, names[j]) for i, pair in enumerate(among) for j in pair)
    found, theta.logits.grad = theta.logits.grad, None
    gates, _ = theta.two_path_gates(1.0, generator=torch.Generator().manual_seed(1))
    functional.cross_entropy(straightforward(supernet, images, gates), labels).backward()
    torch.testing.assert_close(found, theta.logits.grad, rtol=1e-4, atol=1e-7)
    for i, pair in enumerate(among):
        rest = [j for j in range(len(names)) if j not in pair]
        assert len(pair) == 2
        assert found[i, rest].abs().max() == 0
        assert found[i, pair].abs().min() > 0
        assert float(found[i].sum()) == pytest.approx(0, abs=1e-7)  # as every softmax's


def test_gates_of_each_image_are_those_of_the_image_alone(supernet: Supernet) -> None:
    theta = ArchitectureDistribution(supernet.space)
    gates = theta.gates(1.0, draws=5)
    images = torch.randn(5, 1, 16, 16)
    with torch.no_grad():
        found = supernet(images, gates)
        alone = [supernet(images[i : i + 1], gates[i]) for i in range(5)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_wrong_gates_are_refused(supernet: Supernet) -> None:
    with pytest.raises(ValueError, match=r"expected \(7, 9\) or a path of 7"):
        supernet(torch.randn(1, 1, 16, 16), torch.ones(7, 8))
    with pytest.raises(ValueError, match="6 indices"):
        supernet(torch.randn(1, 1, 16, 16), [0] * 6)
    with pytest.raises(ValueError, match=r"gates are \(2, 7, 9\)"):
        supernet(torch.randn(1, 1, 16, 16), torch.ones(2, 7, 9))
