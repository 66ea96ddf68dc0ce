"""A latency table from the totals of whole networks alone, for devices that give nothing else.

    total_n = base + sum_e count_ne w_e + noise_n,   w = sum_k Phi_k u_k,   u_k ~ N(0, s_k)

Entries are tied by block and shape (a network that uses one twice counts it twice); Phi_k are
the groups of effects of effects.py. The strengths s_k and the noise are found by their marginal
likelihood under a log-normal belief that the prior explains most and every other group little:
a Gaussian process over networks, or, in the words of statistics, a linear mixed model (Rasmussen
and Williams 2006, chapters 2 and 5). Noise is Student-t by reweighting, so that a few totals that
something disturbed do not bend the table (Lange et al. 1989).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from fbnas.errors import InputError
from fbnas.latency.effects import FIXED, Entries, Prior, effects
from fbnas.latency.profiling import plan
from fbnas.latency.table import LatencyTable
from fbnas.latency.table_file import Entry, Shape

LEAST_NETWORKS = 8
# Beliefs about log strengths (mean, spread), in units of the totals' variance: the prior explains
# about all of it, another group 1/150, each within a factor of 5 or so; noise about a third.
PRIOR_BELIEF, GROUP_BELIEF, NOISE_BELIEF = (0.0, 1.0), (-5.0, 1.5), (-1.0, 1.5)
DESIGN_BELIEF = -3.0  # of a group, where networks are to be chosen that would show it
BASE_STRENGTH = 10.0  # of the totals' variance: the base is as good as free
FREEDOM = 4.0  # of Student's t
REWEIGHTINGS = 3
LOG_BOUNDS = (-14.0, 4.0)
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """What whole networks say about entries: means, covariance, noise, and how well they predict.

    entry_ms: (entries,), 0 for identities; base_ms: what every network pays; covariance:
    (entries + 1, entries + 1) in ms^2, the base last; noise_ms: standard deviation of one total;
    left_out_ms: (networks,), each network predicted from all others; samples: (entries,), how many
    networks use the entry.
    """

    entries: Entries
    entry_ms: np.ndarray
    base_ms: float
    covariance: np.ndarray
    noise_ms: float
    left_out_ms: np.ndarray
    samples: np.ndarray

    def predict(self, paths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation in ms of the totals of `paths` (networks, layers).

        The deviation is that of the network's true latency; noise_ms comes on top in a measurement.
        """
        counts = self.entries.counts(paths)
        rows = np.hstack([counts, np.ones((len(counts), 1))])
        variance = np.einsum("ij,jk,ik->i", rows, self.covariance, rows)
        return self.base_ms + counts @ self.entry_ms, np.sqrt(np.maximum(variance, 0.0))

    def interval_ms(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of each entry's 95 % interval in ms, not below 0: (entries,) each."""
        spread = NORMAL_95 * np.sqrt(np.maximum(np.diag(self.covariance)[:-1], 0.0))
        return np.maximum(self.entry_ms - spread, 0.0), self.entry_ms + spread


def estimate(
    entries: Entries, paths: np.ndarray, latency_ms: np.ndarray, *, prior: Prior = "macs"
) -> Estimate:
    """Estimate every entry from the totals of whole networks.

    Args:
        paths: (networks, layers), a block index per layer.
        latency_ms: (networks,), the measured totals.
        prior: "macs", "none" or a LatencyTable of another device (effects.py).

    Raises:
        InputError: fewer than 8 networks, or totals that are all the same.
    """
    if len(paths) < LEAST_NETWORKS:
        raise InputError(
            f"{len(paths)} measured networks; expected at least {LEAST_NETWORKS} to fit a table: "
            "measure more (suggest=N names those worth it)"
        )
    centre_ms, scale_ms = _centre_and_scale(latency_ms)
    groups = effects(entries, prior)
    size = len(entries.shapes)
    padded = [np.vstack([group, np.zeros((1, group.shape[1]))]) for group in groups]
    base = np.zeros((size + 1, 1))
    base[-1] = np.sqrt(BASE_STRENGTH)
    counts = entries.counts(paths)
    rows = np.hstack([counts, np.ones((len(paths), 1))])
    model = _Model(rows, (latency_ms - centre_ms) / scale_ms, [*padded, base])
    solved = model.solve()
    left_out_ms = solved.left_out * scale_ms + centre_ms
    noise_ms = float(np.sqrt(solved.noise)) * scale_ms
    # Reweighting hides what disturbs totals; intervals must hold for totals as they come.
    seen_ms = float(np.quantile(np.abs(left_out_ms - latency_ms), 0.95)) / NORMAL_95
    wider = max(seen_ms / noise_ms, 1.0)
    anchor = _anchor(entries)
    weights = anchor @ (solved.weights * scale_ms)
    return Estimate(
        entries,
        weights[:-1],
        float(weights[-1] + centre_ms),
        anchor @ solved.covariance @ anchor.T * (scale_ms * wider) ** 2,
        noise_ms * wider,
        left_out_ms,
        (counts > 0).sum(axis=0),
    )


def believed(entries: Entries, prior: Prior = "macs") -> tuple[np.ndarray, float]:
    """Return what is believed before anything is measured, in units of the totals' variance.

    Returns:
        The covariance of entries and base, (entries + 1, entries + 1), and the noise of a total.
    """
    groups = effects(entries, prior)
    beliefs = [PRIOR_BELIEF[0], *[DESIGN_BELIEF] * (len(groups) - 1)]
    size = len(entries.shapes)
    covariance = np.zeros((size + 1, size + 1))
    for belief, group in zip(beliefs, groups, strict=True):
        covariance[:-1, :-1] += np.exp(belief) * group @ group.T
    covariance[-1, -1] = BASE_STRENGTH
    return covariance, float(np.exp(NOISE_BELIEF[0]))


def _anchor(entries: Entries) -> np.ndarray:
    """Return the map (entries + 1, entries + 1) that leaves totals alone and makes identities free.

    What all entries of a shape have in common cannot be told from the base: every network has it.
    """
    anchor = np.eye(len(entries.shapes) + 1)
    for members, layers in entries.places():
        free = [i for i in members if entries.identities[i]]
        if free:
            anchor[members, free[0]] -= 1
            anchor[-1, free[0]] += layers
    return anchor


def _centre_and_scale(latency_ms: np.ndarray) -> tuple[float, float]:
    """Median and robust standard deviation, in ms."""
    quartiles = np.quantile(latency_ms, [0.25, 0.75])
    scale = float(quartiles[1] - quartiles[0]) / 1.349 or float(latency_ms.std())
    if scale <= 0:
        raise InputError(
            f"all {len(latency_ms)} measured networks take {latency_ms[0]:g} ms; expected networks "
            "that differ: measure others (suggest=N), or with a finer clock"
        )
    return float(np.median(latency_ms)), scale


@dataclass(frozen=True)
class _Solved:
    weights: np.ndarray
    covariance: np.ndarray
    noise: float
    left_out: np.ndarray


class _Model:
    """The linear mixed model in the space of weights: its cost does not grow with the networks.

    y = rows @ w + noise, w ~ N(0, G), G = sum_k s_k Phi_k Phi_k^T, noise_n ~ N(0, noise / trust_n).
    The last group is the base, whose strength is fixed.
    """

    def __init__(self, rows: np.ndarray, y: np.ndarray, groups: Sequence[np.ndarray]) -> None:
        self.rows, self.y, self.groups = rows, y, groups
        self.outer = [group @ group.T for group in groups]
        self.trust = np.ones(len(y))
        beliefs = [PRIOR_BELIEF, *[GROUP_BELIEF] * (len(groups) - 2), NOISE_BELIEF]
        self.belief_mean, self.belief_spread = np.array(beliefs).T

    def solve(self) -> _Solved:
        """Alternate between strengths and trust in each total, then return the posterior."""
        logs = self.belief_mean.copy()
        for round_ in range(REWEIGHTINGS + 1):
            self._weigh()
            found = minimize(
                self._loss, logs, jac=True, method="L-BFGS-B", bounds=[LOG_BOUNDS] * len(logs)
            )
            logs = found.x
            noise = float(np.exp(logs[-1]))
            covariance = self._covariance(logs)[0]
            weights = covariance @ self.moments / noise
            residual = self.y - self.rows @ weights
            if round_ < REWEIGHTINGS:
                squares = residual**2 / np.median(residual**2) * 0.455  # the median of chi squared
                self.trust = (FREEDOM + 1) / (FREEDOM + squares)
        leverage = np.einsum("ij,jk,ik->i", self.rows, covariance, self.rows) * self.trust / noise
        left_out = self.y - residual / np.maximum(1 - leverage, 1e-6)
        return _Solved(weights, covariance, noise, left_out)

    def _weigh(self) -> None:
        weighted = self.rows * self.trust[:, None]
        self.gram = self.rows.T @ weighted
        self.moments = weighted.T @ self.y
        self.squares = float(self.y @ (self.trust * self.y))

    def _covariance(self, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Posterior covariance of the weights, and I + B G, whose determinant is needed."""
        strengths = [*np.exp(logs[:-1]), 1.0]
        prior = sum(s * outer for s, outer in zip(strengths, self.outer, strict=True))
        mixed = np.eye(len(self.gram)) + self.gram @ prior / np.exp(logs[-1])
        covariance = prior @ np.linalg.inv(mixed)
        return (covariance + covariance.T) / 2, mixed

    def _loss(self, logs: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log of marginal likelihood times belief, and its gradient in the logs."""
        noise = float(np.exp(logs[-1]))
        covariance, mixed = self._covariance(logs)
        precision = self.gram / noise
        moments = self.moments / noise
        weights = covariance @ moments
        fit = self.squares / noise - moments @ weights
        loss = 0.5 * (fit + len(self.y) * logs[-1] + np.linalg.slogdet(mixed)[1])
        curvature = precision - precision @ covariance @ precision  # rows^T K^-1 rows
        slope = moments - precision @ weights  # rows^T K^-1 y
        gradient = [
            0.5 * s * (np.sum(curvature * outer) - slope @ outer @ slope)
            for s, outer in zip(np.exp(logs[:-1]), self.outer, strict=False)
        ]
        residual = self.squares - 2 * self.moments @ weights + weights @ self.gram @ weights
        used = np.sum(covariance * precision)
        gradient.append(0.5 * (len(self.y) - used - residual / noise))
        pull = (logs - self.belief_mean) / self.belief_spread
        return loss + 0.5 * float(pull @ pull), np.array(gradient) + pull / self.belief_spread


def table_of(found: Estimate, header: Mapping[str, str], *, classes: int = 1000) -> LatencyTable:
    """Return the estimate as a latency table.

    Stem, head and classifier cannot be told apart by totals: the stem's row holds all three. A cost
    that came out below 0 is 0; where a shape has no identity, its blocks are raised instead and the
    base is lowered by as much, which changes no network.

    Args:
        header: what the table says of itself (table_file.py).
        classes: of the networks that were measured.
    """
    entry_ms, base_ms = found.entry_ms.copy(), found.base_ms
    low_ms, high_ms = found.interval_ms()
    for members, layers in found.entries.places():
        lacking_ms = -float(entry_ms[members].min())
        if lacking_ms > 0 and not found.entries.identities[members].any():
            for values in (entry_ms, low_ms, high_ms):
                values[members] += lacking_ms
            base_ms -= layers * lacking_ms
    entry_ms = np.maximum(entry_ms, 0.0)
    low_ms, high_ms = np.minimum(low_ms, entry_ms), np.maximum(high_ms, entry_ms)
    times_ms = zip(entry_ms, low_ms, high_ms, strict=True)
    entries = [
        _row(shape, *(float(ms) for ms in times), samples=int(samples))
        for shape, times, samples in zip(found.entries.shapes, times_ms, found.samples, strict=True)
    ]
    stem, head, classifier = (
        shape for shape in plan(found.entries.space, classes) if shape.block in FIXED
    )
    base_ms = max(base_ms, 0.0)
    base = _row(stem, base_ms, base_ms, base_ms, samples=int(found.samples.max()))
    nothing = [_row(shape, 0.0, 0.0, 0.0, samples=0) for shape in (head, classifier)]
    return LatencyTable(header, [base, *entries, *nothing])


def _row(shape: Shape, value: float, low: float, high: float, *, samples: int) -> Entry:
    return Entry(shape, round(value, 6), round(low, 6), round(high, 6), samples)
