"""Classifying a video: similar frames share what was computed for the first of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fbnas.errors import InputError
from fbnas.export.metadata import read_metadata
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
    """

    scores: np.ndarray
    change: float
    computed: bool


class Stream:
    """Classifies frame after frame, and reuses the scores of a frame that is similar enough.

        stream = Stream.load("model.onnx", threshold=6)
        for frame in video:               # (h, w, c) uint8, of the network's resolution
            answer = stream(frame)
        print(stream.saving)

    The change of a frame is measured against the last one that was computed (the key frame), so
    that slow motion adds up: the mean absolute difference in the cell of an 8x8 grid where it is
    largest, so that a small thing that moves counts as much as a large one.

    Args:
        run: computes scores, (1, c, h, w) float32 normalised to (1, classes).
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
        run: Run,
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
        self.frames = self.computed = 0
        self.key: np.ndarray | None = None
        self.scores: np.ndarray | None = None

    @classmethod
    def load(cls, path: Path | str, *, threshold: float, threads: int | None = 1) -> "Stream":
        """Read an ONNX file of `fbnas export`, which states its own preprocessing and heads.

        Raises:
            InputError: no such file, or one that states none.
        """
        metadata = read_metadata(path)
        stated = metadata.get("preprocessing")
        if stated is None:
            raise InputError(
                f"{path} states no preprocessing; expected an ONNX file of fbnas export."
            )
        session = open_session(path, threads=threads)
        name = session.get_inputs()[0].name

        def run(images: np.ndarray) -> np.ndarray:
            return scores(session, {name: images})

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
        change = np.inf if self.key is None else change_of(frame, self.key)
        if self.scores is not None and change <= self.threshold:
            return Answer(self.scores, change, computed=False)
        scaled = frame.transpose(2, 0, 1).astype(np.float32) / np.float32(LEVELS)
        self.scores = self.run(((scaled - self.mean) / self.std)[None])[0]
        self.key = frame.copy()
        self.computed += 1
        return Answer(self.scores, change, computed=True)

    def classes(self, answer: Answer) -> tuple[int, ...]:
        """Return the class of each head, counted from that head's first; of one head one class."""
        return tuple(int(answer.scores[rows].argmax()) for rows in self.rows)

    @property
    def saving(self) -> float:
        """The fraction of frames whose scores were reused, 0 to 1."""
        return 1 - self.computed / self.frames if self.frames else 0.0


def change_of(frame: np.ndarray, key: np.ndarray) -> float:
    """Return how much a frame differs: the mean absolute difference of its most changed cell.

    Args:
        frame: (h, w, c) uint8.
        key: likewise, of the same shape.

    Returns:
        Levels of a pixel, 0 to 255.

    Raises:
        InputError: frames of two shapes.
    """
    if frame.shape != key.shape:
        raise InputError(
            f"the frame is {frame.shape}, the one before was {key.shape}; expected one size: "
            "start another Stream for another video."
        )
    difference = np.abs(frame.astype(np.int16) - key).mean(2)
    for axis in (0, 1):
        side = difference.shape[axis]
        edges = np.linspace(0, side, min(CELLS, side) + 1).astype(int)
        widths = np.diff(edges).reshape((-1, 1) if axis == 0 else (1, -1))
        difference = np.add.reduceat(difference, edges[:-1], axis=axis) / widths
    return float(difference.max())


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
