"""Latency-aware pruning: the channels that go are those that make the device faster."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from fbnas.compression.channel_steps import (
    LayerCosts,
    Measure,
    Remembered,
    placed_layers,
    shapes_to_time,
    timed,
    useful,
)
from fbnas.compression.method import Applied, Method, Tools
from fbnas.compression.pruning import (
    ChannelPruning,
    ChannelSet,
    Ranked,
    become_,
    rank,
    widths_of,
    without,
)
from fbnas.errors import InputError
from fbnas.files import write_json
from fbnas.latency.table import LatencyTable

logger = logging.getLogger(__name__)

Widths = dict[str, int]  # channels by set


class LatencyNotReachedError(InputError):
    """However much may be pruned, the device does not get as fast as was asked for."""


@dataclass(frozen=True)
class LatencyPruning(Method):
    """Prune to a latency, the channels chosen by what they cost on the device; then fine-tune.

    The layers are timed at several widths, and of each set's widths only those are chosen from at
    which the device gets faster. From the full widths on, that step is taken again and again which
    loses the least importance per millisecond saved (as NetAdapt, Yang et al. 2018, arXiv
    1804.03230, and HALP, Shen et al. 2022, arXiv 2110.10811, do with tables), and what the budget
    then has left is given back. The pruned network is measured, and the plan corrected while it
    missed.

    Args:
        latency: what to reach, as a fraction of the network's own latency, 0 < latency < 1.
        importance: as of `ChannelPruning`; taylor and hessian compare sets in units of loss.
        granularity: widths that are timed are multiples of it.
        widths: at most so many of a set are timed, spread evenly.
        max_ratio: no set loses more than this fraction of its channels.
        tolerance: a measured latency so near to the one asked for, as a fraction of the network's
            own, is met.
        corrections: how often a plan that missed it is corrected.
        strict: refuse a latency that cannot be reached; False: prune to the least that was, if it
            is less by more than the tolerance.
        table: of single layers, as an earlier run left it in channel_steps.csv; None to measure.
        seed, images: as of `ChannelPruning`.
    """

    NAME: ClassVar[str] = "latency_pruning"
    SECTION: ClassVar[str] = "latency_pruning"
    MEASURES: ClassVar[bool] = True

    latency: float = 0.7
    importance: str = "taylor"
    granularity: int = 8
    widths: int = 12
    max_ratio: float = 0.75
    tolerance: float = 0.02
    corrections: int = 3
    strict: bool = True
    table: str | None = None
    seed: int = 0
    images: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.latency < 1:
            raise InputError(
                f"latency is {self.latency}; expected a fraction of the network's own, "
                "0 < latency < 1."
            )
        if not 0 <= self.tolerance < 1:
            raise InputError(
                f"tolerance is {self.tolerance}; expected a fraction, 0 <= tolerance < 1."
            )
        for name, least in (("granularity", 1), ("widths", 2), ("corrections", 0)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name} is {value}; expected a whole number of at least {least}.")
        self.pruning()

    def pruning(self) -> ChannelPruning:
        """Return what ranks the channels."""
        return ChannelPruning(
            importance=self.importance,
            round_to=1,
            max_ratio=self.max_ratio,
            seed=self.seed,
            images=self.images,
        )

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Measure, plan, prune, measure, correct; then fine-tune.

        `tools.folder` receives channel_steps.csv, the table of single layers; measured.json, by
        which a resumed command decides as before; and latency_pruning.json, the report.

        Raises:
            InputError: nothing measures and there is no table, or there are no images for taylor or
                hessian.
            LatencyNotReachedError: as far as it may be pruned.
        """
        ranked = rank(model, self.pruning(), tools)[1]
        full = {found.name: found.channels for found in ranked}
        widths = {found.name: self._widths(found) for found in ranked}
        layers = placed_layers(model, ranked, tools.input_shape)
        measure = _remembered(tools)
        if self.table is not None:
            table = LatencyTable.load(self.table)
            own_ms = measure([model])[0] if measure else None
        elif measure is not None:
            table, own_ms = timed(shapes_to_time(layers, widths, full), model, measure)
            if tools.folder is not None:
                table.save(tools.folder / "channel_steps.csv")
        else:
            raise InputError(
                "latency_pruning has nothing to measure with; expected measure=, or a table of "
                "single layers, table=channel_steps.csv."
            )
        costs = LayerCosts(table, layers, widths, full)
        planner = Planner.of(ranked, widths, costs, own_ms=own_ms)
        tried = self._tries(model, planner, tools, measure)
        best = min(tried, key=lambda each: _merit(each, self.latency + self.tolerance))
        missed = best.fraction > self.latency + self.tolerance
        if missed and (self.strict or best.fraction > 1 - self.tolerance):
            raise LatencyNotReachedError(
                f"latency is {self.latency:g} of {planner.own_ms:.4g} ms; {best.fraction:.3g} is "
                f"the least that was reached with max_ratio={self.max_ratio:g}: ask for more, or "
                "raise max_ratio."
            )
        become_(model, without(model, planner.sets(best.widths), tools))
        outcome = LatencyOutcome(self.latency, planner.own_ms, best.number, tuple(tried))
        changes = tuple(planner.step(name, best.widths) for name in planner.full)
        _report(outcome, changes, tools.folder)
        return Applied((outcome, *changes), tools.tune(model))

    def _widths(self, found: Ranked) -> tuple[int, ...]:
        """Return the widths of a set to be timed, widest first; its own is the first."""
        least = (1 - self.max_ratio) * found.channels
        able = [w for w in widths_of(found, self.granularity) if least <= w < found.channels][::-1]
        every = max(-(-len(able) // (self.widths - 1)), 1)
        return (found.channels, *able[every - 1 :: every])

    def _tries(
        self, model: nn.Module, planner: "Planner", tools: Tools, measure: Measure | None
    ) -> list["Try"]:
        """Plan, prune a copy, measure it and correct the plan by what was found."""
        tried: list[Try] = []
        scale = 1.0  # milliseconds really saved by one that the layers alone say is saved
        while len(tried) <= self.corrections:
            plan = planner.within(self.latency * planner.own_ms, scale)
            if plan in [each.widths for each in tried]:
                break
            predicted, measured = planner.predicted(plan, scale), None
            if measure is not None:
                found = measure([model, without(model, planner.sets(plan), tools)])
                measured = found[1] / found[0] * planner.own_ms
            fraction = (predicted if measured is None else measured) / planner.own_ms
            tried.append(
                Try(len(tried) + 1, plan, predicted, measured, fraction, planner.lost(plan))
            )
            logger.info("%s", tried[-1])
            if measured is None or abs(fraction - self.latency) <= self.tolerance:
                break
            saved = planner.own_ms - measured, planner.own_ms - planner.predicted(plan, 1.0)
            scale = saved[0] / saved[1] if min(saved) > 0 else scale / 4
        return tried


@dataclass(frozen=True)
class Try:
    """A plan that was tried. fraction: of the network's own latency, measured where it was."""

    number: int
    widths: Widths
    predicted_ms: float
    measured_ms: float | None
    fraction: float
    lost: float  # importance

    def __str__(self) -> str:
        measured = "" if self.measured_ms is None else f", measured {self.measured_ms:.4g} ms"
        return (
            f"plan {self.number}: predicted {self.predicted_ms:.4g} ms{measured}, "
            f"{self.fraction:.2f} of the network's own"
        )


@dataclass(frozen=True)
class LatencyOutcome:
    """The whole network: what was asked, what it took, and all plans that were tried.

    asked: a fraction of own_ms. chosen: the number of the try that was kept.
    """

    asked: float
    own_ms: float
    chosen: int
    tries: tuple[Try, ...]

    @property
    def latency_ms(self) -> float:
        """Of the pruned network: measured, or by the table where nothing measures."""
        return self.tries[self.chosen - 1].fraction * self.own_ms


@dataclass(frozen=True)
class ChannelStep:
    """A set of coupled layers, what was removed of it, and why.

    timed_ms: its layers' milliseconds by width, all others full. useful: the widths at which they
    get faster, widest first. lost: the fraction of the set's importance that went.
    """

    layer: str
    before: int
    removed: tuple[int, ...]
    timed_ms: Mapping[int, float]
    useful: tuple[int, ...]
    lost: float
    reason: str

    @property
    def after(self) -> int:
        """Channels that stay."""
        return self.before - len(self.removed)


class Planner:
    """Chooses a width per set."""

    def __init__(self, ranked: Sequence[Ranked], costs: LayerCosts, own_ms: float | None) -> None:
        self.ranked = {found.name: found for found in ranked}
        self.full: Widths = {found.name: found.channels for found in ranked}
        self.costs = costs
        self.own_ms = costs.network_ms(self.full) if own_ms is None else own_ms
        self.timed_ms: dict[str, dict[int, float]] = {}
        self.useful: dict[str, tuple[int, ...]] = {}
        self._gone: dict[tuple[str, int], float] = {}

    @classmethod
    def of(
        cls,
        ranked: Sequence[Ranked],
        widths: Mapping[str, Sequence[int]],
        costs: LayerCosts,
        *,
        own_ms: float | None,
    ) -> "Planner":
        """Keep of each set's widths the useful ones.

        Args:
            own_ms: of the whole network, measured; None takes the sum of its layers.
        """
        planner = cls(ranked, costs, own_ms)
        for name, offered in widths.items():
            curve = {width: costs.set_ms(name, planner.full | {name: width}) for width in offered}
            planner.timed_ms[name] = curve
            planner.useful[name] = useful(curve, costs.noise_ms(name))
            ranks = planner.ranked[name]
            order = ranks.importance.sort().values.double() * ranks.unit_size
            for width in offered:
                units = (ranks.channels - width) // ranks.unit_size
                planner._gone[name, width] = float(order[:units].sum())
        return planner

    def predicted(self, widths: Widths, scale: float) -> float:
        """Return the network's milliseconds: its own less `scale` times what its layers save."""
        saved = self.costs.network_ms(self.full) - self.costs.network_ms(widths)
        return self.own_ms - scale * saved

    def lost(self, widths: Widths) -> float:
        """Return the importance of all channels that are gone."""
        return sum(self._gone[name, width] for name, width in widths.items())

    def within(self, budget_ms: float, scale: float) -> Widths:
        """Choose widths that meet a budget and lose little, or the narrowest where none do.

        Greedy: the step with the least importance lost per millisecond saved, where no more than
        what is still missing counts as saved; then channels are given back while the budget allows.
        """
        widths = dict(self.full)
        ms = self.predicted(widths, scale)
        while ms > budget_ms:
            excess = ms - budget_ms
            steps = [
                ((self._gone[name, width] - self._gone[name, widths[name]]) / min(saved, excess),
                 -saved, name, width)
                for name, width, saved in self._steps(widths, scale)
                if width < widths[name] and saved > 0
            ]  # fmt: skip
            if not steps:
                return widths
            _, saved, name, width = min(steps)
            widths[name], ms = width, ms + saved
        while True:
            wider = [
                (self._gone[name, widths[name]] - self._gone[name, width], saved, name, width)
                for name, width, saved in self._steps(widths, scale)
                if width > widths[name] and ms - saved <= budget_ms
            ]
            if not wider:
                return widths
            _, saved, name, width = max(wider)
            widths[name], ms = width, ms - saved

    def _steps(self, widths: Widths, scale: float) -> list[tuple[str, int, float]]:
        """Every other useful width of every set, and the ms that taking it saves."""
        found = []
        for name, offered in self.useful.items():
            now = self.costs.set_ms(name, widths)
            found += [
                (name, width, scale * (now - self.costs.set_ms(name, widths | {name: width})))
                for width in offered
                if width != widths[name]
            ]
        return found

    def sets(self, widths: Widths) -> list[ChannelSet]:
        """Return which channels go: the least important of each set."""
        return [
            ChannelSet(name, found.channels, found.least(found.channels - widths[name]))
            for name, found in self.ranked.items()
        ]

    def step(self, name: str, widths: Widths) -> ChannelStep:
        """Say of a set what was chosen and why."""
        found, width, curve = self.ranked[name], widths[name], self.timed_ms[name]
        passed = [w for w in curve if w not in self.useful[name]]
        removed = found.least(found.channels - width)
        lost = self._gone[name, width] / max(float(found.importance.sum() * found.unit_size), 1e-30)
        if len(curve) == 1:
            reason = "left: no narrower width is a multiple of the granularity"
        elif len(self.useful[name]) == 1:
            reason = "left: no narrower width is faster"
        elif width == found.channels:
            reason = "left: other sets lose less for a millisecond"
        else:
            reason = (
                f"{curve[found.channels] - curve[width]:.3g} of its layers' "
                f"{curve[found.channels]:.3g} ms for {100 * lost:.2g} % of its importance"
            )
        if passed:
            reason += "; no faster than wider ones: " + ", ".join(map(str, passed))
        return ChannelStep(name, found.channels, removed, curve, self.useful[name], lost, reason)


def _merit(each: Try, most: float) -> tuple[bool, float]:
    """Of tries that met the latency the one that lost least, of others the fastest."""
    missed = each.fraction > most
    return missed, each.fraction if missed else each.lost


def _remembered(tools: Tools) -> Measure | None:
    if tools.measure is None:
        return None
    return Remembered(tools.measure, tools.folder and tools.folder / "measured.json")


def _report(outcome: LatencyOutcome, changes: Sequence[ChannelStep], folder: Path | None) -> None:
    for change in changes:
        logger.info("%s: %d -> %d channels, %s", change.layer, change.before, change.after,
                    change.reason)  # fmt: skip
    if folder is not None:
        sets = [{**asdict(change), "after": change.after} for change in changes]
        told = {**asdict(outcome), "latency_ms": outcome.latency_ms, "sets": sets}
        write_json(folder / "latency_pruning.json", told)
