"""fbnas search: theta and the shared weights."""

from collections.abc import Sequence
from typing import Any

from fbnas.commands.budgets import budgets_of, budgets_text, check_objective, predicted_text
from fbnas.commands.folder import OutFolder
from fbnas.commands.front import Chosen, write_front
from fbnas.commands.parts import data_for, space_of
from fbnas.commands.processes import check_fabric, fabric_of, is_first
from fbnas.commands.targets import build_targets, say_doubts, targets_asked
from fbnas.search import (
    ArchitectureDistribution,
    Limit,
    SearchSettings,
    Target,
    best_within,
    build_objective,
    search,
)
from fbnas.space import Architecture
from fbnas.training.settings import choose_device


def main(config: dict[str, Any]) -> int:
    settings = SearchSettings.from_dict(config["search"])
    objective = build_objective(**config["objective"])
    space = space_of(config)
    asked = targets_asked(config)
    for target in asked:
        check_objective(objective, target.budgets)
    spaces = [space.at(target.resolution) for target in asked]
    data = data_for(config, max(spaces, key=lambda x: x.resolution))  # scaled down for the others
    targets = build_targets(asked, space, data.classes)
    check_fabric(config)
    out = OutFolder(config)
    fabric = fabric_of(config, settings.device)
    if is_first():
        say_doubts(*(target.table for target in targets))
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
    limits = [target.limits(space, data.classes) for target in targets]
    chosen = [
        Chosen(_chosen(target, costs, theta), costs, theta)
        for target, costs, theta in zip(targets, limits, result.distributions, strict=True)
    ]
    if len({each.resolution for each in spaces}) == 1:  # else what they see is not comparable
        write_front(
            out.folder,
            spaces[0],
            chosen,
            data,
            weights_fraction=settings.weights_fraction,
            seed=config["seed"],
            device=choose_device(settings.device),
        )
    print(f"{out.folder}: next, fbnas sample run={out.folder} count=5")
    out.finish(
        space=space.name,
        architecture=list(chosen[0].architecture.blocks),
        predicted_latency_ms=chosen[0].architecture.provenance["predicted_latency_ms"],
        target_ms=targets[0].budget_ms,
        targets=[
            {
                "architecture": list(each.architecture.blocks),
                **({} if target.resolution is None else {"resolution": target.resolution}),
                **budgets_of(each.limits),
                **each.architecture.provenance,
            }
            for each, target in zip(chosen, targets, strict=True)
        ],
    )
    return 0


def _chosen(
    target: Target, limits: Sequence[Limit], theta: ArchitectureDistribution
) -> Architecture:
    """Print and return the most probable architecture within a target's budgets."""
    best = best_within(theta, limits, count=1)[0]
    at = "" if target.resolution is None else f" at {target.resolution} pixels"
    print(
        f"{target.name}{at}: {best} predicted {predicted_text(best.provenance, limits)} "
        f"(budgets {budgets_text(limits)})"
    )
    return best
