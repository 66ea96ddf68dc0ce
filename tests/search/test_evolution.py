"""Evolution within budgets: against brute force, with a stub in the place of the shared weights."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from search_run import SPACE, small_digits

from fbnas.errors import InputError
from fbnas.search import (
    ArchitectureDistribution,
    Band,
    Limit,
    Ranked,
    SharedWeightsJudge,
    Supernet,
    draw_within,
    evolve,
    highest_within,
)
from fbnas.space import Architecture, SearchSpace

Path = tuple[int, ...]


def small_space() -> SearchSpace:
    """4 layers of 6 blocks: 1,296 networks."""
    content = SearchSpace.load("quickstart").to_dict()
    content["stages"] = content["stages"][:2]
    content["blocks"] = content["blocks"][:6]
    return SearchSpace.from_dict(content)


SMALL = small_space()
PATHS = list(itertools.product(range(6), repeat=4))


def limits_of(seed: int, *budgets: float, base: float = 1.0) -> tuple[Limit, ...]:
    """Latency and energy by chance, and peak memory: 0.5 to 4.5 a layer."""
    generator = torch.Generator().manual_seed(seed)
    cost = 0.5 + 4 * torch.rand(3, 4, 6, generator=generator, dtype=torch.double)
    names = (("latency", "ms", "sum"), ("energy", "mJ", "sum"), ("peak", "MB", "max"))
    given = [*budgets, *[float("inf")] * (3 - len(budgets))]
    return tuple(
        Limit(name, unit, cost[i], given[i], base, kind)  # type: ignore[arg-type]
        for i, (name, unit, kind) in enumerate(names)
    )


class Stub:
    """A cross-entropy by chance in which neighbouring layers matter together; who was judged."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.alone = torch.rand(4, 6, generator=generator)
        self.pairs = torch.rand(3, 6, 6, generator=generator)
        self.judged: list[Path] = []

    def of(self, path: Sequence[int]) -> float:
        alone = sum(float(self.alone[i, b]) for i, b in enumerate(path))
        return alone + sum(
            float(self.pairs[i, a, b]) for i, (a, b) in enumerate(itertools.pairwise(path))
        )

    def __call__(self, architectures: Sequence[Architecture]) -> list[Ranked]:
        paths = [tuple(a.path(SMALL)) for a in architectures]
        self.judged += paths
        ranked = [Ranked(a, self.of(p), 0.5) for a, p in zip(architectures, paths, strict=True)]
        return sorted(ranked, key=lambda r: r.rank)


def in_band(limits: Sequence[Limit], floor: float = 0.9) -> list[Path]:
    """By brute force: within every budget, and not below the floor if there is such a network."""
    within = [p for p in PATHS if all(x.of(p) <= x.budget for x in limits)]
    first = next((x for x in limits if x.bounded and x.kind == "sum"), None)
    if first is None:
        return within
    highest = max(map(first.of, within))
    least = floor * (first.budget if highest >= floor * first.budget else highest)
    return [p for p in within if first.of(p) >= least]


INF = float("inf")
BUDGETS = [(9.0,), (8.0, 9.0), (INF, 8.0), (9.0, 10.0, 4.0), (INF, INF, 3.0), (12.0, 6.5), ()]


@pytest.mark.parametrize("budgets", BUDGETS)
def test_evolution_finds_the_best_within_the_budgets(budgets: tuple[float, ...]) -> None:
    limits, stub = limits_of(1, *budgets), Stub()
    theta = ArchitectureDistribution(SMALL)
    found = evolve(stub, limits, theta=theta, population=24, generations=9, parents=8)
    allowed = in_band(limits)
    assert set(stub.judged) <= set(allowed)
    assert len(set(stub.judged)) == len(stub.judged) <= 240
    assert [r.cross_entropy for r in found] == sorted(map(stub.of, stub.judged))
    best = min(allowed, key=stub.of)
    assert tuple(found[0].architecture.path(SMALL)) == best
    provenance = found[0].architecture.provenance
    assert provenance["log_probability"] == pytest.approx(theta.log_probability(best))
    assert provenance["source"].startswith("evolution, ")


def test_evolution_does_better_than_as_many_draws() -> None:
    evolved, drawn = [], []
    for seed in range(5):
        limits, stub = limits_of(seed, 9.0), Stub(seed)
        theta = ArchitectureDistribution(SMALL)
        found = evolve(stub, limits, theta=theta, population=15, generations=4, seed=seed)
        paths = draw_within(
            theta.probabilities(),
            Band(limits, theta.offered),
            len(found),
            generator=torch.Generator().manual_seed(seed),
        )
        evolved.append(found[0].cross_entropy)
        drawn.append(min(map(stub.of, paths)))
    assert sum(evolved) < sum(drawn)


def test_the_same_seed_gives_the_same_networks() -> None:
    def found(seed: int) -> list[Path]:
        stub = Stub()
        theta = ArchitectureDistribution(SMALL)
        evolve(stub, limits_of(1, 9.0), theta=theta, population=10, generations=3, seed=seed)
        return stub.judged

    torch.manual_seed(3)
    first = found(0)
    torch.manual_seed(4)  # torch's global generator plays no part
    assert found(0) == first
    assert found(1) != first


def test_a_small_space_runs_out() -> None:
    limits, stub = limits_of(1, 7.5), Stub()
    evolve(stub, limits, theta=ArchitectureDistribution(SMALL), population=20, generations=9)
    assert sorted(stub.judged) == sorted(in_band(limits))


def test_theta_decides_where_evolution_begins() -> None:
    limits, stub = limits_of(1, 9.0), Stub()
    theta = ArchitectureDistribution(SMALL)
    likely = max(in_band(limits), key=limits[0].of)
    with torch.no_grad():
        for layer, block in enumerate(likely):
            theta.logits[layer, block] = 8.0
    evolve(stub, limits, theta=theta, population=5, generations=0)
    assert stub.judged[0] == likely
    shared = [sum(a == b for a, b in zip(path, likely, strict=True)) for path in stub.judged]
    assert sum(shared) / len(shared) >= 3


def test_blocks_that_theta_does_not_offer_are_never_chosen() -> None:
    offered = torch.ones(4, 6, dtype=torch.bool)
    offered[1, 2:] = offered[3, :3] = False
    stub = Stub()
    theta = ArchitectureDistribution(SMALL, offered)
    evolve(stub, limits_of(1, 9.0), theta=theta, population=20, generations=4)
    assert all(offered[layer, block] for p in stub.judged for layer, block in enumerate(p))


def test_with_the_shared_weights_of_a_supernet() -> None:
    torch.manual_seed(0)
    supernet = Supernet(SPACE, classes=10)
    for parameter in supernet.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    cost = torch.tensor([[1.0, 3.0, 0.0]] * 3, dtype=torch.double).masked_fill(
        ~SPACE.offered, torch.nan
    )
    limits = (Limit("latency", "ms", cost, 6.0),)
    judge = SharedWeightsJudge(supernet, small_digits(), calibration_images=64)
    found = evolve(judge, limits, theta=ArchitectureDistribution(SPACE), population=6)
    band = Band(limits, SPACE.offered)
    every = itertools.product(*(x.nonzero().flatten().tolist() for x in SPACE.offered))
    allowed = [Architecture.from_path(SPACE, list(p)) for p in every if band.holds(p)]
    assert {r.architecture for r in found} == set(allowed)
    assert [r.rank for r in found] == [r.rank for r in judge(allowed)]


@pytest.mark.parametrize("budgets", BUDGETS)
def test_draws_are_different_and_within_the_budgets(budgets: tuple[float, ...]) -> None:
    limits = limits_of(2, *budgets)
    band = Band(limits, SMALL.offered)
    allowed = in_band(limits)
    assert [p for p in PATHS if band.holds(p)] == allowed
    uniform = SMALL.offered.double()
    generator = torch.Generator().manual_seed(0)
    known = allowed[: len(allowed) // 2]
    drawn = draw_within(uniform, band, 6, generator=generator, known=known)
    assert len(set(drawn)) == len(drawn) == 6
    assert set(drawn) <= set(allowed) - set(known)
    assert draw_within(uniform, band, 0, generator=generator) == []


def test_draws_from_outside_are_mended() -> None:
    limits = limits_of(2, 7.5)
    band = Band(limits, SMALL.offered)
    dear = limits[0].cost.argmax(dim=1)
    probabilities = torch.full((4, 6), 1e-9).scatter(1, dear[:, None], 1.0)
    drawn = draw_within(probabilities, band, 5, generator=torch.Generator().manual_seed(0))
    assert len(drawn) == 5
    assert set(drawn) <= set(in_band(limits))


def test_a_theta_that_is_sure_of_itself_still_gives_as_many_as_are_wanted() -> None:
    limits = limits_of(1, 9.0)
    band, allowed = Band(limits, SMALL.offered), in_band(limits)
    sure = torch.zeros(4, 6).scatter(1, torch.tensor(allowed[0])[:, None], 1.0)
    drawn = draw_within(sure, band, 40, generator=torch.Generator().manual_seed(0))
    assert drawn[0] == allowed[0]
    assert len(set(drawn)) == 40
    assert set(drawn) <= set(allowed)


def test_the_highest_cost_within_budgets_is_that_of_brute_force() -> None:
    for seed in range(3):
        latency, energy, peak = limits_of(seed, 9.0, 7.0, 4.0)
        others = (energy, peak)
        within = [p for p in PATHS if all(x.of(p) <= x.budget for x in (latency, *others))]
        highest = max(map(latency.of, within))
        assert highest_within(latency, others) == pytest.approx(highest)
        some = highest_within(latency, others, enough=0.8 * highest)
        assert 0.8 * highest - 1e-6 <= some <= highest + 1e-6
        assert highest_within(latency, others, enough=1.01 * highest) == pytest.approx(highest)
    with pytest.raises(InputError, match="No network fits 1 ms"):
        highest_within(replace(latency, budget=1.0), ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"population": 0}, "population is 0; expected a whole number of at least 1"),
        ({"generations": -1}, "generations is -1; expected a whole number of at least 0"),
        ({"parents": 0}, "parents is 0; expected"),
        ({"mutation": 1.5}, "mutation is 1.5; expected a probability"),
        ({"floor": 2.0}, "floor is 2.0; expected from 0"),
        ({"limits": limits_of(1, 2.0)}, "No network fits 2 ms"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, words: str) -> None:
    given = {"limits": limits_of(1, 9.0), **options}
    with pytest.raises(InputError, match=words):
        evolve(Stub(), given.pop("limits"), theta=ArchitectureDistribution(SMALL), **given)
