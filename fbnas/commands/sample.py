"""fbnas sample: architectures from a finished search."""

from pathlib import Path
from typing import Any

import torch

from fbnas.commands.budgets import (
    budgets_of,
    check_budgets,
    predict_,
    predicted_text,
    with_budgets,
)
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import data_for, search_folder
from fbnas.errors import InputError, unknown
from fbnas.files import read_yaml, write_yaml
from fbnas.search import (
    check_budget,
    check_limits,
    most_probable_within,
    rank_by_shared_weights,
    read_result,
    read_supernet,
)
from fbnas.space import Architecture


def main(config: dict[str, Any]) -> int:
    if config["rank"] not in ("probability", "shared_weights"):
        raise unknown("rank", config["rank"], ("probability", "shared_weights"))
    source = search_folder(config["run"])
    space, learned, classes = read_result(source)
    if not 0 <= config["target"] < len(learned):
        raise InputError(
            f"target={config['target']}; the search has {len(learned)}, counted from 0."
        )
    target = learned[config["target"]]
    check_budgets(config)
    latency, *others = limits = with_budgets(target.limits, config)
    budget_ms = latency.budget if latency.bounded else None
    if budget_ms is not None:
        check_budget(budget_ms, latency.cost, latency.base)
    check_limits(limits)
    out = OutFolder(config)
    folder = out.path or Path(config["run"])

    theta = target.distribution
    best = most_probable_within(
        theta.probabilities(),
        latency.cost,
        budget_ms=budget_ms,
        base_ms=latency.base,
        count=config["count"],
        space=space,
        limits=others,
    )
    if config["rank"] == "shared_weights":
        best = _ranked(config, source, best, space, classes)
    if out.path is not None:
        write_yaml(folder / "space.yaml", space.to_dict())
    generator = torch.Generator().manual_seed(config["seed"])
    named = {f"{i:02d}": architecture for i, architecture in enumerate(best, start=1)}
    named["most_probable"] = theta.most_probable()
    named |= {f"random_{i:02d}": theta.sample(generator) for i in range(1, config["random"] + 1)}
    for name, architecture in named.items():
        predict_(space, architecture, limits)
        file = folder / "architectures" / f"{name}.yaml"
        architecture.save(file)
        probability = architecture.provenance["log_probability"]
        predicted = predicted_text(architecture.provenance, limits)
        print(f"{file}: {predicted}, log-probability {probability:.2f}: {architecture}")
    out.finish(
        architecture=list(best[0].blocks),
        **{limit.key: best[0].provenance[limit.key] for limit in limits if limit.name != "params"},
        **budgets_of(limits),
    )
    return 0


def _ranked(
    config: dict[str, Any], source: Path, best: list[Architecture], space: Any, classes: int
) -> list[Architecture]:
    """Order by cross-entropy with the shared weights, on the images that theta learned from."""
    searched = read_yaml(_config_of(source))
    seed = searched.get("seed", 0)
    data = data_for(config, space)
    if data.classes != classes:
        raise InputError(
            f"{data.name} has {data.classes} classes, the search had {classes}; give the search's "
            "data=..."
        )
    ranked = rank_by_shared_weights(
        read_supernet(source, space, classes),
        best,
        data,
        weights_fraction=searched["search"]["weights_fraction"],
        seed=seed,
    )
    for r in ranked:
        r.architecture.provenance["shared_weights_cross_entropy"] = round(r.cross_entropy, 5)
        r.architecture.provenance["shared_weights_accuracy"] = round(r.accuracy, 5)
    return [r.architecture for r in ranked]


def _config_of(source: Path) -> Path:
    """A search inside a run has the run's configuration."""
    own = source / "config.yaml"
    return own if own.is_file() else source.parent / "config.yaml"
