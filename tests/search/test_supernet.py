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


def test_wrong_gates_are_refused(supernet: Supernet) -> None:
    with pytest.raises(ValueError, match=r"expected \(7, 9\) or a path of 7"):
        supernet(torch.randn(1, 1, 16, 16), torch.ones(7, 8))
    with pytest.raises(ValueError, match="6 indices"):
        supernet(torch.randn(1, 1, 16, 16), [0] * 6)
