"""Target: a device's table and the budgets that one theta is learned for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.search.selection import Limit
from fbnas.space.network import block_params
from fbnas.space.search_space import SearchSpace


class LatencySource(Protocol):
    """Anything that knows what blocks cost; a LatencyTable is one.

    It may also know `energy` (mJ, a sum) and `peak` (MB, a maximum), called as `tensor` is.
    """

    def tensor(self, space: SearchSpace, *, classes: int | None = None) -> tuple[Tensor, float]:
        """Return (layers, blocks) ms with nan where not offered, and the base in ms."""


@dataclass(frozen=True)
class Target:
    """A device's table and budgets: what one theta is learned for. None is no budget.

    budget_ms: latency; budget_mj: energy of one run; budget_mb: peak memory in 1e6 bytes;
    max_params: parameters, as `count` counts them. resolution: of the images that its networks are
    shown, in pixels; None is the space's.

    Raises:
        InputError: there is no budget at all.
    """

    table: LatencySource
    budget_ms: float | None
    name: str = ""
    budget_mj: float | None = None
    budget_mb: float | None = None
    max_params: int | None = None
    resolution: int | None = None

    def __post_init__(self) -> None:
        budgets = (self.budget_ms, self.budget_mj, self.budget_mb, self.max_params)
        if all(budget is None for budget in budgets):
            raise InputError(
                f"The target {self.name or 'of the search'} has no budget; expected at least one: "
                "target_ms, target_mj, target_mb or max_params."
            )

    def limits(self, space: SearchSpace, classes: int) -> tuple[Limit, ...]:
        """Return all that is known of the costs, latency first; with budgets where they were set.

        Raises:
            InputError: the table does not hold what a budget needs.
        """
        space = space.at(self.resolution)
        latency_ms, base_ms = self.table.tensor(space, classes=classes)
        limits = [latency_limit(latency_ms, base_ms, self.budget_ms)]
        kinds: tuple[tuple[str, str, float | None, Literal["sum", "max"]], ...] = (
            ("energy", "mJ", self.budget_mj, "sum"),
            ("peak", "MB", self.budget_mb, "max"),
        )
        for name, unit, budget, kind in kinds:
            found = self._costs(name, space, classes, required=budget is not None)
            if found:
                limits.append(Limit(name, unit, found[0], _budget(budget), found[1], kind))
        return (*limits, params_limit(space, classes, self.max_params))

    def _costs(
        self, name: str, space: SearchSpace, classes: int, *, required: bool
    ) -> tuple[Tensor, float] | None:
        read = getattr(self.table, name, None)
        if read is None and not required:
            return None
        if read is None:
            raise InputError(f"{self.name or 'The table'} knows no {name}; give a table that does.")
        try:
            return read(space, classes=classes)
        except InputError:
            if required:
                raise
            return None


def latency_limit(latency_ms: Tensor, base_ms: float, budget_ms: float | None = None) -> Limit:
    """Return latencies as a limit: a budget on their sum, or none."""
    return Limit("latency", "ms", latency_ms, _budget(budget_ms), base_ms)


def params_limit(space: SearchSpace, classes: int, most: int | None = None) -> Limit:
    """Return the parameters of blocks as a limit: a budget on their sum, or none."""
    params, base = block_params(space, classes)
    return Limit("params", "params", params, _budget(most), float(base))


def limit_as_dict(limit: Limit) -> dict[str, Any]:
    """Return plain JSON that `limit_from_dict` reads back: null where a block is not offered."""
    cost = [[None if math.isnan(x) else x for x in row] for row in limit.cost.tolist()]
    return {
        "name": limit.name,
        "unit": limit.unit,
        "kind": limit.kind,
        "budget": limit.budget if limit.bounded else None,
        "base": limit.base,
        "cost": cost,
    }


def limit_from_dict(content: Mapping[str, Any]) -> Limit:
    """Read what `limit_as_dict` wrote."""
    return Limit(
        content["name"],
        content["unit"],
        costs_of(content["cost"]),
        _budget(content["budget"]),
        content["base"],
        content["kind"],
    )


def costs_of(rows: list[list[float | None]]) -> Tensor:
    """(layers, blocks) float64 from JSON: nan where a block is not offered."""
    values = [[float("nan") if x is None else x for x in row] for row in rows]
    return torch.tensor(values, dtype=torch.double)


def _budget(value: float | None) -> float:
    return math.inf if value is None else float(value)
