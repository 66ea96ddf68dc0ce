"""Targets: tables and the budgets on them, as options, as a list, or spread over a whole front."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fbnas.commands.budgets import BUDGETS, check_budgets, given_budgets
from fbnas.commands.parts import check_fraction
from fbnas.errors import InputError, check_known, unknown
from fbnas.latency.table import LatencyTable
from fbnas.latency.trust import doubts
from fbnas.search import LatencySource, Target, check_limits, latency_range
from fbnas.space import SearchSpace

log = logging.getLogger(__name__)

FRONT = (0.1, 0.9)  # of the way from the fastest to the slowest network: beyond, there is no choice
OPTIONS = ("table", *BUDGETS, "target_fraction", "resolution")


@dataclass(frozen=True)
class Asked:
    """A target as it was asked for: a table's file, budgets, and a fraction where there is none.

    resolution: of its images; None is the space's.
    """

    table: Path
    budgets: dict[str, Any]
    fraction: float
    resolution: int | None = None


def targets_asked(config: Mapping[str, Any]) -> list[Asked]:
    """Read the targets of a command.

    Without `targets` they are the options table, target_ms, ..., target_fraction and resolution:
    lists of equal length, or one value of any for all. `targets=pareto` spreads `count` budgets of
    latency over the range of every table and resolution. A list of mappings with the same options
    as keys says each target by itself; what one leaves out is taken from the options.

    Raises:
        InputError: an unknown key or word, values that do not pair up or are no budgets.
    """
    targets = config["targets"]
    if targets is None:
        return _paired({key: config[key] for key in OPTIONS})
    if targets == "pareto":
        return _front(config)
    if isinstance(targets, str):
        raise unknown("value of targets:", targets, ["pareto"])
    found = []
    for number, target in enumerate(targets):
        if not isinstance(target, Mapping):
            raise InputError(
                f"targets[{number}] is {target!r}; expected a mapping, as in "
                "{table: mine.csv, target_ms: 8}"
            )
        check_known(f"key of targets[{number}]:", target, OPTIONS)
        alone = _paired({key: target.get(key, config[key]) for key in OPTIONS})
        if len(alone) > 1:
            raise InputError(
                f"targets[{number}] leaves lists to pair up; expected one value each: state it in "
                "the target"
            )
        found += alone
    if not found:
        raise InputError("targets is an empty list; expected at least one target")
    return found


def _front(config: Mapping[str, Any]) -> list[Asked]:
    given = given_budgets(config)
    if "target_ms" in given:
        raise InputError(
            "targets=pareto spreads budgets of latency by itself; expected no target_ms beside it"
        )
    count = config["count"]
    step = (FRONT[1] - FRONT[0]) / max(count - 1, 1)
    fractions = [FRONT[0] + step * i for i in range(count)] if count > 1 else [sum(FRONT) / 2]
    pairs = _paired({**config, "target_fraction": fractions[0]})
    return [replace(asked, fraction=fraction) for asked in pairs for fraction in fractions]


def _paired(options: Mapping[str, Any]) -> list[Asked]:
    """Match tables with budgets: lists of equal length, or one of any for all of the others."""
    lists = {
        key: options[key] if isinstance(options[key], list) else [options[key]] for key in OPTIONS
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
        check_fraction(row["target_fraction"])
        _check_resolution(row["resolution"])
    return [
        Asked(
            Path(row["table"]),
            {key: row[key] for key in BUDGETS},
            row["target_fraction"],
            row["resolution"],
        )
        for row in rows
    ]


def _check_resolution(resolution: Any) -> None:
    whole = isinstance(resolution, int) and not isinstance(resolution, bool)
    if resolution is not None and not (whole and resolution >= 1):
        raise InputError(f"resolution={resolution!r}; expected a whole number of pixels from 1.")


def build_targets(asked: Sequence[Asked], space: SearchSpace, classes: int) -> list[Target]:
    """Read the tables, each once, and pair them with budgets.

    Raises:
        InputError: no such table, or a budget out of the space's range.
    """
    tables = {path: LatencyTable.load(path) for path in dict.fromkeys(a.table for a in asked)}
    return [
        target_of(
            tables[a.table],
            space,
            classes,
            budgets=a.budgets,
            fraction=a.fraction,
            resolution=a.resolution,
        )
        for a in asked
    ]


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
    say_doubts(table)
    return target


def say_doubts(*tables: LatencySource) -> None:
    """Log why predictions of the tables are to be doubted, each reason once."""
    lines = [x for table in tables if isinstance(table, LatencyTable) for x in doubts(table)]
    for line in dict.fromkeys(lines):
        log.warning("%s", line)


def range_text(table: LatencySource, space: SearchSpace, classes: int) -> str:
    """Say what networks of a space take by a table, so what may be asked of them.

    Raises:
        InputError: a shape that the table does not hold.
    """
    fastest, slowest = latency_range(*table.tensor(space, classes=classes))
    return (
        f"networks of space {space.name} take {fastest:.4g} to {slowest:.4g} ms by the table: "
        "expected of target_ms is a value in between"
    )


def target_of(
    table: LatencyTable,
    space: SearchSpace,
    classes: int,
    *,
    budgets: Mapping[str, Any],
    fraction: float,
    resolution: int | None = None,
) -> Target:
    """Do what `choose_target` does, at a resolution, without a word on the table."""
    check_budgets(budgets)
    given = given_budgets(budgets)
    latency_ms, base_ms = table.tensor(space.at(resolution), classes=classes)
    if not given:
        check_fraction(fraction)
        fastest, slowest = latency_range(latency_ms, base_ms)
        given["target_ms"] = fastest + fraction * (slowest - fastest)
    ms, mj, mb, params = (given.get(option) for option in BUDGETS)
    target = Target(
        table,
        None if ms is None else float(ms),
        table.name,
        budget_mj=mj,
        budget_mb=mb,
        max_params=None if params is None else int(params),
        resolution=resolution,
    )
    check_limits(target.limits(space, classes))
    return target
