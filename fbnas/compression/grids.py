"""Weights that are whole multiples of a scale per channel, as rounding to few bits leaves them."""

from dataclasses import dataclass

import numpy as np

HIGHEST = tuple(2 ** (bits - 1) - 1 for bits in range(2, 9))  # levels up to 1 (2 bits) .. 127
NEAR = (0, -1, 1, -2, 2)  # units in the last place: the scale is known by its largest multiple
PROBED = 4  # channels that say whether it is worth looking at all of them


@dataclass(frozen=True)
class Grid:
    """float32 weights as `levels * scales`, bit for bit.

    levels: (channels, weights of one) int64, from -highest to highest.
    scales: (channels,) float32.
    """

    levels: np.ndarray
    scales: np.ndarray
    highest: int

    def weights(self) -> np.ndarray:
        """Return the weights: (channels, weights of one) float32."""
        return self.levels.astype(np.float32) * self.scales[:, None]


def find_grid(weights: np.ndarray) -> Grid | None:
    """Return the coarsest symmetric grid that every channel lies on, None where there is none.

    A channel's largest weight is taken to be its highest level, which is how scales are chosen
    (`fbnas.latency.fake_quantization.WeightGrids`).

    Args:
        weights: (channels, weights of one) float32.
    """
    largest = np.abs(weights).max(axis=1)
    if not np.isfinite(largest).all():
        return None
    for highest in HIGHEST:
        if _on_grid(weights[:PROBED], largest[:PROBED], highest) is None:
            continue
        if (found := _on_grid(weights, largest, highest)) is not None:
            return found
    return None


def _on_grid(weights: np.ndarray, largest: np.ndarray, highest: int) -> Grid | None:
    scales = np.where(largest > 0, largest / np.float32(highest), np.float32(1))
    levels, missing = np.zeros(weights.shape, np.int64), np.arange(len(weights))
    for step in NEAR:
        tried = _stepped(scales[missing], step)
        part = weights[missing]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            near = np.rint(part / tried[:, None])
        grid = Grid(np.nan_to_num(near).clip(-highest, highest).astype(np.int64), tried, highest)
        fits = (grid.weights().view(np.uint32) == part.view(np.uint32)).all(axis=1)
        levels[missing[fits]], scales[missing[fits]] = grid.levels[fits], tried[fits]
        missing = missing[~fits]
        if not len(missing):
            return Grid(levels, scales, highest)
    return None


def _stepped(scales: np.ndarray, steps: int) -> np.ndarray:
    """Return positive float32 numbers so many units in the last place further."""
    return (scales.view(np.int32) + np.int32(steps)).view(np.float32)
