"""The most probable architectures within a budget, exactly; and what a budget can buy at all."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.space.architecture import Architecture
from fbnas.space.search_space import NINE_BLOCKS, SearchSpace

# A float32 softmax underflows to 0; such a block is unlikely, not absent.
ROUNDING = 1e-12  # of sums in another order: the fastest network fits its own latency
SMALLEST_PROBABILITY = 1e-38


def latency_range(latency_ms: Tensor, base_ms: float = 0.0) -> tuple[float, float]:
    """Return the latency of the fastest and of the slowest network, in ms.

    `latency_ms`: (layers, blocks), nan where a block is not offered.
    """
    fastest = latency_ms.nan_to_num(torch.inf).amin(dim=1).sum()
    slowest = latency_ms.nan_to_num(-torch.inf).amax(dim=1).sum()
    return base_ms + float(fastest), base_ms + float(slowest)


def check_budget(budget_ms: float, latency_ms: Tensor, base_ms: float = 0.0) -> None:
    """Refuse a budget that no network meets, or that every network meets.

    Raises:
        InputError: it names the latencies of the fastest and the slowest network.
    """
    fastest, slowest = latency_range(latency_ms, base_ms)
    if fastest <= budget_ms <= slowest:
        return
    if not budget_ms > 0:
        problem = "is not positive"
    elif budget_ms < fastest:
        problem = "is under the fastest network"
    else:
        problem = "is over the slowest network, so that there is nothing to trade"
    raise InputError(
        f"target_ms={budget_ms:.4g} {problem}: in this space the fastest network takes "
        f"{fastest:.4g} ms and the slowest {slowest:.4g} ms by the table; ask for a value "
        "in between."
    )


def most_probable_within(
    probabilities: Tensor,
    latency_ms: Tensor,
    *,
    budget_ms: float,
    base_ms: float = 0.0,
    count: int = 5,
    space: SearchSpace | None = None,
) -> list[Architecture]:
    """Return the `count` most probable architectures with base + sum_l LAT_l <= budget, best first.

    max_a sum_l log p_{l,a_l}  subject to  base + sum_l LAT_{l,a_l} <= T

    is a multiple-choice knapsack, solved to optimality as an integer program; each answer is then
    excluded to find the next.

    Args:
        probabilities: (layers, blocks), rows sum to 1.
        latency_ms: (layers, blocks) in ms, nan where a block is not offered.
        budget_ms: T, in ms.
        base_ms: stem, head and classifier, in ms.
        count: how many; fewer come back where fewer fit.
        space: names the blocks; without it the columns are the nine FBNet blocks in their order.

    Raises:
        InputError: no architecture fits; the fastest and slowest latencies are named.
        ValueError: shapes that do not belong together.
    """
    names: Sequence[str] = space.blocks if space else NINE_BLOCKS
    if probabilities.shape != latency_ms.shape or probabilities.shape[1] != len(names):
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)} and latency_ms {tuple(latency_ms.shape)}; "
            f"expected both (layers, {len(names)}): pass space= for other blocks."
        )
    fastest, slowest = latency_range(latency_ms, base_ms)
    if budget_ms * (1 + ROUNDING) < fastest:
        raise InputError(
            f"No network fits {budget_ms:.4g} ms: the fastest takes {fastest:.4g} ms and the "
            f"slowest {slowest:.4g} ms by the table."
        )
    cost = latency_ms.detach().double().cpu().numpy()
    score = probabilities.detach().double().cpu().clamp(min=SMALLEST_PROBABILITY).log().numpy()
    chosen = []
    for path in _best_paths(score, cost, budget_ms * (1 + ROUNDING) - base_ms, count):
        predicted = base_ms + sum(cost[i, j] for i, j in enumerate(path))
        chosen.append(
            Architecture(
                tuple(names[j] for j in path),
                space.name if space else "",
                {
                    "log_probability": float(sum(score[i, j] for i, j in enumerate(path))),
                    "predicted_latency_ms": float(predicted),
                    "source": f"most probable within {budget_ms:.6g} ms",
                },
            )
        )
    return chosen


def _best_paths(score: np.ndarray, cost: np.ndarray, budget: float, count: int) -> list[list[int]]:
    """Solve, exclude the answer, solve again. Each path is one block index per layer."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, blocks = score.shape
    offered = np.isfinite(cost)
    one_per_layer = np.kron(np.eye(layers), np.ones(blocks))
    scale = max(budget, np.finfo(float).tiny)  # the solver's tolerance is absolute: work in budgets
    budget_row = np.where(offered, cost, 0.0).reshape(1, -1) / scale
    excluded: list[np.ndarray] = []
    found: list[list[int]] = []
    while len(found) < count:
        constraints = [
            LinearConstraint(one_per_layer, 1, 1),
            LinearConstraint(budget_row, -np.inf, budget / scale),
        ]
        if excluded:
            constraints.append(LinearConstraint(np.array(excluded), -np.inf, layers - 1))
        result = milp(
            -np.where(offered, score, 0.0).ravel(),
            integrality=np.ones(layers * blocks),
            bounds=Bounds(0, offered.astype(float).ravel()),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            break
        choice = np.round(result.x).reshape(layers, blocks)
        excluded.append(choice.ravel())
        path = [int(j) for j in choice.argmax(axis=1)]
        # The solver's feasibility tolerance lets through what is over by 1e-7; the budget does not.
        if sum(cost[i, j] for i, j in enumerate(path)) <= budget:
            found.append(path)
    return found
