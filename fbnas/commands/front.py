"""front.json of a search: its networks beside baselines, all judged by the same shared weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fbnas.commands.candidates import drawn
from fbnas.files import write_json
from fbnas.search import ArchitectureDistribution, Limit, SharedWeightsJudge, read_supernet
from fbnas.shipped import shipped_names
from fbnas.space import Architecture, SearchSpace
from fbnas.training.data import Data

FRONT = "front.json"
JUDGED_BY = {"calibration_images": 64, "held_out_images": 512}
RANDOM = 6  # networks a target, drawn uniformly within its budgets


@dataclass(frozen=True)
class Chosen:
    """What a target came to, its budgets (latency first), and what the search learned for it."""

    architecture: Architecture
    limits: Sequence[Limit]
    theta: ArchitectureDistribution


def write_front(
    folder: Path,
    space: SearchSpace,
    chosen: Sequence[Chosen],
    data: Data,
    *,
    candidates: Sequence[Architecture] = (),
    weights_fraction: float,
    seed: int,
    device: torch.device,
) -> None:
    """Judge the chosen networks, candidates and baselines; write front.json into `folder`.

    Baselines are networks of the same block in every layer, the published ones of the space, and
    random ones that use each target's budget as the chosen one does.

    Args:
        folder: of the search, which holds the shared weights.
        space: the search's.
        chosen: a network per target of the search, in their order.
        data: the search's.
        candidates: others that were considered.
        weights_fraction: the search's, for its split of the images.
        seed: the search's.
        device: where the images run through the shared weights.
    """
    rows: list[tuple[dict[str, Any], Architecture]] = []
    for i, each in enumerate(chosen):
        some = drawn(RANDOM, each.theta, each.limits, [], seed + i)
        rows.append(({"kind": "target", "name": "chosen", "target": i}, each.architecture))
        rows += [({"kind": "random", "name": "random", "target": i}, x) for x in some]
    rows += [({"kind": "candidate", "name": "candidate"}, x) for x in candidates]
    rows += [({"kind": "uniform", "name": f"all {x.blocks[0]}"}, x) for x in _uniform(space)]
    rows += [({"kind": "published", "name": name}, x) for name, x in _published(space).items()]
    judge = SharedWeightsJudge(
        read_supernet(folder, space, data.classes),
        data,
        weights_fraction=weights_fraction,
        seed=seed,
        **JUDGED_BY,
        device=device,
    )
    found = {r.architecture.blocks: r for r in judge([x for _, x in rows])}
    networks = [
        {
            **what,
            "architecture": list(x.blocks),
            "accuracy": round(found[x.blocks].accuracy, 5),
            "cross_entropy": round(found[x.blocks].cross_entropy, 5),
        }
        for what, x in rows
    ]
    write_json(folder / FRONT, {"images": len(judge.held_out), "networks": networks})


def _uniform(space: SearchSpace) -> list[Architecture]:
    """A network per block that every layer offers."""
    return [
        Architecture((block,) * len(space.layers), space.name)
        for block in space.blocks
        if all(block in layer.blocks for layer in space.layers)
    ]


def _published(space: SearchSpace) -> dict[str, Architecture]:
    """The shipped architectures of the space by name."""
    shipped = {name: Architecture.load(name) for name in shipped_names("architecture")}
    return {name: x for name, x in shipped.items() if x.space == space.name}
