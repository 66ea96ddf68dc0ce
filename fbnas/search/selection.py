"""The most probable architectures within budgets, exactly; and what a budget can buy at all."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.space.architecture import Architecture
from fbnas.space.search_space import NINE_BLOCKS, SearchSpace

# A float32 softmax underflows to 0; such a block is unlikely, not absent.
ROUNDING = 1e-12  # of sums in another order: the fastest network fits its own latency
SMALLEST_PROBABILITY = 1e-38
LEAST_USED = 0.9  # of a budget, by what the commands select: theta that idles wastes the rest
OPTIONS = {"latency": "target_ms", "energy": "target_mj", "peak": "target_mb"}
PREDICTIONS = {
    "latency": "predicted_latency_ms",
    "energy": "predicted_energy_mj",
    "peak": "predicted_peak_mb",
}


@dataclass(frozen=True)
class Limit:
    """What blocks cost in one unit, and the budget of a network in it.

    name: latency, energy, peak (memory) or params.
    unit: ms, mJ, MB or params.
    cost: (layers, blocks), nan where a block is not offered.
    budget: the most that a network may cost; infinite where the cost is known but free.
    base: what every network costs: stem, head and classifier.
    kind: a network costs base + the "sum" over layers, or the "max" of base and layers.
    """

    name: str
    unit: str
    cost: Tensor
    budget: float
    base: float = 0.0
    kind: Literal["sum", "max"] = "sum"

    @property
    def bounded(self) -> bool:
        """Whether there is a budget at all."""
        return self.budget != math.inf

    @property
    def option(self) -> str:
        """The option that sets the budget."""
        return OPTIONS.get(self.name, f"max_{self.name}")

    @property
    def key(self) -> str:
        """What an architecture's provenance calls its cost."""
        return PREDICTIONS.get(self.name, self.name)

    @property
    def most(self) -> float:
        """The budget, with room for rounding."""
        return self.budget * (1 + ROUNDING)

    def of(self, path: Sequence[int]) -> float:
        """Return what a network costs: `path` holds a block's index per layer."""
        costs = [float(self.cost[layer, block]) for layer, block in enumerate(path)]
        return self.base + sum(costs) if self.kind == "sum" else max(self.base, *costs)

    def range(self) -> tuple[float, float]:
        """Return the lowest and the highest cost of any network."""
        least = self.cost.nan_to_num(torch.inf).amin(dim=1)
        most = self.cost.nan_to_num(-torch.inf).amax(dim=1)
        if self.kind == "sum":
            return self.base + float(least.sum()), self.base + float(most.sum())
        return max(self.base, float(least.max())), max(self.base, float(most.max()))

    def offered(self) -> Tensor:
        """(layers, blocks) bool: the blocks that the budget leaves; a sum's leaves all."""
        known = ~self.cost.isnan()
        return known & (self.cost <= self.most) if self.kind == "max" else known

    def written(self, value: float) -> str:
        """Write a cost with its unit: 3.2 ms, 1.2 M params, 81290 params."""
        if self.name != "params":
            return f"{value:.4g} {self.unit}"
        millions = abs(value) >= 1e6
        return f"{value / 1e6:.4g} M {self.unit}" if millions else f"{value:.0f} {self.unit}"

    def range_text(self) -> str:
        """Say what the cheapest and the dearest network cost."""
        low, high = (self.written(value) for value in self.range())
        source = "by the table" if self.name in OPTIONS else "by count"
        if self.name == "latency":
            return f"the fastest takes {low} and the slowest {high} {source}"
        return f"the lowest needs {low} and the highest {high} {source}"


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


def check_limits(limits: Sequence[Limit]) -> None:
    """Refuse budgets that no network meets, one by one and together; or one alone that all meet.

    Raises:
        InputError: it names the lowest and the highest cost of any network.
    """
    bounded = [limit for limit in limits if limit.bounded]
    for limit in bounded:
        if limit.name == "latency" and not (len(bounded) > 1 and limit.budget > limit.range()[1]):
            check_budget(limit.budget, limit.cost, limit.base)
        lowest, highest = limit.range()
        if not limit.budget > 0:
            problem = "is not positive"
        elif not lowest <= limit.most:
            problem = "is too low"
        elif len(bounded) == 1 and limit.budget > highest:
            problem = "is met by every network, so that there is nothing to trade"
        else:
            continue
        raise InputError(
            f"{limit.option}={limit.budget:.6g} {problem}: in this space {limit.range_text()}; ask "
            "for a value in between."
        )
    _refuse_conflict(bounded)


def most_probable_within(
    probabilities: Tensor,
    latency_ms: Tensor,
    *,
    budget_ms: float | None,
    base_ms: float = 0.0,
    count: int = 5,
    space: SearchSpace | None = None,
    limits: Sequence[Limit] = (),
    least_used: float = 0.0,
    at_most_s: float = math.inf,
) -> list[Architecture]:
    """Return the `count` most probable architectures within every budget, best first.

    max_a sum_l log p_{l,a_l}  subject to  base + sum_l LAT_{l,a_l} <= T, and the same of `limits`

    is a multiple-choice knapsack, solved to optimality as an integer program; each answer is then
    excluded to find the next. A limit on a maximum leaves out the blocks over its budget.

    Args:
        probabilities: (layers, blocks), rows sum to 1.
        latency_ms: (layers, blocks) in ms, nan where a block is not offered.
        budget_ms: T, in ms; None for no budget of latency.
        base_ms: stem, head and classifier, in ms.
        count: how many; fewer come back where fewer fit.
        space: names the blocks; without it the columns are the nine FBNet blocks in their order.
        limits: further budgets, and costs without one that are only to be stated.
        least_used: fraction of the first budget of a sum (latency, else energy, else parameters)
            that a network has to use; it is dropped where no network within the budgets does.
        at_most_s: seconds that the solver may look for a network; then it gives the best so far,
            or none.

    Raises:
        InputError: no architecture fits; the lowest and highest costs are named.
        ValueError: shapes that do not belong together.
    """
    names: Sequence[str] = space.blocks if space else NINE_BLOCKS
    budget = math.inf if budget_ms is None else budget_ms
    every = (Limit("latency", "ms", latency_ms.detach().double().cpu(), budget, base_ms), *limits)
    for limit in every:
        if probabilities.shape != limit.cost.shape or probabilities.shape[1] != len(names):
            raise ValueError(
                f"probabilities {tuple(probabilities.shape)} and {limit.name} "
                f"{tuple(limit.cost.shape)}; expected both (layers, {len(names)}): pass space= for "
                "other blocks."
            )
    bounded = [limit for limit in every if limit.bounded]
    for limit in bounded:
        if not limit.range()[0] <= limit.most:
            asked = limit.written(limit.budget)
            raise InputError(f"No network fits {asked}: {limit.range_text()}.")
    score = probabilities.detach().double().cpu().clamp(min=SMALLEST_PROBABILITY).log().numpy()
    paths = _best_paths(score, every, count, least_used, at_most_s) if least_used > 0 else []
    paths = paths or _best_paths(score, every, count, at_most_s=at_most_s)
    if not paths:
        _refuse_conflict(bounded)
    chosen = []
    for path in paths:
        costs = {limit.key: limit.of(path) for limit in every}
        chosen.append(
            Architecture(
                tuple(names[j] for j in path),
                space.name if space else "",
                {
                    "log_probability": float(sum(score[i, j] for i, j in enumerate(path))),
                    **{k: round(v) if k == "params" else v for k, v in costs.items()},
                    "source": f"most probable within {_budgets(bounded)}",
                },
            )
        )
    return chosen


def lowest_within(limit: Limit, others: Sequence[Limit]) -> float:
    """Return the lowest cost of a sum that any network within the other budgets has.

    Raises:
        InputError: no network is within them.
    """
    free = replace(limit, budget=math.inf)
    return limit.of(_extreme(free, (free, *others), sign=-1))


def highest_within(limit: Limit, others: Sequence[Limit], *, enough: float = math.inf) -> float:
    """Return the highest cost of a sum that any network within its and the other budgets has.

    Args:
        enough: any cost from here on is as good, and found at once, where the very highest of
            a large space may take the solver minutes.

    Raises:
        InputError: no network is within them.
    """
    limits = (limit, *others)
    if 0 < enough <= limit.budget < math.inf:
        nothing = np.zeros(tuple(limit.cost.shape))
        found = _best_paths(nothing, limits, 1, enough / limit.budget)
        if found:
            return max(limit.of(found[0]), enough)  # less by the solver's tolerance, 1e-7
    return limit.of(_extreme(limit, limits, sign=1))


def _extreme(limit: Limit, limits: Sequence[Limit], *, sign: int) -> list[int]:
    """The path of the highest cost within `limits`, or with sign -1 of the lowest."""
    score = sign * limit.cost.detach().double().cpu().nan_to_num(0.0).numpy()
    paths = _best_paths(score, limits, 1)
    bounded = [x for x in limits if x.bounded]
    if not paths:
        _refuse_conflict(bounded)
        raise InputError(
            f"No network fits {_budgets(bounded)}: {'; '.join(x.range_text() for x in bounded)}."
        )
    return paths[0]


def _budgets(bounded: Sequence[Limit]) -> str:
    """4 ms and 1.5 mJ."""
    texts = [
        f"{x.budget:.0f} params" if x.name == "params" else f"{x.budget:.6g} {x.unit}"
        for x in bounded
    ]
    return " and ".join(texts) or "the space"


def _refuse_conflict(bounded: Sequence[Limit]) -> None:
    """Refuse budgets of which each can be met, but not all by one network."""
    if len(bounded) < 2 or _best_paths(np.zeros(tuple(bounded[0].cost.shape)), bounded, 1):
        return
    asked = ", ".join(limit.written(limit.budget) for limit in bounded)
    lowest = ", ".join(limit.written(limit.range()[0]) for limit in bounded)
    raise InputError(
        f"No network fits {asked} together: each budget alone can be met, the lowest are {lowest}; "
        "raise at least one of them."
    )


def _best_paths(
    score: np.ndarray,
    limits: Sequence[Limit],
    count: int,
    least_used: float = 0.0,
    at_most_s: float = math.inf,
) -> list[list[int]]:
    """Solve, exclude the answer, solve again. Each path is one block index per layer.

    `score` is (layers, blocks); the limits without a budget say only which blocks are offered.
    `least_used`: of the first budget of a sum. `at_most_s`: for each answer, in seconds.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    layers, blocks = score.shape
    bounded = [limit for limit in limits if limit.bounded]
    if any(limit.base > limit.most for limit in bounded):
        return []
    offered = torch.stack([limit.offered().cpu() for limit in limits]).all(dim=0).numpy()
    if not offered.any(axis=1).all():
        return []
    rows = [_row(limit, offered) for limit in bounded if limit.kind == "sum"]
    for _, within in rows:
        offered = offered & within
    one_per_layer = LinearConstraint(np.kron(np.eye(layers), np.ones(blocks)), 1, 1)
    budget_rows = [LinearConstraint(row * offered.ravel(), -np.inf, 1) for row, _ in rows]
    first = next((limit for limit in bounded if limit.kind == "sum"), None)
    if first is not None and least_used > 0:
        room = max(first.most - first.base, np.finfo(float).tiny)
        floor = (least_used * first.budget - first.base) / room
        budget_rows[0] = LinearConstraint(rows[0][0] * offered.ravel(), floor, 1)
    excluded: list[np.ndarray] = []
    found: list[list[int]] = []
    while len(found) < count and offered.any(axis=1).all():
        constraints = [one_per_layer, *budget_rows]
        if excluded:
            constraints.append(LinearConstraint(np.array(excluded), -np.inf, layers - 1))
        with _hushed():
            result = milp(
                -np.where(offered, score, 0.0).ravel(),
                integrality=np.ones(layers * blocks),
                bounds=Bounds(0, offered.astype(float).ravel()),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "time_limit": at_most_s},
            )
        if result.x is None:
            break
        choice = np.round(result.x).reshape(layers, blocks)
        excluded.append(choice.ravel())
        path = [int(j) for j in choice.argmax(axis=1)]
        # The solver's feasibility tolerance lets through what is over by 1e-7; the budget does not.
        if all(limit.of(path) <= limit.most for limit in bounded):
            found.append(path)
    return found


@contextmanager
def _hushed() -> Iterator[None]:
    """Hide what C code prints: HiGHS, as in scipy 1.17, prints lines that it is not asked for."""
    try:
        sys.stdout.flush()
        kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError):  # there is no standard output to hide it from
        yield
        return
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        if sys.platform != "win32":
            ctypes.CDLL(None).fflush(None)  # C has a buffer of its own
        os.dup2(kept, 1)
        for descriptor in (kept, nowhere):
            os.close(descriptor)


def _row(limit: Limit, offered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A sum's row of the integer program, in budgets: the solver's tolerance is absolute.

    Also which blocks can be in a network within the budget: (layers, blocks) bool. The others'
    costs in units of a budget that is nearly spent by the base would be huge.
    """
    cost = np.where(offered, limit.cost.detach().double().cpu().numpy(), np.inf)
    budget = limit.most - limit.base
    least = cost.min(axis=1, keepdims=True)
    room = budget - (least.sum() - least)
    within = cost <= room + ROUNDING * abs(limit.budget)
    scale = max(budget, np.finfo(float).tiny)
    return np.where(within, cost, 0.0).ravel() / scale, within
