"""What is chosen by a theta: the most probable networks within the budgets; and in few words."""

import math
from collections.abc import Sequence
from itertools import groupby

from fbnas.search.distribution import ArchitectureDistribution
from fbnas.search.learner import Learner
from fbnas.search.selection import LEAST_USED, Limit, most_probable_within
from fbnas.space.architecture import Architecture
from fbnas.space.search_space import SearchSpace

# The exact choice takes 0.03 s in space fbnet with one budget; several close ones may take minutes.
PATIENCE_S = 5.0


def best_within(
    theta: ArchitectureDistribution,
    limits: Sequence[Limit],
    *,
    count: int,
    at_most_s: float = math.inf,
) -> list[Architecture]:
    """Return the `count` most probable architectures within every budget, best first.

    They use at least `LEAST_USED` of the first budget, wherever the space has such networks.

    Args:
        limits: costs and budgets, latency first.
        at_most_s: as of `most_probable_within`.

    Raises:
        InputError: no architecture fits.
    """
    latency, *others = limits
    return most_probable_within(
        theta.probabilities(),
        latency.cost,
        budget_ms=latency.budget if latency.bounded else None,
        base_ms=latency.base,
        count=count,
        space=theta.space,
        limits=others,
        least_used=LEAST_USED,
        at_most_s=at_most_s,
    )


def choice_words(learner: Learner) -> tuple[str, str]:
    """Say what a target would be given now: what it costs by the table, and its blocks."""
    theta = learner.distribution
    found = best_within(theta, learner.limits, count=1, at_most_s=PATIENCE_S)
    if not found:
        return (
            f"nothing was found in {PATIENCE_S:g} s",
            "fbnas sample looks for as long as it takes",
        )
    costs = [
        _cost_words(limit, found[0].provenance[limit.key])
        for limit in learner.limits
        if limit.bounded or limit.name == "latency"
    ]
    return f"predicted {', '.join(costs)}", by_stage(found[0], theta.space)


def _cost_words(limit: Limit, cost: float) -> str:
    """4.02 of 4.2 ms; without a budget 4.02 ms."""
    words = limit.written(cost)
    if not limit.bounded:
        return words
    return f"{words.removesuffix(f' {limit.unit}')} of {limit.written(limit.budget)}"


def by_stage(architecture: Architecture, space: SearchSpace) -> str:
    """Write the blocks with a bar between stages and runs counted: k3_e1 | k5_e6 skip x3."""
    stages: dict[int, list[str]] = {}
    for layer, block in zip(space.layers, architecture.blocks, strict=True):
        stages.setdefault(layer.stage, []).append(block)
    return " | ".join(" ".join(_runs(blocks)) for blocks in stages.values())


def _runs(blocks: Sequence[str]) -> list[str]:
    runs = [(block, len(list(same))) for block, same in groupby(blocks)]
    return [block if times == 1 else f"{block} x{times}" for block, times in runs]
