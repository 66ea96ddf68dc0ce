"""Learner: what one target learns. Its theta, its optimiser, its lambdas, and what blocks cost."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fbnas.search.distribution import ArchitectureDistribution
from fbnas.search.objectives import DualAscent, Objective
from fbnas.search.selection import Limit, check_limits, latency_range
from fbnas.search.settings import SearchSettings
from fbnas.search.target import Target
from fbnas.space.search_space import SearchSpace


@dataclass
class Learner:
    """One target's theta: its distribution, optimiser, lambdas, and what blocks cost there.

    Theta is a small table and stays on the CPU: draws are the same on every device and on every
    process, and no step of the weights waits for a GPU.

    `limits` are all known costs, latency first; `multipliers` hold a lambda per budget of a sum.
    """

    target: Target
    distribution: ArchitectureDistribution
    optimiser: torch.optim.Optimizer
    limits: tuple[Limit, ...]
    objective: Objective
    multipliers: dict[str, float] = field(default_factory=dict)
    warned: bool = False  # that theta collapsed

    def __post_init__(self) -> None:
        sums = [limit for limit in self.limits if limit.bounded and limit.kind == "sum"]
        self.first = sums[0] if sums else None  # the one that the objective acts on
        self.further = sums[1:]
        self.ascent = self.objective if isinstance(self.objective, DualAscent) else DualAscent()
        self.multipliers = {limit.name: 0.0 for limit in sums}

    def sees(self, images: Tensor) -> Tensor:
        """Return images (n, c, h, w) at the target's resolution; smaller ones are averaged."""
        side = self.distribution.space.resolution
        if images.shape[-1] == side:
            return images
        return interpolate(images, size=(side, side), mode="bilinear", antialias=True)

    @property
    def latency_ms(self) -> Tensor:
        """(layers, blocks), nan where a block is not offered."""
        return self.limits[0].cost

    @property
    def base_ms(self) -> float:
        """What every network takes."""
        return self.limits[0].base

    def expected(self, limit: Limit) -> Tensor:
        """E[cost] of the whole network in the limit's unit, differentiable in theta."""
        return self.distribution.expected(limit.cost, base=limit.base)

    def gates(
        self, settings: SearchSettings, tau: float, images: int
    ) -> tuple[Tensor, list[list[int]] | None]:
        """Draw the gates of a theta step, and which blocks it computes (None: all).

        Args:
            images: in the batch, for draws of their own.
        """
        if settings.theta_step == "two_paths":
            return self.distribution.two_path_gates(tau)
        draws = images if settings.draws == "example" else None
        hard = settings.theta_step == "hard"
        return self.distribution.gates(tau, hard=hard, draws=draws), None

    def loss(self, task_loss: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return what theta descends, on the device of the task's loss, and E[cost] by name."""
        bounded = [*([self.first] if self.first else []), *self.further]
        costs = {limit.name: self.expected(limit) for limit in bounded}
        loss = task_loss
        if self.first is not None:
            loss = self.objective.loss(
                task_loss,
                costs[self.first.name].to(task_loss.device),
                budget_ms=self.first.budget,
                multiplier=self.multipliers[self.first.name],
            )
        for limit in self.further:
            loss = loss + self.ascent.further_loss(
                costs[limit.name].to(task_loss.device),
                budget=limit.budget,
                multiplier=self.multipliers[limit.name],
            )
        return loss, {name: float(cost.detach()) for name, cost in costs.items()}

    def raise_multipliers(self, costs: dict[str, float]) -> None:
        """Let every lambda follow what its expected cost was before the step."""
        for limit in self.further:
            self.multipliers[limit.name] = self.ascent.next_multiplier(
                self.multipliers[limit.name], costs[limit.name], limit.budget
            )
        if self.first is not None:
            name, budget = self.first.name, self.first.budget
            self.multipliers[name] = self.objective.next_multiplier(
                self.multipliers[name], costs[name], budget
            )


def learner_of(
    space: SearchSpace, classes: int, target: Target, objective: Objective, settings: SearchSettings
) -> Learner:
    """Start a target's theta; it never offers a block that a budget of a maximum forbids.

    Raises:
        InputError: a budget or a latency that nothing can be learned for.
    """
    limits = target.limits(space, classes)
    latency_ms, base_ms = limits[0].cost, limits[0].base
    check_limits(limits)
    fastest_ms = latency_range(latency_ms, base_ms)[0]
    objective.check(None if target.budget_ms is None else fastest_ms)
    allowed = torch.stack([limit.offered() for limit in limits]).all(dim=0)
    distribution = ArchitectureDistribution(space.at(target.resolution), allowed)
    adam = torch.optim.Adam(
        distribution.parameters(), lr=settings.theta_lr, weight_decay=settings.theta_weight_decay
    )
    return Learner(target, distribution, adam, limits, objective)
