"""Candidates of a finished search: drawn, ranked by the shared weights, halved by training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fbnas.commands.train import start
from fbnas.errors import InputError, unknown
from fbnas.files import read_yaml, write_json
from fbnas.search import (
    ArchitectureDistribution,
    Band,
    Limit,
    Ranked,
    SharedWeightsJudge,
    draw_within,
    evolve,
    rank_by_shared_weights,
    read_supernet,
)
from fbnas.space import Architecture, SearchSpace
from fbnas.training.augmentation import build_augmentation
from fbnas.training.data import Data
from fbnas.training.halving import Halved, Trial, halve, planned
from fbnas.training.settings import TrainingSettings, choose_device

CHOICES = {
    "rank": ("probability", "shared_weights"),
    "candidates_from": ("theta", "evolution", "random"),
    "init": ("scratch", "supernet"),
}
# Of many candidates the first ranking takes few images, and the supernet's own statistics of batch
# normalisation. The Kendall correlation with the truth within a budget is 0.39 by so many, 0.46 by
# 512; with statistics from 64 images 0.37 and 0.41, from 512 and by all 0.46. The best of the first
# quarter then has a regret of 0.25 points, by all 0.20 (scripts/ground_truth/screening.py).
SCREENING = {"calibration_images": 0, "held_out_images": 256}
FINALISTS = 20  # that are ranked by all images
ROUNDS = 5  # of evolution: the first draws, and so many generations less one


def check_choice(config: Mapping[str, Any]) -> None:
    """Refuse options that say not how candidates are chosen.

    Raises:
        InputError: an unknown name, or numbers that do not belong together.
    """
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise unknown(key, config[key], known)
    if config["rank"] == "shared_weights" and config["candidates"] < config["count"]:
        raise InputError(
            f"candidates={config['candidates']} for count={config['count']}; expected at least as "
            "many candidates as are written."
        )
    settings = TrainingSettings.from_dict(config["training"])
    if config["halving"] or config["rank"] == "shared_weights":
        choose_device(settings.device)
    if config["halving"]:
        build_augmentation(**settings.augment)
        if config["count"] < 2:
            raise InputError(
                f"halving=true of count={config['count']}; expected at least 2 candidates to halve."
            )


def ranked_by_shared_weights(
    source: Path,
    theta: ArchitectureDistribution,
    limits: Sequence[Limit],
    *,
    count: int,
    candidates: int,
    candidates_from: str,
    best: Sequence[Architecture],
    data: Data,
    weights_fraction: float,
    seed: int,
    split_seed: int | None = None,
    device: torch.device,
) -> list[Architecture]:
    """Return the `count` best of `candidates` networks by the shared weights.

    Args:
        source: folder of the search.
        theta: what the search learned.
        limits: costs and budgets, latency first.
        count: how many; fewer where fewer fit.
        candidates: how many are ranked, all within the budgets.
        candidates_from: one of `CHOICES`.
        best: the most probable networks within the budgets, candidates too if they are from theta.
        data: the search's.
        weights_fraction: the search's.
        seed: of the draws.
        split_seed: the search's; by default `seed`.
        device: where the images run through the shared weights.
    """
    supernet = read_supernet(source, theta.space, data.classes)
    split: dict[str, Any] = {
        "weights_fraction": weights_fraction,
        "seed": seed if split_seed is None else split_seed,
    }
    screen = SharedWeightsJudge(supernet, data, **split, **SCREENING, device=device)
    if candidates_from == "evolution":
        found = evolve(
            screen,
            limits,
            theta=theta,
            population=-(-candidates // ROUNDS),
            generations=ROUNDS - 1,
            seed=seed,
        )
        finalists = [r.architecture for r in found]
    else:
        known = best if candidates_from == "theta" else []
        finalists = drawn(candidates, theta, limits, known, seed)
    places = max(FINALISTS, 4 * count)
    if len(finalists) > places:
        finalists = [r.architecture for r in screen(finalists)[:places]]
    first = rank_by_shared_weights(supernet, finalists, data, **split, device=device)
    return [_noted(r) for r in first[:count]]


def drawn(
    count: int,
    theta: ArchitectureDistribution,
    limits: Sequence[Limit],
    best: Sequence[Architecture],
    seed: int,
) -> list[Architecture]:
    """`best` and draws from P_theta, or without any uniform draws, all within the budgets."""
    generator = torch.Generator().manual_seed(seed)
    band = Band(limits, theta.offered)
    if not best:
        paths = draw_within(theta.offered.double(), band, count, generator=generator)
        return [theta.architecture(path, source="random within the budgets") for path in paths]
    known = [tuple(a.path(theta.space)) for a in best]
    paths = draw_within(
        theta.probabilities(), band, count - len(best), generator=generator, known=known
    )
    return [
        *best,
        *(theta.architecture(path, source="sampled from P_theta") for path in paths),
    ]


def _noted(r: Ranked) -> Architecture:
    r.architecture.provenance["shared_weights_cross_entropy"] = round(r.cross_entropy, 5)
    r.architecture.provenance["shared_weights_accuracy"] = round(r.accuracy, 5)
    return r.architecture


def split_of(source: Path) -> dict[str, Any]:
    """Return how the search split its images; a search inside a run has the run's configuration."""
    own = source / "config.yaml"
    searched = read_yaml(own if own.is_file() else source.parent / "config.yaml")
    return {
        "weights_fraction": searched["search"]["weights_fraction"],
        "split_seed": searched.get("seed", 0),
    }


def halved(
    config: Mapping[str, Any],
    source: Path,
    space: SearchSpace,
    candidates: Sequence[Architecture],
    *,
    data: Data,
    out: Path,
    resume: bool,
) -> list[Architecture]:
    """Train candidates, keep the better half, train on; write halving.json; return best first."""
    supernet = str(source) if config["init"] == "supernet" else None
    found = halve(
        candidates,
        lambda architecture: start(space, architecture, data.classes, supernet),
        data,
        epochs=config["halving_epochs"],
        settings=TrainingSettings.from_dict(config["training"]),
        seed=config["seed"],
        out=out,
        resume=resume,
        on_trial=_say,
    )
    for each in found:
        if each.trials:
            last = each.trials[-1]
            each.architecture.provenance.update(
                halving_rungs=last.rung,
                halving_epochs=last.epochs,
                halving_init=config["init"],
                **_outcome(last),
            )
    write_json(out / "halving.json", _record(config, found))
    return [each.architecture for each in found]


def candidates_before(out: Path) -> list[Architecture] | None:
    """Return the candidates of an interrupted halving, None where it had not begun."""
    return planned(out)


def _outcome(trial: Trial) -> dict[str, Any]:
    """What an architecture's file says of its last trial."""
    if trial.validation_accuracy is None or trial.validation_cross_entropy is None:
        return {"halving_diverged": True}
    return {
        "validation_accuracy": round(trial.validation_accuracy, 5),
        "validation_cross_entropy": round(trial.validation_cross_entropy, 5),
    }


def _say(trial: Trial, rungs: int) -> None:
    found = "diverged, the last of its rung"
    if trial.validation_accuracy is not None:
        found = (
            f"validation accuracy {100 * trial.validation_accuracy:.2f} %, cross-entropy "
            f"{trial.validation_cross_entropy:.4f}"
        )
    start = f"rung {trial.rung}/{rungs}, {trial.epochs} epochs"
    print(f"{start}, candidate {trial.candidate:02d}: {found}", flush=True)


def _record(config: Mapping[str, Any], found: Sequence[Halved]) -> dict[str, Any]:
    """Every trial of every candidate, best candidate first."""
    return {
        "epochs": config["halving_epochs"],
        "init": config["init"],
        "candidates": [
            {
                "place": place,
                "candidate": each.trials[0].candidate if each.trials else place,
                "architecture": list(each.architecture.blocks),
                "trials": [
                    {
                        "rung": trial.rung,
                        "epochs": trial.epochs,
                        "validation_accuracy": trial.validation_accuracy,
                        "validation_cross_entropy": trial.validation_cross_entropy,
                        "diverged": trial.diverged,
                    }
                    for trial in each.trials
                ],
            }
            for place, each in enumerate(found, start=1)
        ],
    }
