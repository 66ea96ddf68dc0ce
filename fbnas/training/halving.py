"""Successive halving: several candidates trained a little, the better half a little more."""

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.space.architecture import Architecture
from fbnas.space.network import load_weights_, save_weights
from fbnas.training.data import Data
from fbnas.training.loop import train
from fbnas.training.settings import TrainingSettings
from fbnas.training.state import TrainingDiverged

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """What a candidate came to in a rung; `candidate` and `rung` count from 1.

    epochs: trained in all, the rungs before included; a training that diverged ended before.
    validation_accuracy, validation_cross_entropy: None where it diverged.
    """

    candidate: int
    rung: int
    epochs: int
    validation_accuracy: float | None
    validation_cross_entropy: float | None

    @property
    def diverged(self) -> bool:
        return self.validation_accuracy is None

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: by accuracy, and by cross-entropy (nats) where that is equal."""
        if self.validation_accuracy is None or self.validation_cross_entropy is None:
            return math.inf, math.inf
        return -self.validation_accuracy, self.validation_cross_entropy


@dataclass(frozen=True)
class Halved:
    """A candidate and its trials, one per rung that it reached."""

    architecture: Architecture
    trials: tuple[Trial, ...]


def halve(
    architectures: Sequence[Architecture],
    build: Callable[[Architecture], nn.Module],
    data: Data,
    *,
    epochs: int = 2,
    settings: TrainingSettings | None = None,
    seed: int = 0,
    out: Path | str,
    resume: bool = False,
    on_trial: Callable[[Trial, int], None] | None = None,
) -> list[Halved]:
    """Train all, keep the better half by validation, train those on, until one is left; best first.

    Rung r = 1, 2, ... ends when each of its networks has been trained for `epochs` * 2^(r - 1)
    epochs in all. A network goes on with the weights of its own rung before, at a learning rate
    that rises anew (warm restarts, Loshchilov & Hutter 2017), so that all that are compared have
    cooled down.
    n = 2^R candidates take n * `epochs` * (R + 1) / 2 epochs together, instead of the
    n * `epochs` * 2^(R - 1) of training all as long as the last two. `data.test` is never read.
    A candidate whose training diverges is the last of its rung and trained no further.
    Source: Jamieson & Talwalkar 2016 (arXiv 1502.07943), with half of each rung kept.

    Args:
        architectures: the candidates.
        build: returns an untrained network of one; torch's global generator is seeded before.
        data: training and validation images.
        epochs: of the first rung.
        settings: how to train; its `epochs` are not used.
        seed: the same seed gives the same numbers on CPU.
        out: folder of plan.json and a folder per rung and candidate.
        resume: go on where an interrupted halving with the same plan stopped.
        on_trial: called with each trial and the number of rungs, also with those read back.

    Raises:
        InputError: nothing to train, or another plan than the one in `out`.
        TrainingDiverged: the training of every candidate of a rung did.
        KeyboardInterrupt: SIGINT or SIGTERM, after a checkpoint of the current step was written.
    """
    if not architectures or epochs < 1:
        raise InputError(
            f"{len(architectures)} candidates for {epochs} epochs; expected at least 1 of each."
        )
    rungs = len(architectures).bit_length() - 1  # n, n // 2, ... down to 2 or 3
    course = _Course(build, data, epochs, settings or TrainingSettings(), seed, Path(out))
    course.begin(architectures, resume=resume)
    trials: dict[int, list[Trial]] = {number: [] for number in range(1, len(architectures) + 1)}
    survivors, losers = list(trials), list[int]()
    for rung in range(1, rungs + 1):
        for number in survivors:
            trial = course.trial(architectures[number - 1], number, rung)
            trials[number].append(trial)
            if on_trial:
                on_trial(trial, rungs)
        survivors.sort(key=lambda number: trials[number][-1].rank)
        sound = sum(not trials[number][-1].diverged for number in survivors)
        if not sound:
            raise TrainingDiverged(
                f"All {len(survivors)} candidates of rung {rung} diverged; expected losses that "
                "fall. Start again with a lower learning rate (lr)."
            )
        kept = min(len(survivors) // 2, sound)
        survivors, losers = survivors[:kept], survivors[kept:] + losers
        if kept == 1:
            break
    return [Halved(architectures[n - 1], tuple(trials[n])) for n in survivors + losers]


def planned(out: Path | str) -> list[Architecture] | None:
    """Return the candidates of the halving that `out` holds, None where it holds none."""
    plan = Path(out) / "plan.json"
    if not plan.is_file():
        return None
    rows = read_json(plan)["candidates"]
    return [Architecture(tuple(row.pop("blocks")), row.pop("space"), row) for row in rows]


@dataclass(frozen=True)
class _Course:
    """What all trials have in common."""

    build: Callable[[Architecture], nn.Module]
    data: Data
    epochs: int
    settings: TrainingSettings
    seed: int
    out: Path

    def begin(self, architectures: Sequence[Architecture], *, resume: bool) -> None:
        """Write the plan, or check that it is the one to be resumed.

        Raises:
            InputError: it is another one.
        """
        plan = self._plan(architectures)
        path = self.out / "plan.json"
        if resume and path.is_file():
            before = read_json(path)
            for key, value in plan.items():
                if before.get(key) != value:
                    raise InputError(
                        f"{path} is of another halving: its {key} differ; expected the same. "
                        "Resume with the same options, or start again with overwrite=true."
                    )
            return
        for folder in self.out.glob("rung_*"):
            shutil.rmtree(folder)
        write_json(path, plan)

    def trial(self, architecture: Architecture, number: int, rung: int) -> Trial:
        """Train a candidate on to the epochs of a rung, unless that is done already."""
        folder = self._folder(number, rung)
        record = folder / "trial.json"
        if record.is_file():
            return Trial(**read_json(record))
        torch.manual_seed(self.seed)
        network = self.build(architecture)
        if rung > 1:
            load_weights_(network, self._folder(number, rung - 1) / "weights.safetensors")
        try:
            result = train(
                network,
                self.data,
                settings=replace(self.settings, epochs=self._until(rung) - self._until(rung - 1)),
                seed=self.seed + rung - 1,  # or the images would come in the same order again
                out=folder,
                resume=True,
            )
        except TrainingDiverged:
            log.warning(
                "Candidate %02d (%s) diverged, so it is the last of rung %d; a lower learning rate "
                "(lr) might have helped it.",
                number,
                architecture,
                rung,
            )
            trial = Trial(number, rung, self._until(rung), None, None)
        else:
            best = result.history[result.best_epoch]
            accuracy, loss = best["validation_accuracy"], best["validation_loss"]
            trial = Trial(number, rung, self._until(rung), accuracy, loss)
            save_weights(result.network, folder / "weights.safetensors")
        write_json(record, asdict(trial))
        # four times the weights, and of no more use; none where the first epoch diverged
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        return trial

    def _until(self, rung: int) -> int:
        """Epochs in all when a rung, counted from 1, is done."""
        return self.epochs * 2 ** (rung - 1) if rung else 0

    def _folder(self, number: int, rung: int) -> Path:
        return self.out / f"rung_{rung}" / f"{number:02d}"

    def _plan(self, architectures: Sequence[Architecture]) -> dict[str, Any]:
        settings = asdict(self.settings)
        for name in ("device", "epochs", "distillation"):  # nobody teaches candidates
            del settings[name]
        return {
            "candidates": [
                {"blocks": list(a.blocks), "space": a.space, **a.provenance} for a in architectures
            ],
            "epochs": self.epochs,
            "training": settings,
            "seed": self.seed,
            "data": [self.data.name, len(self.data.train), len(self.data.validation)],
        }
