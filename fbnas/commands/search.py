"""fbnas search: theta and the shared weights."""

from pathlib import Path
from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import check_fraction, data_for, space_of
from fbnas.errors import InputError
from fbnas.latency.table import LatencyTable
from fbnas.search import (
    SearchSettings,
    Target,
    build_objective,
    check_budget,
    latency_range,
    most_probable_within,
    search,
)
from fbnas.space import SearchSpace


def main(config: dict[str, Any]) -> int:
    settings = SearchSettings.from_dict(config["search"])
    objective = build_objective(**config["objective"])
    space = space_of(config)
    tables, budgets = _pairs(config["table"], config["target_ms"])
    data = data_for(config, space)
    targets = [
        choose_target(
            LatencyTable.load(table), space, data.classes, budget, config["target_fraction"]
        )
        for table, budget in zip(tables, budgets, strict=True)
    ]
    out = OutFolder(config)
    result = search(
        space,
        data,
        targets,
        objective=objective,
        settings=settings,
        seed=config["seed"],
        out=out.folder,
        resume=out.resume,
    )
    chosen = []
    for target, theta in zip(targets, result.distributions, strict=True):
        latency_ms, base_ms = target.table.tensor(space, classes=data.classes)
        best = most_probable_within(
            theta.probabilities(),
            latency_ms,
            budget_ms=target.budget_ms,
            base_ms=base_ms,
            count=1,
            space=space,
        )[0]
        chosen.append({"architecture": list(best.blocks), **best.provenance})
        print(
            f"{target.name}, {target.budget_ms:.4g} ms: {best} "
            f"(predicted {best.provenance['predicted_latency_ms']:.4g} ms)"
        )
    print(f"{out.folder}: next, fbnas sample run={out.folder} count=5")
    out.finish(
        space=space.name,
        architecture=chosen[0]["architecture"],
        predicted_latency_ms=chosen[0]["predicted_latency_ms"],
        target_ms=targets[0].budget_ms,
        targets=chosen,
    )
    return 0


def choose_target(
    table: LatencyTable,
    space: SearchSpace,
    classes: int,
    budget_ms: float | None,
    fraction: float,
) -> Target:
    """Pair a table with a budget: the one asked for, or a fraction of the way to the slowest.

    Raises:
        InputError: a budget out of the space's range, or a table of another space.
    """
    latency_ms, base_ms = table.tensor(space, classes=classes)
    if budget_ms is None:
        check_fraction(fraction)
        fastest, slowest = latency_range(latency_ms, base_ms)
        budget_ms = fastest + fraction * (slowest - fastest)
    check_budget(budget_ms, latency_ms, base_ms)
    return Target(table, float(budget_ms), table.name)


def _pairs(table: Any, target_ms: Any) -> tuple[list[Path], list[float | None]]:
    """Match tables with budgets: lists of equal length, or one of either for all of the other."""
    tables = table if isinstance(table, list) else [table]
    budgets = target_ms if isinstance(target_ms, list) else [target_ms]
    for budget in budgets:
        number = isinstance(budget, int | float) and not isinstance(budget, bool)
        if budget is not None and not (number and budget > 0):
            raise InputError(f"target_ms={budget!r}; expected a positive number of milliseconds.")
    if len(tables) == 1:
        tables = tables * len(budgets)
    if len(budgets) == 1:
        budgets = budgets * len(tables)
    if not tables or len(tables) != len(budgets):
        raise InputError(
            f"{len(tables)} tables and {len(budgets)} values of target_ms; expected as many of "
            "both, or one of either."
        )
    return [Path(t) for t in tables], budgets
