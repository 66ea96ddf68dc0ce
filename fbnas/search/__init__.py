"""HOW the choice is learned: supernet, theta, objectives, the alternating loop, selection."""

from fbnas.search.choice import best_within
from fbnas.search.distribution import ArchitectureDistribution
from fbnas.search.evolution import evolve
from fbnas.search.logbook import Learned, read_result, read_supernet
from fbnas.search.loop import SearchResult, search
from fbnas.search.objectives import OBJECTIVES, build_objective
from fbnas.search.ranking import Ranked, SharedWeightsJudge, rank_by_shared_weights
from fbnas.search.sampling import Band, draw_within
from fbnas.search.selection import (
    LEAST_USED,
    Limit,
    check_budget,
    check_limits,
    highest_within,
    latency_range,
    lowest_within,
    most_probable_within,
)
from fbnas.search.settings import SearchSettings
from fbnas.search.supernet import Supernet
from fbnas.search.target import LatencySource, Target

__all__ = [
    "LEAST_USED",
    "OBJECTIVES",
    "ArchitectureDistribution",
    "Band",
    "LatencySource",
    "Learned",
    "Limit",
    "Ranked",
    "SearchResult",
    "SearchSettings",
    "SharedWeightsJudge",
    "Supernet",
    "Target",
    "best_within",
    "build_objective",
    "check_budget",
    "check_limits",
    "draw_within",
    "evolve",
    "highest_within",
    "latency_range",
    "lowest_within",
    "most_probable_within",
    "rank_by_shared_weights",
    "read_result",
    "read_supernet",
    "search",
]
