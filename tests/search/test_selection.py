"""Exact selection against brute force."""

import ctypes
import itertools
import math
from dataclasses import replace

import pytest
import torch

from fbnas.errors import InputError
from fbnas.search import (
    Limit,
    check_budget,
    check_limits,
    latency_range,
    lowest_within,
    most_probable_within,
    selection,
)
from fbnas.space import SearchSpace


def brute_force(p: torch.Tensor, cost: torch.Tensor, budget: float, count: int) -> list[float]:
    scores = []
    for path in itertools.product(range(p.shape[1]), repeat=p.shape[0]):
        total = sum(float(cost[i, j]) for i, j in enumerate(path))
        if total <= budget:  # nan compares false: a block that is not offered never fits
            scores.append(sum(float(p[i, j].log()) for i, j in enumerate(path)))
    return sorted(scores, reverse=True)[:count]


def small_space(blocks: int = 9) -> SearchSpace:
    content = SearchSpace.load("quickstart").to_dict()
    content["stages"] = content["stages"][:2]  # 4 layers
    content["blocks"] = content["blocks"][:blocks]
    return SearchSpace.from_dict(content)


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_exact(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(4, 9, generator=generator, dtype=torch.double)).softmax(1)
    cost = torch.rand(4, 9, generator=generator, dtype=torch.double)
    cost[0, 3] = cost[2, 8] = torch.nan
    fastest, slowest = latency_range(cost)
    budget = fastest + (0.05 + 0.15 * seed) * (slowest - fastest)
    found = most_probable_within(
        p, cost, budget_ms=budget + 1.5, base_ms=1.5, count=7, space=small_space()
    )
    scores = [a.provenance["log_probability"] for a in found]
    assert scores == pytest.approx(brute_force(p, cost, budget, 7))
    assert len({a.blocks for a in found}) == len(found)
    for architecture in found:
        assert architecture.provenance["predicted_latency_ms"] <= budget + 1.5


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_used_where_any_network_uses_it(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(4, 9, generator=generator, dtype=torch.double)
    p = (-8 * cost).softmax(1)  # as a theta that collapsed on what is cheap
    fastest, slowest = latency_range(cost)
    budget = fastest + 0.5 * (slowest - fastest)
    options = {"budget_ms": budget + 0.2, "base_ms": 0.2, "count": 3, "space": small_space()}
    idle = most_probable_within(p, cost, **options)
    assert idle[0].provenance["predicted_latency_ms"] < 0.9 * (budget + 0.2)
    found = most_probable_within(p, cost, **options, least_used=0.9)
    scores = []
    for path in itertools.product(range(9), repeat=4):
        total = 0.2 + sum(float(cost[i, j]) for i, j in enumerate(path))
        if 0.9 * (budget + 0.2) <= total <= budget + 0.2:
            scores.append(sum(float(p[i, j].log()) for i, j in enumerate(path)))
    expected = sorted(scores, reverse=True)[:3]
    assert [a.provenance["log_probability"] for a in found] == pytest.approx(expected)


def test_a_budget_that_no_network_can_use_up_is_met_all_the_same() -> None:
    p = torch.full((4, 3), 1 / 3, dtype=torch.double)
    cost = torch.tensor([[1.0, 4.0, 6.0]] * 4, dtype=torch.double)
    best = most_probable_within(p, cost, budget_ms=6.9, space=small_space(3), least_used=0.9)
    assert [a.provenance["predicted_latency_ms"] for a in best] == [4.0]


def test_fewer_come_back_where_fewer_fit() -> None:
    p = torch.full((4, 3), 1 / 3, dtype=torch.double)
    cost = torch.tensor([[1.0, 2.0, 3.0]] * 4, dtype=torch.double)
    space = small_space(3)
    assert len(most_probable_within(p, cost, budget_ms=4.0, count=5, space=space)) == 1
    assert len(most_probable_within(p, cost, budget_ms=5.0, count=9, space=space)) == 5


def test_a_block_that_softmax_rounded_to_zero_is_still_there() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    cost = torch.tensor([[5.0, 1.0, 3.0]] * 4)
    best = most_probable_within(p, cost, budget_ms=4.0, count=1, space=small_space(3))
    assert best[0].blocks == ("k3_e1_g2",) * 4


def test_budgets_out_of_range_are_answered_with_both_numbers() -> None:
    cost = torch.tensor([[1.0, 2.0, torch.nan]] * 4)
    for budget, words in (
        (4.9, "under the fastest"),
        (9.5, "over the slowest"),
        (0, "not positive"),
    ):
        with pytest.raises(InputError, match=f"{words}.*takes 5 ms.*slowest 9 ms"):
            check_budget(budget, cost, 1.0)
    check_budget(7.0, cost, 1.0)
    with pytest.raises(InputError, match="fastest takes 5 ms"):
        most_probable_within(torch.ones(4, 3), cost, budget_ms=4, base_ms=1, space=small_space(3))


def test_columns_without_names_need_the_space() -> None:
    with pytest.raises(ValueError, match="pass space="):
        most_probable_within(torch.ones(4, 3), torch.ones(4, 3), budget_ms=9.0)


def random_problem(seed: int) -> tuple[torch.Tensor, list[Limit]]:
    """Probabilities of 4 layers and 4 blocks, and three limits that cut a part off each."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.double}
    p = (3 * torch.randn(4, 4, **draw)).softmax(1)  # type: ignore[call-overload]
    costs = torch.rand(3, 4, 4, **draw)  # type: ignore[call-overload]
    costs[:, 1, 2] = torch.nan
    limits = []
    for (name, unit, kind), cost in zip(
        (("latency", "ms", "sum"), ("energy", "mJ", "sum"), ("peak", "MB", "max")),
        costs,
        strict=True,
    ):
        free = Limit(name, unit, 1e-3 * cost if kind == "max" else cost, math.inf, 0.5e-3, kind)
        low, high = free.range()
        budget = low + (0.45 if kind == "sum" else 0.8) * (high - low)
        limits.append(replace(free, budget=budget))
    return p, limits


def fitting_paths(limits: list[Limit]) -> list[tuple[int, ...]]:
    """Every network within the budgets; the costs are reckoned here, not by the limits."""
    paths = []
    for path in itertools.product(range(4), repeat=4):
        chosen = [[float(limit.cost[i, j]) for i, j in enumerate(path)] for limit in limits]
        totals = [limit.base + sum(c) for limit, c in zip(limits[:2], chosen, strict=False)]
        totals.append(max(limits[2].base, *chosen[2]))
        if all(t <= limit.budget for t, limit in zip(totals, limits, strict=True)):
            paths.append(path)
    return paths


@pytest.mark.parametrize("seed", range(6))
def test_selection_within_two_sums_and_a_maximum_is_exact(seed: int) -> None:
    p, limits = random_problem(seed)
    fitting = fitting_paths(limits)
    for left_out in range(3):  # every budget plays a part
        others = [replace(x, budget=math.inf) if i == left_out else x for i, x in enumerate(limits)]
        assert len(fitting_paths(others)) > len(fitting) > 1
    space = small_space(4)
    latency = limits[0]
    found = most_probable_within(
        p,
        latency.cost,
        budget_ms=latency.budget,
        base_ms=latency.base,
        count=len(fitting) + 1,
        space=space,
        limits=limits[1:],
    )
    scores = [sum(float(p[i, j].log()) for i, j in enumerate(path)) for path in fitting]
    assert [a.provenance["log_probability"] for a in found] == pytest.approx(
        sorted(scores, reverse=True)
    )
    blocks = {tuple(space.blocks[j] for j in path) for path in fitting}
    assert {a.blocks for a in found} == blocks
    costs = [sum(float(limits[1].cost[i, j]) for i, j in enumerate(path)) for path in fitting]
    least = limits[1].base + min(costs)
    assert lowest_within(limits[1], [limits[0], limits[2]]) == pytest.approx(least)


def test_without_a_budget_of_latency_the_others_decide() -> None:
    p, limits = random_problem(0)
    free = [replace(limits[0], budget=math.inf), *limits[1:]]
    scores = [sum(float(p[i, j].log()) for i, j in enumerate(path)) for path in fitting_paths(free)]
    (best,) = most_probable_within(
        p, limits[0].cost, budget_ms=None, count=1, space=small_space(4), limits=limits[1:]
    )
    assert best.provenance["log_probability"] == pytest.approx(max(scores))
    assert best.provenance["predicted_latency_ms"] > 0


def test_a_network_at_its_very_budgets_fits() -> None:
    cost = torch.tensor([[0.1, 0.7, 1.3]] * 4, dtype=torch.double)
    params = Limit("params", "params", 1e6 * cost, 400_000 + 10_000_000, 10_000_000)
    energy = Limit("energy", "mJ", cost, 0.4 + 1e3, 1e3)
    found = most_probable_within(
        torch.full((4, 3), 1 / 3),
        cost,
        budget_ms=0.4,
        count=9,
        space=small_space(3),
        limits=[params, energy],
    )
    assert len(found) == 1
    assert found[0].provenance["params"] == 10_400_000


def test_further_budgets_that_nothing_fits_are_answered_with_both_ends() -> None:
    cost = torch.tensor([[1.0, 2.0, torch.nan]] * 4, dtype=torch.double)
    space = small_space(3)

    def select(*limits: Limit, budget_ms: float | None = None) -> None:
        most_probable_within(
            torch.ones(4, 3), cost, budget_ms=budget_ms, space=space, limits=limits
        )

    energy = Limit("energy", "mJ", cost, 3.0, 0.1)
    with pytest.raises(
        InputError, match=r"No network fits 3 mJ: the lowest needs 4.1 mJ and the highest 8.1 mJ by"
    ):
        select(energy)
    peak = Limit("peak", "MB", cost, 0.9, 0.1, "max")
    with pytest.raises(
        InputError, match=r"fits 0.9 MB: the lowest needs 1 MB and the highest 2 MB"
    ):
        select(peak)
    with pytest.raises(InputError, match=r"fits 0.9 MB: the lowest needs 1.5 MB"):
        select(replace(peak, base=1.5))
    opposite = Limit("params", "params", 3.0 - cost, 5.0)  # cheap in one is dear in the other
    together = r"No network fits 5 ms, 5 params together: .* lowest are 4 ms, 4 params"
    with pytest.raises(InputError, match=together):
        select(opposite, budget_ms=5.0)
    with pytest.raises(InputError, match=together):
        check_limits([Limit("latency", "ms", cost, 5.0), opposite])
    with pytest.raises(InputError, match="max_params=9 is met by every network"):
        check_limits([replace(opposite, budget=9.0)])
    check_limits([Limit("latency", "ms", cost, 7.0), replace(opposite, budget=9.0)])


def test_what_the_solver_prints_is_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    with selection._hushed():
        libc.puts(b"from C")
    print("after")
    libc.puts(b"and C again")
    libc.fflush(None)
    shown = capfd.readouterr().out
    assert "after" in shown and "and C again" in shown
    assert "from C" not in shown
