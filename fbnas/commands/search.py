"""fbnas search: theta and the shared weights."""

from typing import Any

from fbnas.commands.budgets import budgets_of, budgets_text, check_objective, predicted_text
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import data_for, space_of
from fbnas.commands.processes import check_fabric, fabric_of, is_first
from fbnas.commands.targets import build_targets, say_doubts, targets_asked
from fbnas.search import (
    LEAST_USED,
    ArchitectureDistribution,
    SearchSettings,
    Target,
    build_objective,
    most_probable_within,
    search,
)
from fbnas.space import SearchSpace


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
    at = "" if target.resolution is None else f" at {target.resolution} pixels"
    print(
        f"{target.name}{at}: {best} predicted {predicted_text(best.provenance, limits)} "
        f"(budgets {budgets_text(limits)})"
    )
    resolution = {} if target.resolution is None else {"resolution": target.resolution}
    return {
        "architecture": list(best.blocks),
        **resolution,
        **budgets_of(limits),
        **best.provenance,
    }
