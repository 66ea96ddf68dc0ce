"""How cross-entropy and latency combine in theta's loss. Weights train on cross-entropy alone.

Latency is E[LAT] in milliseconds, from softmax(theta), differentiable in theta. An objective is a
frozen dataclass; what changes during the search is one number, the multiplier lambda, which the
loop keeps. Where there is no budget of latency, the first other sum (energy, then parameters)
takes its place; every further one adds `DualAscent.further_loss`.

A new one is a dataclass here under `@_register(NAME)`, its options with their defaults in
configs/objective/NAME.yaml, and its name in the comment of target.yaml there.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from fbnas.errors import InputError, check_known, unknown


class Objective(Protocol):
    """What the search minimises over theta."""

    def check(self, fastest_ms: float | None) -> None:
        """Refuse a space whose latencies the form is undefined for; None: no budget of latency.

        Raises:
            InputError: with the reason and the way out.
        """

    def loss(
        self, cross_entropy: Tensor, latency_ms: Tensor, *, budget_ms: float, multiplier: float
    ) -> Tensor:
        """Combine both into the scalar that theta descends."""

    def next_multiplier(self, multiplier: float, latency_ms: float, budget_ms: float) -> float:
        """Return lambda after a theta step; it begins at 0."""


OBJECTIVES: dict[str, Callable[..., Objective]] = {}


def _register(name: str) -> Callable[[type], type]:
    def add(kind: type) -> type:
        OBJECTIVES[name] = kind
        return kind

    return add


def build_objective(name: str = "target", **options: Any) -> Objective:
    """Build an objective by name.

    Raises:
        InputError: unknown objective or option.
    """
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    known = [f.name for f in fields(OBJECTIVES[name])]  # type: ignore[arg-type]
    check_known(f"option of objective {name}:", options, known)
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise InputError(f"objective.{option} is {value!r}; expected a number of at least 0.")
    return OBJECTIVES[name](**options)


class _Anywhere:
    """Defined for every positive latency, with a constant multiplier."""

    def check(self, fastest_ms: float | None) -> None:
        assert fastest_ms is None or fastest_ms > 0

    def next_multiplier(self, multiplier: float, latency_ms: float, budget_ms: float) -> float:
        return multiplier


@_register("target")
@dataclass(frozen=True)
class DualAscent(_Anywhere):
    """CE + lambda * r + damping / 2 * r^2 with r = E[LAT] / T - 1.

    After each theta step lambda <- max(0, lambda + rate * r): it settles where E[LAT] = T without
    tuning (Lagrangian dual ascent). The quadratic term damps its oscillation and, being two-sided,
    keeps theta from wasting the budget on skips.
    """

    rate: float = 0.1
    damping: float = 4.0

    def loss(
        self, cross_entropy: Tensor, latency_ms: Tensor, *, budget_ms: float, multiplier: float
    ) -> Tensor:
        excess = latency_ms / budget_ms - 1
        return cross_entropy + multiplier * excess + self.damping / 2 * excess**2

    def next_multiplier(self, multiplier: float, latency_ms: float, budget_ms: float) -> float:
        return max(0.0, multiplier + self.rate * (latency_ms / budget_ms - 1))

    def further_loss(self, cost: Tensor, *, budget: float, multiplier: float) -> Tensor:
        """Return lambda * r + damping / 2 * max(0, r)^2 for a budget beside the first.

        One-sided, since of several budgets one binds: the others shall not be used up.
        """
        excess = cost / budget - 1
        return multiplier * excess + self.damping / 2 * excess.clamp(min=0) ** 2


@_register("hinge")
@dataclass(frozen=True)
class Hinge(_Anywhere):
    """CE + weight * max(0, E[LAT] / T - 1)."""

    weight: float = 5.0

    def loss(
        self, cross_entropy: Tensor, latency_ms: Tensor, *, budget_ms: float, multiplier: float
    ) -> Tensor:
        return cross_entropy + self.weight * (latency_ms / budget_ms - 1).clamp(min=0)


@_register("absolute")
@dataclass(frozen=True)
class Absolute(_Anywhere):
    """CE + weight * |E[LAT] / T - 1|  (Bender et al. 2020, TuNAS, arXiv 2008.06120, equation 3)."""

    weight: float = 5.0

    def loss(
        self, cross_entropy: Tensor, latency_ms: Tensor, *, budget_ms: float, multiplier: float
    ) -> Tensor:
        return cross_entropy + self.weight * (latency_ms / budget_ms - 1).abs()


class _Logarithmic:
    """log(LAT)^beta with LAT in ms: undefined where log(LAT) is not positive."""

    def check(self, fastest_ms: float | None) -> None:
        if fastest_ms is None:
            raise InputError(
                "The fbnet objectives take log(LAT)^beta; expected a budget of latency: give "
                "target_ms as well, or use objective=target."
            )
        if fastest_ms <= 1.0:
            raise InputError(
                "The fbnet objectives take log(LAT)^beta, which is undefined at 1 ms and below; "
                f"the fastest network of this space takes {fastest_ms:.3g} ms. Use "
                "objective=target."
            )

    def next_multiplier(self, multiplier: float, latency_ms: float, budget_ms: float) -> float:
        return multiplier


@_register("fbnet")
@dataclass(frozen=True)
class Multiplicative(_Logarithmic):
    """CE * alpha * log(LAT)^beta  (Wu et al. 2019, equation 2); the budget plays no part."""

    alpha: float = 0.2
    beta: float = 0.6

    def loss(
        self, cross_entropy: Tensor, latency_ms: Tensor, *, budget_ms: float, multiplier: float
    ) -> Tensor:
        return cross_entropy * self.alpha * latency_ms.log() ** self.beta


@_register("fbnet_additive")
@dataclass(frozen=True)
class Additive(_Logarithmic):
    """CE + alpha * log(LAT)^beta, the form of the brief; the budget plays no part."""

    alpha: float = 0.2
    beta: float = 0.6

    def loss(
        self, cross_entropy: Tensor, latency_ms: Tensor, *, budget_ms: float, multiplier: float
    ) -> Tensor:
        return cross_entropy + self.alpha * latency_ms.log() ** self.beta
