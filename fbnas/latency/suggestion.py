"""Which whole networks are worth measuring next."""

import numpy as np
import torch

from fbnas.latency.effects import Entries, Prior
from fbnas.latency.totals import Estimate, believed
from fbnas.space import Architecture

CANDIDATES = 3000


def suggest(
    entries: Entries,
    count: int,
    *,
    among: np.ndarray | None = None,
    known: Estimate | None = None,
    prior: Prior = "macs",
    seed: int = 0,
) -> np.ndarray:
    """Return the networks whose totals would tell most about all others, the most telling first.

    Each is the one that lowers the mean variance of the candidates' predictions most, given those
    before it (sequential A-optimal design, also called active learning by Cohn's criterion: Cohn,
    Ghahramani and Jordan 1996). The variance does not depend on the latencies themselves, so that
    all can be chosen before the first is measured.

    Args:
        among: candidates, (networks, layers) block indices; random networks by default.
        known: what measured networks have told already.
        prior: as in `estimate`, where nothing is known yet.

    Returns:
        (count, layers) block indices, fewer where there are fewer candidates.
    """
    candidates = random_paths(entries, CANDIDATES, seed) if among is None else among
    candidates = np.unique(candidates, axis=0)
    covariance, noise = believed(entries, prior)
    if known is not None:
        covariance, noise = known.covariance, known.noise_ms**2
    rows = np.hstack([entries.counts(candidates), np.ones((len(candidates), 1))])
    spread = rows.T @ rows / len(rows)
    chosen: list[int] = []
    for _ in range(min(count, len(candidates))):
        towards = rows @ covariance
        variance = np.einsum("ij,ij->i", towards, rows)
        gain = np.einsum("ij,jk,ik->i", towards, spread, towards) / (variance + noise)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        covariance = covariance - np.outer(towards[best], towards[best]) / (variance[best] + noise)
    return candidates[chosen]


def random_paths(entries: Entries, count: int, seed: int) -> np.ndarray:
    """Return uniformly random networks of the space, (count, layers) block indices."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [Architecture.random(entries.space, generator) for _ in range(count)]
    return np.array([architecture.path(entries.space) for architecture in drawn])
