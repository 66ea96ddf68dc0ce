"""Everything a training run needs to go on from where it is: on disk as checkpoint.pt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.files import append_jsonl, atomic_write, load_checkpoint, save_checkpoint
from fbnas.training.reading import Wait


class TrainingDiverged(InputError):  # noqa: N818 - it says what happened
    """The loss is no number any more; the checkpoint in the out folder is from before."""


class Average:
    """Moving average: w_avg <- d * w_avg + (1 - d) * w, with d = min(decay, (1 + t) / (10 + t)).

    The growing d (TensorFlow's ExponentialMovingAverage) forgets the initial weights in short runs.
    BN statistics are not averaged: they lag behind weights that move fast, so whoever judges the
    average estimates them anew. With decay 0 `network` is the trained network itself.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.network = deepcopy(network).requires_grad_(False) if decay else network
        self._ours: list[Tensor] = list(self.network.parameters())
        self._theirs: list[Tensor] = list(network.parameters())

    @torch.no_grad()
    def update(self) -> None:
        if self.decay:
            keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self._ours, self._theirs, 1 - keep)
            self.updates += 1


class TrainingState:
    """Weights, optimizer, average, position, metrics and the best weights so far.

    `identity`: what must be equal for a resumed run to equal an uninterrupted one. `regressors`:
    what is trained beside the network and of no use after. Without `out` nothing is written.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: Average,
        *,
        out: Path | str | None,
        identity: dict[str, Any],
        regressors: nn.Module | None = None,
    ) -> None:
        self.network = network
        self.regressors = nn.ModuleList() if regressors is None else regressors
        self.optimizer = optimizer
        self.average = average
        self.out = None if out is None else Path(out)
        self.identity = identity
        self.epoch = 0
        self.step = 0  # within the epoch
        self.seconds = 0.0  # spent on the unfinished epoch
        self.wait = Wait()  # likewise
        device = next(network.parameters()).device
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, accuracy
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = -1

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Note the metrics, keep the weights if they are the best, turn to the next epoch, save."""
        before = [past["validation_accuracy"] for past in self.history]
        if not before or row["validation_accuracy"] > max(before):
            weights = self.average.network.state_dict()
            self.best = {name: value.detach().cpu().clone() for name, value in weights.items()}
            self.best_epoch = row["epoch"]
        self.history.append(row)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.wait = Wait()
        self.totals.zero_()
        self.save()

    def check_finite(self, *losses: float) -> None:
        """Refuse a loss that is no number, before a checkpoint can hold what came of it.

        Raises:
            TrainingDiverged: a total or one of `losses` is not finite.
        """
        if bool(self.totals.isfinite().all()) and bool(torch.tensor(losses).isfinite().all()):
            return
        kept = f" The checkpoint in {self.out} is from before." if self.out is not None else ""
        raise TrainingDiverged(
            f"The loss is not a finite number in epoch {self.epoch + 1}; expected it to fall.{kept}"
            " Start again with a lower learning rate (lr)."
        )

    def save(self) -> None:
        if self.out is None:
            return
        checkpoint = {
            "identity": self.identity,
            "network": self.network.state_dict(),
            "regressors": self.regressors.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.network.state_dict() if self.average.decay else {},
            "average_updates": self.average.updates,
            "position": [self.epoch, self.step],
            "seconds": self.seconds,
            "data_wait_seconds": self.wait.seconds,
            "totals": self.totals,
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        save_checkpoint(self.out / "checkpoint.pt", checkpoint)

    def restore(self) -> None:
        """Take up the checkpoint; without one, a kill came before the first: start anew.

        Raises:
            InputError: no folder, a damaged checkpoint, or one of another run.
        """
        if self.out is None:
            raise InputError("resume=true needs the folder of the run to resume; expected out=DIR.")
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        stored = load_checkpoint(path)
        for key, value in self.identity.items():
            if stored["identity"].get(key) != value:
                raise InputError(
                    f"{path}: made with {key}={stored['identity'].get(key)}, now {key}={value}; "
                    "expected the same. Resume with the old value, or start again with "
                    "overwrite=true."
                )
        self._load_weights(stored, path)
        self.average.updates = stored["average_updates"]
        self.epoch, self.step = stored["position"]
        self.seconds = stored["seconds"]
        self.wait = Wait(stored.get("data_wait_seconds", 0.0))  # older ones did not measure it
        self.totals.copy_(stored["totals"])
        self.history, self.best = stored["history"], stored["best"]
        self.best_epoch = stored["best_epoch"]
        torch.set_rng_state(stored["rng"])
        if torch.cuda.is_available() and stored["rng_cuda"]:
            torch.cuda.set_rng_state_all(stored["rng_cuda"])

    def _load_weights(self, stored: dict[str, Any], path: Path) -> None:
        try:
            self.network.load_state_dict(stored["network"])
            self.regressors.load_state_dict(stored.get("regressors", {}))
        except RuntimeError as error:
            raise InputError(
                f"{path}: holds the weights of another network; expected those of the architecture "
                "being trained. Resume with the same architecture, or start again with "
                "overwrite=true."
            ) from error
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.average.decay:
            self.average.network.load_state_dict(stored["average"])


@contextmanager
def metrics_writer(state: TrainingState) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that logs one row to metrics.jsonl and TensorBoard; to nothing without out.

    metrics.jsonl is first made equal to the state's history: a kill may have come between the two.
    A new run takes away the checkpoint that an older one left, so that nobody resumes from it.
    """
    if state.out is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    if state.epoch == 0 and state.step == 0:
        (state.out / "checkpoint.pt").unlink(missing_ok=True)
    metrics = state.out / "metrics.jsonl"
    atomic_write(metrics, "")
    for row in state.history:
        append_jsonl(metrics, row)

    with SummaryWriter(str(state.out / "tensorboard"), purge_step=state.epoch) as board:

        def write(row: dict[str, Any]) -> None:
            append_jsonl(metrics, row)
            for name, value in row.items():
                board.add_scalar(name, value, row["epoch"])

        yield write
