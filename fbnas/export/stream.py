"""Classifying a video: similar frames share what was computed for the ones before.

Scores, where nothing changed; where something did, the features of the rest of the image.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fbnas.errors import InputError
from fbnas.export.metadata import read_metadata
from fbnas.export.regions import Box, Regions
from fbnas.latency.session import open_session, scores
from fbnas.space.heads import Heads, rows_of

CELLS = 8  # a frame's change is that of the cell, of 8 x 8, that changes most
LEVELS = 255.0  # of a pixel

Run = Callable[[np.ndarray], np.ndarray]  # (1, c, h, w) float32 to (1, classes), of all heads


@dataclass(frozen=True)
class Answer:
    """Scores (classes,) of a frame, how much it differs from the key frame, whether they are new.

    `scores`: of several heads side by side, in their order.
    `change`: in levels of a pixel, 0 to 255; infinite for the first frame.
    `work`: the fraction of the network's multiply-adds that it took, 0 to 1.
    """

    scores: np.ndarray
    change: float
    work: float

    @property
    def computed(self) -> bool:
        """Whether the scores are new."""
        return self.work > 0


class Stream:
    """Classifies frame after frame, and reuses what was computed for those that are similar.

        stream = Stream.load("model.onnx", threshold=6)
        for frame in video:               # (h, w, c) uint8, of the network's resolution
            answer = stream(frame)
        print(stream.saving)

    The change of a frame is measured against the last one that was computed (the key frame), so
    that slow motion adds up: the mean absolute difference in the cell of an 8x8 grid where it is
    largest, so that a small thing that moves counts as much as a large one.

    A frame that changed is computed whole; or by `Regions`, which pay where the camera stands
    still, the features of its first layers around the cells that changed, and all that follows:
    the other cells are those of the key frame still.

    Args:
        run: computes scores, (1, c, h, w) float32 normalised to (1, classes); or the `Regions` of a
            file.
        mean: per channel, for frames scaled to [0, 1].
        std: likewise.
        threshold: levels of change, 0 to 255, up to which the scores are reused; 0 only reuses
            those of equal frames. `choose_threshold` finds one.
        heads: the names of each head's classes, where there are several, in the order of scores.

    Raises:
        InputError: a threshold out of its range.
    """

    def __init__(
        self,
        run: Run | Regions,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        threshold: float,
        heads: Heads | None = None,
    ) -> None:
        if not 0 <= threshold <= LEVELS:
            raise InputError(f"threshold is {threshold}; expected 0 to {LEVELS:g} levels.")
        self.run = run
        self.mean = np.asarray(mean, dtype=np.float32).reshape(-1, 1, 1)
        self.std = np.asarray(std, dtype=np.float32).reshape(-1, 1, 1)
        self.threshold = threshold
        self.rows = list(rows_of(heads or {}).values()) or [slice(None)]
        self.frames = 0
        self.work = 0.0
        self.key: np.ndarray | None = None
        self.scores: np.ndarray | None = None

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        threshold: float,
        regions: float | None = None,
        threads: int | None = 1,
    ) -> "Stream":
        """Read an ONNX file of `fbnas export`, which states its own preprocessing and heads.

        Args:
            regions: the fraction of its multiply-adds, between 0 and 1, that are computed around
                changes alone (`at` of `Regions`); None for frames that are computed whole.

        Raises:
            InputError: no such file, one that states none, or one that cannot be cut there.
        """
        metadata = read_metadata(path)
        stated = metadata.get("preprocessing")
        if stated is None:
            raise InputError(
                f"{path} states no preprocessing; expected an ONNX file of fbnas export."
            )
        run = (
            _of_file(path, threads)
            if regions is None
            else Regions(path, at=regions, threads=threads)
        )
        heads = metadata.get("heads")
        return cls(run, mean=stated["mean"], std=stated["std"], threshold=threshold, heads=heads)

    def __call__(self, frame: np.ndarray) -> Answer:
        """Classify the next frame, (h, w, c) uint8.

        Raises:
            InputError: another type or shape.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != len(self.mean):
            raise InputError(
                f"the frame is {frame.shape} {frame.dtype}; expected (height, width, "
                f"{len(self.mean)}) uint8."
            )
        self.frames += 1
        change, changed, work = np.inf, None, 1.0
        if self.key is not None and self.scores is not None:
            cells, edges = changes_of(frame, self.key)
            change = float(cells.max())
            if change <= self.threshold:
                return Answer(self.scores, change, work=0.0)
            changed = _around(cells > self.threshold, edges)
        self.scores = None  # where that is interrupted, the next frame is computed whole
        if isinstance(self.run, Regions):
            self.key = _replaced(self.key, frame, changed)
            found, work = self.run(self.key, changed, self._prepared)
        else:
            self.key, found = frame.copy(), self.run(self._prepared(frame))
        self.scores = found[0]
        self.work += work
        return Answer(self.scores, change, work)

    def _prepared(self, frame: np.ndarray) -> np.ndarray:
        """Return a frame, or a part of one, as the network takes it: (1, c, h, w) float32."""
        scaled = frame.transpose(2, 0, 1).astype(np.float32) / np.float32(LEVELS)
        return ((scaled - self.mean) / self.std)[None]

    def classes(self, answer: Answer) -> tuple[int, ...]:
        """Return the class of each head, counted from that head's first; of one head one class."""
        return tuple(int(answer.scores[rows].argmax()) for rows in self.rows)

    @property
    def saving(self) -> float:
        """The fraction of all frames' multiply-adds that was not computed, 0 to 1."""
        return 1 - self.work / self.frames if self.frames else 0.0


def changes_of(frame: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return how much each cell of a frame differs: its mean absolute difference.

    Args:
        frame: (h, w, c) uint8.
        key: likewise, of the same shape.

    Returns:
        (rows, columns) in levels of a pixel, 0 to 255; where rows of cells begin and the last ends,
        and columns likewise, in pixels.

    Raises:
        InputError: frames of two shapes.
    """
    if frame.shape != key.shape:
        raise InputError(
            f"the frame is {frame.shape}, the one before was {key.shape}; expected one size: "
            "start another Stream for another video."
        )
    difference = np.abs(frame.astype(np.int16) - key).mean(2)
    edges = [np.linspace(0, side, min(CELLS, side) + 1).astype(int) for side in difference.shape]
    for axis in (0, 1):
        widths = np.diff(edges[axis]).reshape((-1, 1) if axis == 0 else (1, -1))
        difference = np.add.reduceat(difference, edges[axis][:-1], axis=axis) / widths
    return difference, edges


def _of_file(path: Path | str, threads: int | None) -> Run:
    session = open_session(path, threads=threads)
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> np.ndarray:
        return scores(session, {name: images})

    return run


def _replaced(key: np.ndarray | None, frame: np.ndarray, changed: Box | None) -> np.ndarray:
    """Return the key frame with what changed of it; a copy of the frame where all did."""
    if key is None or changed is None:
        return frame.copy()
    key[changed.slices] = frame[changed.slices]
    return key


def _around(changed: np.ndarray, edges: Sequence[np.ndarray]) -> Box:
    """Return the pixels around all cells that changed, at least one."""
    found = [np.flatnonzero(changed.any(1 - axis)) for axis in (0, 1)]
    sides = [
        int(edge[place])
        for edge, x in zip(edges, found, strict=True)
        for place in (x[0], x[-1] + 1)
    ]
    return Box(*sides)


def choose_threshold(
    frames: Sequence[np.ndarray],
    make: Callable[[float], Stream],
    *,
    agreement: float = 0.99,
    candidates: Iterable[float] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
) -> float:
    """Return the largest threshold at which enough frames are answered as by computing all.

    Args:
        frames: a video like those to come, in order, each (h, w, c) uint8.
        make: builds a stream of a threshold.
        agreement: the fraction of frames whose class must be that of computing them, 0 to 1; of
            several heads, in each.
        candidates: thresholds in levels.

    Returns:
        One of the candidates, or 0 where none agrees often enough.

    Raises:
        InputError: no frames, or an agreement out of its range.
    """
    if not frames or not 0 < agreement <= 1:
        raise InputError(
            f"{len(frames)} frames and agreement={agreement}; expected at least one frame, and a "
            "fraction more than 0 and at most 1."
        )
    whole = make(0.0)
    expected = np.array([whole.classes(whole(frame)) for frame in frames])  # (frames, heads)
    best = 0.0
    for threshold in sorted(candidates):
        stream = make(threshold)
        found = np.array([stream.classes(stream(frame)) for frame in frames])
        worst = int((found == expected).sum(0).min())
        if worst >= agreement * len(frames):
            best = max(best, threshold)
    return best
