"""Networks drawn at random, within every budget and close to the first."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.search.selection import (
    LEAST_USED,
    ROUNDING,
    SMALLEST_PROBABILITY,
    Limit,
    highest_within,
)
from fbnas.search.supernet import Path

DRAWS_PER_NETWORK = 50  # that is wanted, before those outside are mended
MENDED_PER_NETWORK = 2  # a space may hold fewer networks than are wanted
FLATTER = 7  # times that probabilities are replaced by their square roots: then 1e-38 is 0.25


class Band:
    """What a network may cost: no more than any budget, and not much less than the first.

    floor * T <= cost <= T for the first budget T of a sum. Where other budgets or the space keep
    every network below that, the floor is so much of the highest cost there is instead: the band is
    never empty. A budget of a maximum has no floor.

    Args:
        limits: costs and budgets, each (layers, blocks) like `offered`.
        offered: (layers, blocks) bool, the blocks that may be chosen.
        floor: fraction of the first budget, 0 for none.

    Raises:
        InputError: no network is within the budgets, or a floor that is no fraction.
    """

    def __init__(
        self, limits: Sequence[Limit], offered: Tensor, *, floor: float = LEAST_USED
    ) -> None:
        if not 0 <= floor <= 1:
            raise InputError(f"floor is {floor}; expected from 0 (none) to 1.")
        self.offered = offered.cpu() & torch.stack([x.offered().cpu() for x in limits]).all(dim=0)
        own = [
            replace(x, cost=x.cost.detach().double().cpu().masked_fill(~self.offered, torch.nan))
            for x in limits
        ]
        self.limits = [limit for limit in own if limit.bounded]
        sums = [limit for limit in self.limits if limit.kind == "sum"]
        self.first = sums[0] if sums else None
        self.least = 0.0
        if self.first is not None and floor > 0:
            others = [limit for limit in own if limit is not self.first]
            least = floor * self.first.budget
            highest = highest_within(self.first, others, enough=least)
            self.least = (least if least <= highest else floor * highest) * (1 - ROUNDING)

    def excess(self, paths: Tensor) -> Tensor:
        """Return how far networks are outside, relative to the budgets; 0 is within: (n,).

        `paths`: (n, layers) block indices.
        """
        excess = torch.zeros(len(paths), dtype=torch.double)
        for limit in self.limits:
            costs = limit.cost[torch.arange(paths.shape[1]), paths]
            if limit.kind == "sum":
                total = limit.base + costs.sum(dim=1)
            else:
                total = costs.amax(dim=1).clamp(min=limit.base)
            excess += (total / limit.most - 1).clamp(min=0)
            if limit is self.first and self.least > 0:
                excess += (1 - total / self.least).clamp(min=0)
        return excess.nan_to_num(torch.inf)  # nan: a block that is not offered

    def holds(self, path: Sequence[int]) -> bool:
        """Whether a network is within."""
        return float(self.excess(torch.tensor([path]))) == 0

    def mended(
        self, path: Sequence[int], probabilities: Tensor, generator: torch.Generator
    ) -> Path | None:
        """Bring a network inside, by one block at a time; None where no single block helps.

        Among the changes that bring it closer one is drawn, by the `probabilities` of the blocks.
        """
        layers, blocks = self.offered.shape
        current = torch.tensor(path)
        excess = float(self.excess(current[None]))
        while excess > 0:
            changed = current.repeat(layers * blocks, 1)
            rows = torch.arange(layers * blocks)
            changed[rows, rows // blocks] = rows % blocks
            after = self.excess(changed)
            better = self.offered.flatten() & (after < excess)
            if not better.any():
                return None
            weights = probabilities.flatten().clamp(min=SMALLEST_PROBABILITY) * better
            chosen = int(torch.multinomial(weights, 1, generator=generator))
            current, excess = changed[chosen], float(after[chosen])
        return tuple(current.tolist())


def draw_within(
    probabilities: Tensor,
    band: Band,
    count: int,
    *,
    generator: torch.Generator,
    known: Collection[Path] = (),
) -> list[Path]:
    """Draw `count` different networks of the band from P_theta; fewer where it holds but few.

    Those drawn within the band come first, so that they have P_theta restricted to it; then draws
    from outside, mended; then both from a P_theta that is made flatter, where it is so sure of
    itself that it draws the same again and again.

    Args:
        probabilities: (layers, blocks), rows sum to 1.
        band: what the networks may cost.
        count: how many.
        generator: of the random numbers.
        known: networks that are not wanted again.
    """
    allowed = probabilities.detach().double().cpu().clamp(min=SMALLEST_PROBABILITY) * band.offered
    found: dict[Path, None] = {}
    for _ in range(FLATTER):
        if len(found) >= count:
            break
        _draw(found, allowed, band, count, generator=generator, known=known)
        allowed = allowed.sqrt()
    return list(found)


def _draw(
    found: dict[Path, None],
    allowed: Tensor,
    band: Band,
    count: int,
    *,
    generator: torch.Generator,
    known: Collection[Path],
) -> None:
    """Add to those found until they are `count`: draws from inside the band, then mended ones."""
    number = DRAWS_PER_NETWORK * count
    draws = torch.multinomial(allowed, number, replacement=True, generator=generator).T
    within = band.excess(draws) == 0
    for path in map(tuple, draws[within].tolist()):
        if len(found) < count and path not in known:
            found[path] = None
    for path in draws[~within][: MENDED_PER_NETWORK * count].tolist():
        if len(found) >= count:
            break
        mended = band.mended(path, allowed, generator)
        if mended is not None and mended not in known:
            found[mended] = None
