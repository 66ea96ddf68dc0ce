"""Theta against independent definitions."""

import math

import pytest
import torch

from fbnas.search import ArchitectureDistribution
from fbnas.space import SearchSpace


@pytest.fixture
def theta() -> ArchitectureDistribution:
    space = SearchSpace.load("quickstart")
    space = SearchSpace.from_dict({**space.to_dict(), "skip_on_reduction": False})
    distribution = ArchitectureDistribution(space).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        distribution.logits.copy_(torch.randn(7, 9, generator=generator))
    return distribution


def test_blocks_that_are_not_offered_have_no_probability_and_no_gradient(
    theta: ArchitectureDistribution,
) -> None:
    closed = ~theta.offered
    assert closed.sum() == 2  # the two layers that change the shape do not offer skip
    assert torch.all(theta.probabilities()[closed] == 0)
    gates = theta.gates(1.0)
    assert torch.all(gates[closed] == 0)
    (gates * torch.randn_like(gates)).sum().backward()
    assert torch.all(theta.logits.grad[closed] == 0)
    assert torch.isfinite(theta.logits.grad).all()
    assert all(theta.offered[i, j] for i, j in enumerate(theta.sample_path()))


def test_sampling_frequencies_are_the_softmax(theta: ArchitectureDistribution) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 4000
    counts = torch.zeros(7, 9)
    for _ in range(n):
        counts[torch.arange(7), torch.tensor(theta.sample_path(generator))] += 1
    expected = torch.exp(theta.logits.detach())
    expected[~theta.offered] = 0
    expected /= expected.sum(1, keepdim=True)
    assert (counts / n - expected).abs().max() < 4 * math.sqrt(0.25 / n)


def test_hard_gates_follow_the_softmax_too(theta: ArchitectureDistribution) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 4000
    with torch.no_grad():
        mean = sum(theta.gates(0.7, hard=True, generator=generator) for _ in range(n)) / n
    assert (mean - theta.probabilities()).abs().max() < 4 * math.sqrt(0.25 / n)


def test_tau_to_zero_is_one_hot_and_to_infinity_uniform(theta: ArchitectureDistribution) -> None:
    cold = theta.gates(1e-4)
    assert torch.allclose(cold.max(dim=1).values, torch.ones(7, dtype=torch.double), atol=1e-6)
    hot = theta.gates(1e7)
    uniform = theta.offered / theta.offered.sum(1, keepdim=True)
    assert torch.allclose(hot, uniform.double(), atol=1e-5)
    with pytest.raises(ValueError, match="positive temperature"):
        theta.gates(0)


def test_gradient_of_the_relaxed_gates_by_finite_differences(
    theta: ArchitectureDistribution,
) -> None:
    weights = torch.randn(7, 9, dtype=torch.double, generator=torch.Generator().manual_seed(5))

    def value() -> torch.Tensor:
        return (theta.gates(1.3, generator=torch.Generator().manual_seed(9)) * weights).sum()

    value().backward()
    _compare_with_finite_differences(theta, lambda: float(value()))


def test_the_latency_terms_gradient_reaches_theta_and_is_the_analytic_one(
    theta: ArchitectureDistribution,
) -> None:
    cost = torch.rand(7, 9, dtype=torch.double).masked_fill(~theta.offered, torch.nan)
    expected = theta.expected(cost, base=2.0)
    by_hand = 2.0 + sum(
        float(theta.probabilities()[i, j] * cost[i, j])
        for i in range(7)
        for j in range(9)
        if theta.offered[i, j]
    )
    assert float(expected.detach()) == pytest.approx(by_hand)
    expected.backward()
    p, known = theta.probabilities().detach(), cost.nan_to_num(0.0)
    analytic = p * (known - (p * known).sum(1, keepdim=True))
    assert torch.allclose(theta.logits.grad, analytic)
    assert theta.logits.grad.abs().max() > 1e-3
    _compare_with_finite_differences(theta, lambda: float(theta.expected(cost)))


def _compare_with_finite_differences(theta: ArchitectureDistribution, value) -> None:  # type: ignore[no-untyped-def]
    step = 1e-6
    for i, j in ((0, 0), (2, 8), (4, 3), (6, 5)):
        with torch.no_grad():
            theta.logits[i, j] += step
            above = value()
            theta.logits[i, j] -= 2 * step
            below = value()
            theta.logits[i, j] += step
        assert float(theta.logits.grad[i, j]) == pytest.approx(
            (above - below) / (2 * step), abs=1e-6
        )


def test_straight_through_gates_have_the_relaxed_gradient(theta: ArchitectureDistribution) -> None:
    weights = torch.randn(7, 9, dtype=torch.double)
    gradients = []
    for hard in (False, True):
        gates = theta.gates(0.8, hard=hard, generator=torch.Generator().manual_seed(1))
        theta.logits.grad = None
        (gates * weights).sum().backward()
        gradients.append(theta.logits.grad.clone())
        if hard:
            assert torch.all((gates.detach() - gates.detach().round()).abs() < 1e-12)
    assert torch.allclose(*gradients)


def test_log_probability_and_entropy(theta: ArchitectureDistribution) -> None:
    architecture = theta.sample(torch.Generator().manual_seed(2))
    p = theta.probabilities().detach()
    path = architecture.path(theta.space)
    product = math.prod(float(p[i, j]) for i, j in enumerate(path))
    assert theta.log_probability(architecture) == pytest.approx(math.log(product))
    entropy = [-sum(float(q) * math.log(q) for q in row if q > 0) for row in p]
    assert torch.allclose(theta.entropy().detach(), torch.tensor(entropy).double())
    best = theta.most_probable()
    assert theta.log_probability(best) >= theta.log_probability(architecture)


def test_expected_skips_counts_identities_only(theta: ArchitectureDistribution) -> None:
    skips = theta.expected_skips().detach()
    keeps = [layer.keeps_shape for layer in theta.space.layers]
    p = theta.probabilities().detach()[:, theta.space.blocks.index("skip")]
    assert skips.tolist() == [float(q) if k else 0.0 for q, k in zip(p, keeps, strict=True)]
