"""The alternating loop: weights on one part of the training images, theta on the other."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.files import save_checkpoint
from fbnas.progress import progress
from fbnas.search import checkpoint, logbook
from fbnas.search.distribution import ArchitectureDistribution
from fbnas.search.learner import Learner, learner_of
from fbnas.search.objectives import DualAscent, Objective
from fbnas.search.settings import SearchSettings
from fbnas.search.supernet import Supernet
from fbnas.search.target import Target
from fbnas.space.search_space import SearchSpace
from fbnas.training.allocator import memory_kept
from fbnas.training.augmentation import build_augmentation
from fbnas.training.data import Data, Images, batches, split_for_search
from fbnas.training.interrupt import stop_on_signal
from fbnas.training.layout import memory_format
from fbnas.training.processes import (
    any_process,
    average_gradients_,
    set_up,
    summed,
    synchronise_bn_,
)
from fbnas.training.reading import Wait
from fbnas.training.settings import choose_device
from fbnas.training.state import TrainingDiverged
from fbnas.training.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

AGREE_STEPS = 8  # processes ask each other so often whether to stop: on a GPU asking waits for it


@dataclass(frozen=True)
class SearchResult:
    """One theta per target, the shared weights, and a row per epoch."""

    distributions: list[ArchitectureDistribution]
    supernet: Supernet
    targets: list[Target]
    history: list[dict[str, Any]]
    seconds: float


def search(
    space: SearchSpace,
    data: Data,
    targets: Sequence[Target],
    *,
    objective: Objective | None = None,
    settings: SearchSettings | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    fabric: "Fabric | None" = None,
    task: Task = CLASSIFICATION,
) -> SearchResult:
    """Learn theta for each target, and the weights that all share.

    min over theta, min over w of E_{a ~ P_theta} L(a, w_a)  (Wu et al. 2019, equations 3 and 7):
    each epoch trains w by SGD on 80 % of the training images, then theta by Adam on the other 20 %.
    The test images are never read.

    Args:
        space: what may be chosen.
        data: where the training images come from.
        targets: a table and budgets each; every target learns its own theta, from images at its own
            resolution, to which those of `data` are scaled.
        objective: how cross-entropy and latency combine in theta's loss; `DualAscent()` by default.
        settings: the recipe.
        seed: the same seed gives the same numbers on CPU.
        out: folder for checkpoint, metrics.jsonl, TensorBoard, theta.json and the shared weights.
        resume: continue from the checkpoint in `out`, if there is one.
        on_epoch: called with each epoch's row.
        fabric: a launched Lightning Fabric, for several processes or autocast; every process makes
            the same call, the first writes. By default one process on `settings.device`, in fp32.
        task: what is asked of the networks: their loss, metric and last layers.

    Raises:
        InputError: a budget that the space cannot meet, a latency for which the objective is
            undefined, a checkpoint of another search, or a loss that is no longer a number.
        KeyboardInterrupt: on Ctrl-C, after the checkpoint was written.
    """
    settings = settings or SearchSettings()
    loop = Loop(
        space,
        data,
        targets,
        objective=objective or DualAscent(),
        settings=settings,
        seed=seed,
        out=out,
        fabric=fabric or one_process(settings),
        task=task,
    )
    if resume:
        loop.restore()
    elif loop.writes:  # nobody shall resume from what an older search left
        (loop.writes / "checkpoint.pt").unlink(missing_ok=True)
    with (
        stop_on_signal() as stop,
        memory_kept(loop.device),
        logbook.open_logbook(loop.writes, loop.epoch) as book,
        loop.progress() as loop.advance,
    ):
        if loop.first and loop.epoch == 0:
            book.write_tables(loop.learners)
        for epoch in range(loop.epoch, loop.settings.epochs):
            loop.train_weights(epoch, stop)
            if epoch >= loop.settings.warmup:
                loop.train_theta(epoch, stop)
            row = loop.finish_epoch(epoch)
            if loop.first:
                book.write(row, loop.distributions)
            loop.save()
            if on_epoch and loop.first:
                on_epoch(row)
            if loop.first and settings.says_choice(epoch):
                book.write_choices(epoch, loop.learners)
    if loop.writes:
        logbook.write_result(loop.writes, space, loop.learners, loop.supernet)
    history = loop.history if loop.out is None else logbook.read_history(loop.out)
    seconds = sum(row["seconds"] for row in history)
    return SearchResult(loop.distributions, loop.supernet, list(targets), history, seconds)


def one_process(settings: SearchSettings) -> "Fabric":
    """Return a Fabric of this process alone, on the device of the settings, in fp32."""
    from lightning_fabric import Fabric

    device = choose_device(settings.device)
    index = [device.index] if device.index is not None else 1
    return Fabric(accelerator=device.type, devices=index)


class Loop:
    """The state of a search, all of which its checkpoint holds, and the steps of one epoch."""

    def __init__(
        self,
        space: SearchSpace,
        data: Data,
        targets: Sequence[Target],
        *,
        objective: Objective,
        settings: SearchSettings,
        seed: int,
        out: Path | str | None,
        fabric: "Fabric",
        task: Task,
    ) -> None:
        if not targets:
            raise InputError("A search needs a target: a latency table and a budget, as target_ms.")
        torch.manual_seed(seed)
        self.settings, self.objective, self.data, self.seed = settings, objective, data, seed
        self.task = task
        self.fabric, self.device, self.first = fabric, fabric.device, fabric.is_global_zero
        self.out = Path(out) if out else None
        self.writes = self.out if self.first else None
        self.supernet = Supernet(space, data.classes, classifier=task.classifier)
        if fabric.world_size > 1:
            synchronise_bn_(self.supernet)
        # as the batches are: training steps of FBNets take 0.6 of the time so (batches())
        self.supernet.to(self.device, memory_format=memory_format(self.device))  # type: ignore[call-overload]
        sgd = torch.optim.SGD(
            self.supernet.parameters(),
            lr=settings.weights_lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.weights_optimiser = set_up(sgd, fabric)
        self.learners = [
            learner_of(space, data.classes, target, objective, settings) for target in targets
        ]
        for learner in self.learners:
            learner.optimiser = set_up(learner.optimiser, fabric)
        allowed = torch.stack([learner.distribution.offered for learner in self.learners])
        self.uniform = ArchitectureDistribution(space, allowed.any(dim=0))
        self.weights_images, self.theta_images = split_for_search(
            data.train, fraction=settings.weights_fraction, seed=seed, strata=task.strata
        )
        self._check_batch_size()
        self.augment = build_augmentation(**settings.augment) if settings.augment else None
        self.epoch, self.phase, self.step = 0, "weights", 0
        self.sums = _no_sums(self.device)
        self.history: list[dict[str, Any]] = []  # kept where no file keeps it
        self.epoch_started = self.last_save = time.monotonic()
        self.epoch_seconds_before = 0.0
        self.wait = Wait()  # of the epoch, that before a resumption included
        self.advance: Callable[[int], None] = lambda steps: None

    @property
    def distributions(self) -> list[ArchitectureDistribution]:
        return [learner.distribution for learner in self.learners]

    def train_weights(self, epoch: int, stop: Callable[[], bool]) -> None:
        """One pass over the weights' images; cross-entropy alone."""
        if self.phase != "weights":
            return  # resumed in the middle of theta's pass
        self.supernet.train().requires_grad_(True)
        steps = self.steps(self.weights_images)
        for images, labels in self.order(self.weights_images, epoch, start=self.step):
            self.set_weights_lr(epoch * steps + self.step, self.settings.epochs * steps)
            learner = self.weights_learner(epoch)
            gates = self.weights_gates(epoch, learner)
            self.weights_step(learner.sees(images), labels, gates)
            self.finish_step(epoch, stop)
        self.phase, self.step = "theta", 0

    def weights_step(self, images: Tensor, labels: Tensor, gates: Tensor | list[int]) -> None:
        """Descend the cross-entropy of one batch, in parts where memory is short."""
        self.weights_optimiser.zero_grad(set_to_none=True)
        parts = self.settings.accumulate
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            with self.fabric.autocast():
                scores = self.supernet(x, gates)
            loss = self.task.loss(scores.float(), y)
            self.fabric.backward(loss / parts)
            self.count("weights", loss, scores, y)
        average_gradients_(self.supernet.parameters(), self.fabric)
        if self.settings.clip_norm is not None:
            self.fabric.clip_gradients(
                self.supernet,
                self.weights_optimiser,
                max_norm=self.settings.clip_norm,
                error_if_nonfinite=False,  # the loss shows it; to ask here waits for the GPU
            )
        self.weights_optimiser.step()

    def train_theta(self, epoch: int, stop: Callable[[], bool]) -> None:
        """Passes over theta's images: each target's theta descends its objective."""
        self.supernet.train().requires_grad_(False)
        tau = self.settings.tau_at(epoch)
        for learner in self.learners:
            for group in learner.optimiser.param_groups:
                group["lr"] = self.settings.theta_lr_at(epoch)
        steps = self.steps(self.theta_images)
        for index in range(self.step // steps, self.settings.theta_passes):
            start = self.step - index * steps
            for images, labels in self.order(
                self.theta_images, epoch, start=start, index=1 + index
            ):
                for learner in self.learners:
                    self.theta_step(learner, images, labels, tau)
                self.finish_step(epoch, stop)

    def theta_step(self, learner: Learner, images: Tensor, labels: Tensor, tau: float) -> None:
        """Let one theta descend its objective on one batch."""
        gates, among = learner.gates(self.settings, tau, len(images) * self.fabric.world_size)
        if gates.dim() == 3:  # every process draws for all images, and uses those of its part
            gates = gates.chunk(self.fabric.world_size)[self.fabric.global_rank]
        with self.fabric.autocast():
            scores = self.supernet(learner.sees(images), gates, among)
        task_loss = self.task.loss(scores.float(), labels)
        loss, costs = learner.loss(task_loss)
        learner.optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        average_gradients_(learner.distribution.parameters(), self.fabric)
        learner.optimiser.step()
        learner.raise_multipliers(costs)
        self.count("theta", task_loss, scores, labels)

    def weights_learner(self, epoch: int) -> Learner:
        """Draw the target at whose resolution, and on whose paths, the weights are trained."""
        resolutions = {learner.distribution.space.resolution for learner in self.learners}
        if self.uniform_paths(epoch) and len(resolutions) == 1:
            return self.learners[0]  # only its resolution is used, which is everyone's
        return self.learners[int(torch.randint(len(self.learners), ()))]

    def uniform_paths(self, epoch: int) -> bool:
        """Whether the weights are trained on uniform paths: while theta sleeps at least."""
        return epoch < self.settings.warmup or self.settings.weights_on == "uniform"

    def weights_gates(self, epoch: int, learner: Learner) -> Tensor | list[int]:
        """A uniform path while theta sleeps; then what the recipe says, for a target."""
        if self.uniform_paths(epoch):
            return self.uniform.sample_path()
        if self.settings.weights_on == "path":
            return learner.distribution.sample_path()
        with torch.no_grad():
            return learner.distribution.gates(self.settings.tau_at(epoch))

    def order(
        self, images: Images, epoch: int, *, start: int, index: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in an order that (seed, epoch, index of the pass) decides, from `start` on."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch * 1_009 + index)
        return batches(
            images,
            min(self.settings.batch_size, len(images)),
            generator=generator,
            device=self.device,
            mean=self.data.mean,
            std=self.data.std,
            augment=self.augment if index == 0 else None,  # theta is judged on images as they are
            drop_last=True,
            start=start,
            part=(self.fabric.global_rank, self.fabric.world_size),
            wait=self.wait,
        )

    def steps(self, images: Images) -> int:
        """Steps in one pass; the last batch is left out unless it is whole."""
        return max(len(images) // self.settings.batch_size, 1)

    def _check_batch_size(self) -> None:
        """Refuse batches that cannot be divided among processes and parts."""
        pieces = self.fabric.world_size * self.settings.accumulate
        for images in (self.weights_images, self.theta_images):
            size = min(self.settings.batch_size, len(images))
            if size % pieces or size // pieces < 2:
                raise InputError(
                    f"a batch of {size} images cannot be divided among {self.fabric.world_size} "
                    f"process(es) and {self.settings.accumulate} part(s) of at least 2 each; "
                    "expected a multiple: change search.batch_size, search.accumulate or "
                    "fabric.devices."
                )

    def progress(self) -> AbstractContextManager[Callable[[int], None]]:
        """The display of all steps; only the first process shows one."""
        if not self.first:
            return nullcontext(lambda steps: None)
        return progress("Searching", total=self.total_steps(), done=self.steps_done())

    def total_steps(self) -> int:
        """Steps of the whole search, for the progress display."""
        return self._steps_before(self.settings.epochs)

    def steps_done(self) -> int:
        """Steps that a resumed search has behind it."""
        weights = self.steps(self.weights_images) if self.phase == "theta" else 0
        return self._steps_before(self.epoch) + weights + self.step

    def _steps_before(self, epoch: int) -> int:
        awake = max(epoch - self.settings.warmup, 0) * self.settings.theta_passes
        return epoch * self.steps(self.weights_images) + awake * self.steps(self.theta_images)

    def set_weights_lr(self, step: int, total: int) -> None:
        for group in self.weights_optimiser.param_groups:
            group["lr"] = self.settings.weights_lr_at(step, total)

    def count(self, part: str, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Sum on the device: no step waits for a number that is only logged."""
        sums = self.sums[part]
        sums[0] += loss.detach().double() * len(labels)
        sums[1] += self.task.metric(scores.detach(), labels).sum()
        sums[2] += len(labels)

    def finish_step(self, epoch: int, stop: Callable[[], bool]) -> None:
        """Count the step; on Ctrl-C, or when minutes have passed, write a checkpoint."""
        self.step += 1
        self.advance(1)
        due = time.monotonic() - self.last_save > self.settings.checkpoint_every_s
        if self.fabric.world_size > 1 and self.steps_done() % AGREE_STEPS:
            return  # counted over all passes: those of a small data set have fewer steps
        interrupted = any_process(stop(), self.fabric)
        if interrupted or any_process(due, self.fabric):
            self.refuse_nan(epoch)
            self.epoch = epoch
            self.save()
        if interrupted:
            raise KeyboardInterrupt

    def refuse_nan(self, epoch: int) -> None:
        """Look before a checkpoint is written: a last step may spoil weights whose loss was fine.

        Raises:
            TrainingDiverged: a loss, the weights or theta are no longer numbers.
        """
        sums_of_all = {part: summed(sums, self.fabric) for part, sums in self.sums.items()}
        found = {f"{part} loss is": [sums[0]] for part, sums in sums_of_all.items()}
        found["supernet's weights are"] = list(self.supernet.state_dict().values())
        found["values of theta are"] = [d.logits for d in self.distributions]
        for subject, tensors in found.items():
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                path = self.out and self.out / "checkpoint.pt"
                kept = f" {path} is kept as it was before." if path and path.exists() else ""
                raise TrainingDiverged(
                    f"The {subject} not a number in epoch {epoch + 1}; expected finite values: "
                    f"lower search.weights_lr ({self.settings.weights_lr}) or search.theta_lr "
                    f"({self.settings.theta_lr}).{kept}"
                )

    def finish_epoch(self, epoch: int) -> dict[str, Any]:
        """Close the epoch: its row of numbers, and the position of the next."""
        self.refuse_nan(epoch)
        seconds = self.epoch_seconds_before + time.monotonic() - self.epoch_started
        row = logbook.epoch_row(
            epoch,
            self.settings,
            self.objective,
            self.learners,
            means=_means({part: summed(sums, self.fabric) for part, sums in self.sums.items()}),
            seconds=seconds,
            data_wait_seconds=self.wait.seconds,
        )
        if self.out is None:
            self.history.append(row)
        if self.first:
            self.watch_for_collapse(epoch)
        self.epoch, self.phase, self.step = epoch + 1, "weights", 0
        self.sums = _no_sums(self.device)
        self.epoch_started, self.epoch_seconds_before = time.monotonic(), 0.0
        self.wait = Wait()
        return row

    def watch_for_collapse(self, epoch: int) -> None:
        """Warn, once a target, where theta chose to skip before it could know."""
        middle = (self.settings.warmup + self.settings.epochs) / 2
        for learner in self.learners:
            skipped, able = learner.distribution.skipped_layers()
            if learner.warned or epoch + 1 > middle or 2 * skipped <= able:
                continue
            learner.warned = True
            log.warning(
                "%s: %d of the %d layers that can skip do so in epoch %d of %d already, before the "
                "weights can tell blocks apart: raise search.warmup_fraction (%.2g) or lower "
                "search.theta_lr (%g).",
                learner.target.name or "The target",
                skipped,
                able,
                epoch + 1,
                self.settings.epochs,
                self.settings.warmup / self.settings.epochs,
                self.settings.theta_lr,
            )

    def save(self) -> None:
        """Replace the checkpoint by everything that the rest of the search depends on."""
        if self.out is not None:
            state = checkpoint.state_of(self)
            if self.writes:
                save_checkpoint(self.writes / "checkpoint.pt", state)
            self.last_save = time.monotonic()

    def restore(self) -> None:
        """Continue from the checkpoint in `out`, if there is one; the first process reads it."""
        if self.out is None:
            return
        path = self.out / "checkpoint.pt"
        state, refusal = None, None
        if self.first and path.exists():
            try:
                state = checkpoint.read(self, path)
            except InputError as error:
                refusal = str(error)
        if self.fabric.world_size > 1:
            state, refusal = self.fabric.broadcast((state, refusal))
        if refusal is not None:
            raise InputError(refusal)
        if state is not None:
            checkpoint.take_up(self, state, path)
            if self.first:
                log.info("resumed at epoch %d of %d", self.epoch + 1, self.settings.epochs)


def _no_sums(device: torch.device) -> dict[str, Tensor]:
    """(summed loss, summed metric, images) of each part of an epoch."""
    return {
        part: torch.zeros(3, dtype=torch.double, device=device) for part in ("weights", "theta")
    }


def _means(sums: dict[str, Tensor]) -> dict[str, tuple[float, float] | None]:
    """(loss, accuracy) of each part, None for a part that saw no image."""
    return {
        part: (float(s[0] / s[2]), float(s[1] / s[2])) if s[2] > 0 else None
        for part, s in sums.items()
    }
