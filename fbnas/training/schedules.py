"""Schedules as pure functions of the step; all follow the number of steps asked for."""

import math
from collections.abc import Sequence
from typing import Any

from fbnas.errors import InputError

Points = Sequence[Sequence[float]]


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


def at(points: Points, done: float, *, geometric: bool = False) -> float:
    """Value of a schedule given as points [part of the run, value], at a part from 0 to 1.

    Between two points it is linear, or geometric; before the first and after the last it is theirs.
    Of two points at the same part the second holds from there on.
    """
    before = [point for point in points if point[0] <= done]
    after = [point for point in points if point[0] > done]
    if not before or not after:
        return float((before or after)[-1 if before else 0][1])
    (x0, y0), (x1, y1) = before[-1], after[0]
    part = (done - x0) / (x1 - x0)
    return float(y0 * (y1 / y0) ** part if geometric else y0 + part * (y1 - y0))


def check_points(name: str, points: Any, *, positive: bool) -> None:
    """Refuse what is no schedule.

    Raises:
        InputError: no list of pairs of numbers, or parts that leave [0, 1] or go back.
    """
    pairs = isinstance(points, list | tuple) and all(
        isinstance(point, list | tuple) and len(point) == 2 for point in points
    )
    numbers = [x for point in points for x in point] if pairs else []
    if not numbers or any(type(x) not in (int, float) or not math.isfinite(x) for x in numbers):
        raise InputError(
            f"{name} is {points!r}; expected points [part of the run, value], as in "
            "[[0, 5.0], [0.5, 1.0], [1, 0.1]]."
        )
    parts, values = numbers[::2], numbers[1::2]
    if parts != sorted(parts) or parts[0] < 0 or parts[-1] > 1:
        raise InputError(f"{name} has its points at {parts}; expected rising parts from 0 to 1.")
    if min(values) < 0 or (positive and min(values) == 0):
        least = "more than 0" if positive else "0 or more"
        raise InputError(f"{name} has the values {values}; expected {least}.")
