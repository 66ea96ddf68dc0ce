"""Exact selection against brute force."""

import itertools

import pytest
import torch

from fbnas.errors import InputError
from fbnas.search import check_budget, latency_range, most_probable_within
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
