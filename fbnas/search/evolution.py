"""Evolution: the architectures within budgets that the shared weights do best with."""

from collections.abc import Callable, Sequence

import torch

from fbnas.errors import InputError
from fbnas.search.distribution import ArchitectureDistribution
from fbnas.search.ranking import Ranked
from fbnas.search.sampling import Band, draw_within
from fbnas.search.selection import LEAST_USED, Limit, most_probable_within
from fbnas.search.supernet import Path
from fbnas.space.architecture import Architecture

Judge = Callable[[Sequence[Architecture]], list[Ranked]]

TRIES_PER_CHILD = 20  # before a generation is as large as it gets: small spaces run out


def evolve(
    judge: Judge,
    limits: Sequence[Limit],
    *,
    theta: ArchitectureDistribution,
    population: int = 50,
    generations: int = 19,
    parents: int = 10,
    mutation: float = 0.1,
    floor: float = LEAST_USED,
    seed: int = 0,
) -> list[Ranked]:
    """Return all networks that were judged, best first: population * (generations + 1) at most.

    The first generation is the most probable network and draws from P_theta. Of every further one
    half crosses two of the best so far, each layer's block from either, and half changes blocks of
    one of the best; a child outside the budgets is mended, one known already is not judged again.
    Source: Guo et al. 2020 (Single Path One-Shot, arXiv 1904.00420), whose numbers are the
    defaults.

        judge = SharedWeightsJudge(supernet, data, seed=seed)
        best = evolve(judge, target.limits(space, data.classes), theta=theta)[0]

    Args:
        judge: ranks a list of architectures; a `SharedWeightsJudge`, or any function of that form.
        limits: costs and budgets, latency first, as a target tells them.
        theta: where the first generation comes from.
        population: networks in a generation.
        generations: after the first.
        parents: of so many best ones children are made.
        mutation: probability of a layer to draw a new block; at least one layer does.
        floor: fraction of the first budget that a network costs at least, where the space has such.
        seed: the same seed gives the same networks on CPU.

    Raises:
        InputError: no network is within the budgets, or a number out of its range.
    """
    _check(population=population, generations=generations, parents=parents, mutation=mutation)
    generator = torch.Generator().manual_seed(seed)
    band = Band(limits, theta.offered, floor=floor)
    probabilities = theta.probabilities().detach().double().cpu()
    paths = _first(theta, limits, band, population, generator)
    known: dict[Path, None] = dict.fromkeys(paths)
    ranked = judge([theta.architecture(path, source="evolution, first") for path in paths])
    for generation in range(1, generations + 1):
        best = [tuple(r.architecture.path(theta.space)) for r in ranked[:parents]]
        children: list[Path] = []
        for attempt in range(TRIES_PER_CHILD * population):
            if len(children) == population:
                break
            crossed = attempt % 2 == 0
            child = _cross(best, generator) if crossed else _mutate(best, band, mutation, generator)
            mended = band.mended(child, probabilities, generator)
            if mended is not None and mended not in known:
                known[mended] = None
                children.append(mended)
        if not children:
            break
        source = f"evolution, generation {generation}"
        ranked += judge([theta.architecture(path, source=source) for path in children])
        ranked.sort(key=lambda r: r.rank)
    return ranked


def _first(
    theta: ArchitectureDistribution,
    limits: Sequence[Limit],
    band: Band,
    count: int,
    generator: torch.Generator,
) -> list[Path]:
    """The most probable network, brought into the band, and draws from P_theta."""
    latency, *others = limits
    probabilities = theta.probabilities().detach().double().cpu()
    best = most_probable_within(
        probabilities,
        latency.cost,
        budget_ms=latency.budget if latency.bounded else None,
        base_ms=latency.base,
        count=1,
        space=theta.space,
        limits=others,
    )[0]
    mended = band.mended(best.path(theta.space), probabilities, generator)
    first = [] if mended is None else [mended]
    return first + draw_within(
        probabilities, band, count - len(first), generator=generator, known=first
    )


def _cross(best: Sequence[Path], generator: torch.Generator) -> Path:
    """Each layer's block from one of two."""
    mother, father = (best[_below(len(best), generator)] for _ in range(2))
    coins = torch.rand(len(mother), generator=generator).tolist()
    return tuple(m if coin < 0.5 else f for m, f, coin in zip(mother, father, coins, strict=True))


def _mutate(best: Sequence[Path], band: Band, mutation: float, generator: torch.Generator) -> Path:
    """One of the best with another block, of those offered, in some layers."""
    path = list(best[_below(len(best), generator)])
    changes = torch.rand(len(path), generator=generator) < mutation
    changes[_below(len(path), generator)] = True
    for layer in changes.nonzero().flatten().tolist():
        offered = band.offered[layer].nonzero().flatten()
        path[layer] = int(offered[_below(len(offered), generator)])
    return tuple(path)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=generator))


def _check(*, population: int, generations: int, parents: int, mutation: float) -> None:
    for name, value, least in (
        ("population", population, 1),
        ("generations", generations, 0),
        ("parents", parents, 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}; expected a whole number of at least {least}.")
    if not 0 <= mutation <= 1:
        raise InputError(f"mutation is {mutation}; expected a probability, 0 to 1.")
