"""Schedules as pure functions of the step; all follow the number of steps asked for."""

import math


def cosine(step: int, total: int, *, warmup: int = 0) -> float:
    """Factor of the learning rate: linear up to 1 in `warmup` steps, then half a cosine down to 0.

    (1 + cos(pi * (step - warmup) / (total - warmup))) / 2 (Loshchilov & Hutter 2017, arXiv
    1608.03983); warm-up as (step + 1) / warmup, so that the first step already moves (Goyal et al.
    2017, 1706.02677).

    `step` counts from 0 to total - 1. A warm-up longer than half of the run is cut to half of it,
    so that a short run still reaches its full rate and still cools down.
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2
