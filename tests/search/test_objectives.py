"""Every objective against its formula, and the target against its promise."""

import math

import pytest
import torch

from fbnas.errors import InputError
from fbnas.search import OBJECTIVES, ArchitectureDistribution, build_objective
from fbnas.space import SearchSpace

FORMULAS = {  # of CE, LAT, T, lambda, with default options
    "target": lambda ce, lat, t, m: ce + m * (lat / t - 1) + 2 * (lat / t - 1) ** 2,
    "hinge": lambda ce, lat, t, m: ce + 5 * max(0, lat / t - 1),
    "absolute": lambda ce, lat, t, m: ce + 5 * abs(lat / t - 1),
    "fbnet": lambda ce, lat, t, m: ce * 0.2 * math.log(lat) ** 0.6,
    "fbnet_additive": lambda ce, lat, t, m: ce + 0.2 * math.log(lat) ** 0.6,
}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("latency", [8.0, 13.0])
def test_the_loss_is_its_formula(name: str, latency: float) -> None:
    objective = build_objective(name)
    lat = torch.tensor(latency, dtype=torch.double, requires_grad=True)
    loss = objective.loss(torch.tensor(1.5), lat, budget_ms=10.0, multiplier=0.7)
    assert float(loss.detach()) == pytest.approx(FORMULAS[name](1.5, latency, 10.0, 0.7))
    if not (name == "hinge" and latency < 10):
        loss.backward()
        assert lat.grad is not None and lat.grad != 0


@pytest.mark.parametrize("name", ["fbnet", "fbnet_additive"])
def test_logarithmic_forms_refuse_latencies_of_a_millisecond(name: str) -> None:
    with pytest.raises(InputError, match="undefined at 1 ms and below"):
        build_objective(name).check(0.9)
    build_objective(name).check(1.1)


def test_the_multiplier_rises_over_budget_and_never_goes_below_zero() -> None:
    objective = build_objective("target", rate=0.5)
    assert objective.next_multiplier(1.0, 12.0, 10.0) == pytest.approx(1.1)
    assert objective.next_multiplier(0.01, 5.0, 10.0) == 0.0
    assert build_objective("hinge").next_multiplier(0.3, 12.0, 10.0) == 0.3


def test_dual_ascent_meets_the_target_without_tuning() -> None:
    """A cross-entropy that always prefers the slow blocks: only lambda can hold the budget."""
    space = SearchSpace.load("quickstart")
    theta = ArchitectureDistribution(space)
    cost = torch.arange(9.0).repeat(7, 1) + 1
    for budget_ms in (20.0, 35.0, 50.0):
        with torch.no_grad():
            theta.logits.zero_()
        objective, multiplier = build_objective("target"), 0.0
        adam = torch.optim.Adam(theta.parameters(), lr=0.05)
        for _ in range(600):
            latency = theta.expected(cost)
            cross_entropy = 3.0 - 0.03 * latency
            loss = objective.loss(
                cross_entropy, latency, budget_ms=budget_ms, multiplier=multiplier
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
            multiplier = objective.next_multiplier(multiplier, float(latency.detach()), budget_ms)
        assert float(theta.expected(cost).detach()) == pytest.approx(budget_ms, rel=0.03)


def test_unknown_objectives_and_options_name_the_closest() -> None:
    with pytest.raises(InputError, match="Did you mean 'target'"):
        build_objective("taget")
    with pytest.raises(InputError, match="Did you mean 'damping'"):
        build_objective("target", dampin=1)
    with pytest.raises(InputError, match="expected a number of at least 0"):
        build_objective("target", rate=-1)
