"""fbnas sample: architectures from a finished search."""

from dataclasses import replace
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
from fbnas.commands.candidates import (
    candidates_before,
    check_choice,
    halved,
    ranked_by_shared_weights,
    split_of,
)
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import data_for, search_folder
from fbnas.errors import InputError
from fbnas.files import write_yaml
from fbnas.search import (
    Learned,
    Limit,
    check_limits,
    most_probable_within,
    read_result,
)
from fbnas.space import Architecture, SearchSpace
from fbnas.training.data import Data
from fbnas.training.settings import choose_device


def main(config: dict[str, Any]) -> int:
    check_choice(config)
    source = search_folder(config["run"])
    space, learned, classes = read_result(source)
    if not 0 <= config["target"] < len(learned):
        raise InputError(
            f"target={config['target']}; the search has {len(learned)}, counted from 0."
        )
    target = learned[config["target"]]
    space = target.distribution.space
    check_budgets(config)
    limits = with_budgets(target.limits, config)
    check_limits(limits)
    data = _data(config, space, classes)
    if config["halving"] and not config["out"]:
        config["out"] = str(Path(config["run"]) / "halving")
    out = OutFolder(config)
    folder = out.path or Path(config["run"])

    best = candidates_before(folder) if config["halving"] and out.resume else None
    if best is None:
        best = _best(config, source, target, limits, data)
    if config["halving"]:
        assert data is not None
        best = halved(config, source, space, best, data=data, out=folder, resume=out.resume)
    theta = target.distribution
    if out.path is not None:
        write_yaml(folder / "space.yaml", space.to_dict())
    generator = torch.Generator().manual_seed(config["seed"])
    named = {f"{i:02d}": architecture for i, architecture in enumerate(best, start=1)}
    named["most_probable"] = theta.most_probable()
    named |= {f"random_{i:02d}": theta.sample(generator) for i in range(1, config["random"] + 1)}
    for name, found in named.items():
        architecture = replace(found, resolution=target.resolution)
        predict_(space, architecture, limits)
        file = folder / "architectures" / f"{name}.yaml"
        architecture.save(file)
        probability = architecture.provenance["log_probability"]
        predicted = predicted_text(architecture.provenance, limits)
        print(f"{file}: {predicted}, log-probability {probability:.2f}: {architecture}")
    first = best[0].provenance
    out.finish(
        architecture=list(best[0].blocks),
        **{limit.key: first[limit.key] for limit in limits if limit.name != "params"},
        **budgets_of(limits),
        validation_accuracy=first.get("validation_accuracy"),
    )
    return 0


def _data(config: dict[str, Any], space: SearchSpace, classes: int) -> Data | None:
    """Load the search's data, where the choice needs any."""
    if config["rank"] == "probability" and not config["halving"]:
        return None
    data = data_for(config, space)
    if data.classes != classes:
        raise InputError(
            f"{data.name} has {data.classes} classes, the search had {classes}; give the search's "
            "data=..."
        )
    return data


def _best(
    config: dict[str, Any],
    source: Path,
    target: Learned,
    limits: tuple[Limit, ...],
    data: Data | None,
) -> list[Architecture]:
    """The most probable within the budgets, or the best of many by the shared weights."""
    latency, *others = limits
    best = most_probable_within(
        target.distribution.probabilities(),
        latency.cost,
        budget_ms=latency.budget if latency.bounded else None,
        base_ms=latency.base,
        count=config["count"],
        space=target.distribution.space,
        limits=others,
    )
    if config["rank"] == "probability":
        return best
    assert data is not None
    return ranked_by_shared_weights(
        source,
        target.distribution,
        limits,
        count=config["count"],
        candidates=config["candidates"],
        candidates_from=config["candidates_from"],
        best=best,
        data=data,
        **split_of(source),
        seed=config["seed"],
        device=choose_device(config["training"]["device"]),
    )
