"""fbnas search: theta and the shared weights."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbnas.commands.budgets import (
    BUDGETS,
    budgets_of,
    budgets_text,
    check_budgets,
    check_objective,
    given_budgets,
    predicted_text,
)
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import check_fraction, data_for, space_of
from fbnas.commands.processes import check_fabric, fabric_of, is_first
from fbnas.errors import InputError
from fbnas.latency.table import LatencyTable
from fbnas.latency.trust import doubts
from fbnas.search import (
    LEAST_USED,
    ArchitectureDistribution,
    LatencySource,
    SearchSettings,
    Target,
    build_objective,
    check_budget,
    check_limits,
    latency_range,
    most_probable_within,
    search,
)
from fbnas.space import SearchSpace

log = logging.getLogger(__name__)


def main(config: dict[str, Any]) -> int:
    settings = SearchSettings.from_dict(config["search"])
    objective = build_objective(**config["objective"])
    space = space_of(config)
    pairs = _pairs(config)
    for _, budgets in pairs:
        check_objective(objective, budgets)
    data = data_for(config, space)
    targets = [
        target_of(
            LatencyTable.load(table),
            space,
            data.classes,
            budgets=budgets,
            fraction=config["target_fraction"],
        )
        for table, budgets in pairs
    ]
    check_fabric(config)
    out = OutFolder(config)
    fabric = fabric_of(config, settings.device)
    if is_first():
        _say_doubts(*(target.table for target in targets))
    result = search(
        space,
        data,
        targets,
        objective=objective,
        settings=settings,
        seed=config["seed"],
        out=out.folder,
        resume=out.resume,
        fabric=fabric,
    )
    if not fabric.is_global_zero:
        return 0
    chosen = [
        _chosen(space, target, theta, data.classes)
        for target, theta in zip(targets, result.distributions, strict=True)
    ]
    print(f"{out.folder}: next, fbnas sample run={out.folder} count=5")
    out.finish(
        space=space.name,
        architecture=chosen[0]["architecture"],
        predicted_latency_ms=chosen[0]["predicted_latency_ms"],
        target_ms=targets[0].budget_ms,
        targets=chosen,
    )
    return 0


def _chosen(
    space: SearchSpace, target: Target, theta: ArchitectureDistribution, classes: int
) -> dict[str, Any]:
    """Print and return the most probable architecture within a target's budgets."""
    latency, *others = limits = target.limits(space, classes)
    best = most_probable_within(
        theta.probabilities(),
        latency.cost,
        budget_ms=target.budget_ms,
        base_ms=latency.base,
        count=1,
        space=space,
        limits=others,
        least_used=LEAST_USED,
    )[0]
    print(
        f"{target.name}: {best} predicted {predicted_text(best.provenance, limits)} "
        f"(budgets {budgets_text(limits)})"
    )
    return {"architecture": list(best.blocks), **budgets_of(limits), **best.provenance}


def choose_target(
    table: LatencyTable,
    space: SearchSpace,
    classes: int,
    *,
    budgets: Mapping[str, Any],
    fraction: float,
) -> Target:
    """Pair a table with budgets: those asked for, or a fraction of the way to the slowest.

    Reasons to doubt what the table predicts are logged as warnings.

    Args:
        budgets: target_ms, target_mj, target_mb and max_params, each a number or None; other keys
            play no part.
        fraction: of the way from the fastest to the slowest network, where no budget is set.

    Raises:
        InputError: a budget out of the space's range, or a table that does not fit or lacks what a
            budget needs.
    """
    target = target_of(table, space, classes, budgets=budgets, fraction=fraction)
    _say_doubts(table)
    return target


def _say_doubts(*tables: LatencySource) -> None:
    """Log why predictions of the tables are to be doubted, each reason once."""
    lines = [x for table in tables if isinstance(table, LatencyTable) for x in doubts(table)]
    for line in dict.fromkeys(lines):
        log.warning("%s", line)


def target_of(
    table: LatencyTable,
    space: SearchSpace,
    classes: int,
    *,
    budgets: Mapping[str, Any],
    fraction: float,
) -> Target:
    """Do what `choose_target` does, without a word on the table."""
    check_budgets(budgets)
    given = given_budgets(budgets)
    latency_ms, base_ms = table.tensor(space, classes=classes)
    if not given:
        check_fraction(fraction)
        fastest, slowest = latency_range(latency_ms, base_ms)
        given["target_ms"] = fastest + fraction * (slowest - fastest)
    if "target_ms" in given:
        check_budget(given["target_ms"], latency_ms, base_ms)
    ms, mj, mb, params = (given.get(option) for option in BUDGETS)
    target = Target(
        table,
        None if ms is None else float(ms),
        table.name,
        budget_mj=mj,
        budget_mb=mb,
        max_params=None if params is None else int(params),
    )
    check_limits(target.limits(space, classes))
    return target


def _pairs(config: Mapping[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """Match tables with budgets: lists of equal length, or one of any for all of the others."""
    lists = {
        key: config[key] if isinstance(config[key], list) else [config[key]]
        for key in ("table", *BUDGETS)
    }
    number = max(len(values) for values in lists.values())
    for key, values in lists.items():
        if len(values) not in (1, number):
            raise InputError(
                f"{len(values)} values of {key} for {number} targets; expected as many tables as "
                "budgets, or one of either."
            )
    rows = [{key: values[i % len(values)] for key, values in lists.items()} for i in range(number)]
    for row in rows:
        check_budgets(row)
    return [(Path(row.pop("table")), row) for row in rows]
