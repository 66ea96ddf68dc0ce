"""Searched networks against the others of their latency: gains by seed, and what they say.

Columns of `result`, a row per trained network and seed: seed, kind, name, fraction, budget_ms,
measured_ms, accuracy (of the int8 file). Gains are computed seed by seed, so that their spread is
that of the whole procedure: search, drawing and training.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

SEARCHED, RANKED = "searched", "ranked"  # the most probable; the first by the shared weights
RANDOM, UNIFORM, FAMILY = "random", "uniform", "family"
AS_FAST = 1.03  # a uniform network may take so much of the searched one's latency or the budget


@dataclass(frozen=True)
class Compared:
    """The searched networks of one budget, and the rest at their latency; accuracies by seed.

    `random_off`: what random ones take more than the searched one of their seed, a fraction, the
    least and the most. `uniform`: of the best one that is as fast, by its mean; empty where none
    is. `frontier`: of the best family at the same latency, nan where none is that fast.
    """

    fraction: float
    budget_ms: float
    measured_ms: float
    own: pd.Series
    random: pd.Series
    random_off: tuple[float, float]
    uniform_name: str
    uniform: pd.Series
    frontier: pd.Series

    def gains(self) -> dict[str, pd.Series]:
        """Searched less each other, by seed, as fractions."""
        others = {
            "random networks": self.random,
            "the best uniform network": self.uniform,
            "the families": self.frontier,
        }
        return {name: (self.own - other).dropna() for name, other in others.items()}


def compared(result: pd.DataFrame, kind: str = SEARCHED) -> list[Compared]:
    """A comparison per budget, smallest first, of the searched networks of a kind."""
    found = []
    families = result[result.kind == FAMILY]
    for fraction, part in result[result.fraction.notna()].groupby("fraction"):
        own = part[part.kind == kind].set_index("seed")
        if own.empty:
            continue
        random = part[part.kind == RANDOM]
        off = random.measured_ms / random.seed.map(own.measured_ms) - 1
        most_ms = AS_FAST * max(own.measured_ms.mean(), own.budget_ms.max())
        name, uniform = best_uniform(result, most_ms)
        frontier = pd.Series(
            {
                seed: frontier_at(families[families.seed == seed], ms)
                for seed, ms in own.measured_ms.items()
            }
        )
        found.append(
            Compared(
                fraction=float(fraction),
                budget_ms=float(own.budget_ms.iloc[0]),
                measured_ms=float(own.measured_ms.mean()),
                own=own.accuracy,
                random=random.groupby("seed").accuracy.mean(),
                random_off=(float(off.min()), float(off.max())),
                uniform_name=name,
                uniform=uniform,
                frontier=frontier,
            )
        )
    return found


def without_incomplete_families(networks: pd.DataFrame, result: pd.DataFrame) -> pd.DataFrame:
    """Leave out the families of seeds that lack some: the best of a part of them is too low."""
    asked, found = (rows[rows.kind == FAMILY].groupby("seed").size() for rows in (networks, result))
    complete = [seed for seed, n in asked.items() if found.get(seed, 0) == n]
    return result[(result.kind != FAMILY) | result.seed.isin(complete)]


def absent(networks: pd.DataFrame, result: pd.DataFrame) -> list[str]:
    """Say which networks are not on the page, by kind and seed."""
    known = set(zip(result.seed, result.name, strict=True))
    lost = networks[[(r.seed, r.name) not in known for r in networks.itertuples(index=False)]]
    if lost.empty:
        return []
    kinds = "; ".join(
        f"{len(part)} of kind {kind} (seeds {', '.join(map(str, sorted(set(part.seed))))})"
        for kind, part in lost.groupby("kind")
    )
    return ["", f"**Not trained or not measured yet: {kinds}.**"]


def best_uniform(result: pd.DataFrame, most_ms: float) -> tuple[str, pd.Series]:
    """The name and accuracies by seed of the best uniform network within a latency, by its mean."""
    means = result[result.kind == UNIFORM].groupby("name")[["measured_ms", "accuracy"]].mean()
    within = means[means.measured_ms <= most_ms]
    if within.empty:
        return "none", pd.Series(dtype=float)
    name = str(within.accuracy.idxmax())
    return name, result[result.name == name].set_index("seed").accuracy


def frontier_at(families: pd.DataFrame, latency_ms: float) -> float:
    """The best accuracy that the families of one seed have at a latency; nan where none is as fast.

    Between two widths accuracy is interpolated along latency; a slower network that is worse than a
    faster one counts as that, and beyond the widest the best holds.
    """
    found = [np.nan]
    for _, part in families.groupby(families.name.str.rsplit(" ", n=1).str[0]):
        widths = part.sort_values("measured_ms")
        best = widths.accuracy.cummax()
        found.append(np.interp(latency_ms, widths.measured_ms, best, left=np.nan))
    return float(pd.Series(found).max())


def verdict(gains: pd.Series) -> str:
    """Whether a mean gain over seeds is more than its own spread, and to which side."""
    if gains.empty:
        return "nothing to compare"
    if len(gains) == 1:
        return "one seed, no spread to judge by"
    if abs(gains.mean()) <= gains.std():
        return "not told apart"
    return "better" if gains.mean() > 0 else "worse"


def points(gains: pd.Series) -> str:
    """`mean ± deviation` in points of accuracy."""
    if gains.empty:
        return "none as fast"
    deviation = f" ± {100 * gains.std():.2f}" if len(gains) > 1 else ""
    return f"{100 * gains.mean():+.2f}{deviation}"


def verdicts(everything: list[Compared]) -> list[str]:
    """In words, against each of the others: where search won, where it lost, by how much."""
    lines = []
    for other in everything[0].gains():
        gains = [c.gains()[other] for c in everything]
        where: dict[str, list[str]] = {}
        for c, own in zip(everything, gains, strict=True):
            where.setdefault(verdict(own), []).append(f"{c.measured_ms:.3f} ms")
        told = "; ".join(
            f"{word} at {len(at)} of {len(everything)} budgets ({', '.join(at)})"
            for word, at in where.items()
        )
        compared_with = [own.mean() for own in gains if len(own)]
        mean = (
            f" Mean over budgets: {100 * np.mean(compared_with):+.2f} points."
            if compared_with
            else ""
        )
        lost = " **There search lost.**" if "worse" in where else ""
        lines.append(f"- Against {other}: {told}.{mean}{lost}")
    return lines
