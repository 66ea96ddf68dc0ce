"""The budgets of an option line: target_ms, target_mj, target_mb and max_params."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fbnas.errors import InputError
from fbnas.search import Limit
from fbnas.search.objectives import Objective
from fbnas.space import Architecture, SearchSpace

BUDGETS = {  # option: what it counts
    "target_ms": "milliseconds",
    "target_mj": "millijoules",
    "target_mb": "megabytes (1e6 bytes)",
    "max_params": "parameters",
}


def check_budgets(config: Mapping[str, Any]) -> None:
    """Refuse budgets that are none; None stands for no budget.

    Raises:
        InputError: one is not a positive number.
    """
    for option, unit in BUDGETS.items():
        value = config.get(option)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise InputError(f"{option}={value!r}; expected a positive number of {unit}.")


def check_objective(objective: Objective, config: Mapping[str, Any]) -> None:
    """Refuse an objective that needs a budget of latency where only others are given.

    Raises:
        InputError: with the way out.
    """
    given = given_budgets(config)
    if given and "target_ms" not in given:
        objective.check(None)


def given_budgets(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the budgets that are set, by option."""
    return {option: config[option] for option in BUDGETS if config.get(option) is not None}


def with_budgets(limits: Sequence[Limit], config: Mapping[str, Any]) -> tuple[Limit, ...]:
    """Return the limits of a search with the budgets that are given in place of its own.

    Raises:
        InputError: a budget on what the search did not know.
    """
    asked = given_budgets(config)
    missing = [option for option in asked if option not in {limit.option for limit in limits}]
    if missing:
        column = "energy_mj" if missing[0] == "target_mj" else "peak_mb"
        raise InputError(
            f"{missing[0]}={asked[missing[0]]}; the search's table had no column {column}: search "
            "with a table that has it."
        )
    return tuple(replace(x, budget=float(asked.get(x.option, x.budget))) for x in limits)


def predict_(space: SearchSpace, architecture: Architecture, limits: Sequence[Limit]) -> None:
    """Note in the provenance what the architecture costs, where the costs are known."""
    path = architecture.path(space)
    for limit in limits:
        cost = limit.of(path)
        architecture.provenance[limit.key] = round(cost) if limit.name == "params" else cost


def predicted_text(provenance: Mapping[str, Any], limits: Sequence[Limit]) -> str:
    """Write what an architecture costs: 3.2 ms, 1.4 mJ, 0.9 MB, 1.2 M params."""
    return ", ".join(limit.written(provenance[limit.key]) for limit in limits)


def budgets_text(limits: Sequence[Limit]) -> str:
    """Write the budgets: 4 ms, 1.5 mJ."""
    return ", ".join(limit.written(limit.budget) for limit in limits if limit.bounded)


def budgets_of(limits: Sequence[Limit]) -> dict[str, float]:
    """Return the budgets by option, for result.json."""
    return {limit.option: limit.budget for limit in limits if limit.bounded}


def kept_text(provenance: Mapping[str, Any], limits: Sequence[Limit]) -> str:
    """Say how the budgets beside latency are kept, by prediction: energy 1.4 of 1.5 mJ."""
    parts = []
    for limit in limits:
        if limit.bounded and limit.name != "latency":
            cost, budget = limit.written(provenance[limit.key]), limit.written(limit.budget)
            source = "" if limit.name == "params" else " by the table"
            unit = f" {limit.unit}"
            parts.append(f"{limit.name} {cost.removesuffix(unit)} of {budget}{source}")
    return ", ".join(parts)
