"""The alternating loop: weights on one part of the training images, theta on the other."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fbnas.errors import InputError
from fbnas.progress import progress
from fbnas.search import checkpoint, logbook
from fbnas.search.distribution import ArchitectureDistribution
from fbnas.search.objectives import DualAscent, Objective
from fbnas.search.selection import Limit, check_budget, check_limits, latency_range
from fbnas.search.settings import SearchSettings
from fbnas.search.supernet import Supernet
from fbnas.search.target import Target
from fbnas.space.search_space import SearchSpace
from fbnas.training.augmentation import build_augmentation
from fbnas.training.data import Data, Images, batches, split_for_search
from fbnas.training.interrupt import stop_on_signal
from fbnas.training.schedules import cosine
from fbnas.training.settings import choose_device
from fbnas.training.state import TrainingDiverged

log = logging.getLogger(__name__)


@dataclass
class Learner:
    """One target's theta: its distribution, optimiser, lambdas, and what blocks cost there.

    `limits` are all known costs, latency first; `multipliers` hold a lambda per budget of a sum.
    """

    target: Target
    distribution: ArchitectureDistribution
    optimiser: torch.optim.Optimizer
    limits: tuple[Limit, ...]
    multipliers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sums = [limit for limit in self.limits if limit.bounded and limit.kind == "sum"]
        self.first = sums[0] if sums else None  # the one that the objective acts on
        self.further = sums[1:]
        self.multipliers = {limit.name: 0.0 for limit in sums}

    @property
    def latency_ms(self) -> Tensor:
        """(layers, blocks), nan where a block is not offered."""
        return self.limits[0].cost

    @property
    def base_ms(self) -> float:
        """What every network takes."""
        return self.limits[0].base

    def expected(self, limit: Limit) -> Tensor:
        """E[cost] of the whole network in the limit's unit, differentiable in theta."""
        return self.distribution.expected(limit.cost, base=limit.base)


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
) -> SearchResult:
    """Learn theta for each target, and the weights that all share.

    min over theta, min over w of E_{a ~ P_theta} L(a, w_a)  (Wu et al. 2019, equations 3 and 7):
    each epoch trains w by SGD on 80 % of the training images, then theta by Adam on the other 20 %.
    The test images are never read.

    Args:
        space: what may be chosen.
        data: where the training images come from.
        targets: a table and budgets each; every target learns its own theta.
        objective: how cross-entropy and latency combine in theta's loss; `DualAscent()` by default.
        settings: the recipe.
        seed: the same seed gives the same numbers on CPU.
        out: folder for checkpoint, metrics.jsonl, TensorBoard, theta.json and the shared weights.
        resume: continue from the checkpoint in `out`, if there is one.
        on_epoch: called with each epoch's row.

    Raises:
        InputError: a budget that the space cannot meet, a latency for which the objective is
            undefined, a checkpoint of another search, or a loss that is no longer a number.
        KeyboardInterrupt: on Ctrl-C, after the checkpoint was written.
    """
    loop = Loop(
        space,
        data,
        targets,
        objective=objective or DualAscent(),
        settings=settings or SearchSettings(),
        seed=seed,
        out=out,
    )
    if resume:
        loop.restore()
    elif loop.out:  # nobody shall resume from what an older search left
        (loop.out / "checkpoint.pt").unlink(missing_ok=True)
    with (
        stop_on_signal() as stop,
        logbook.open_logbook(loop.out, loop.history) as book,
        progress("Searching", total=loop.total_steps()) as loop.advance,
    ):
        loop.advance(loop.steps_done())
        for epoch in range(loop.epoch, loop.settings.epochs):
            loop.train_weights(epoch, stop)
            if epoch >= loop.settings.warmup:
                loop.train_theta(epoch, stop)
            row = loop.finish_epoch(epoch)
            book.write(row, loop.distributions)
            loop.save()
            if on_epoch:
                on_epoch(row)
    if loop.out:
        logbook.write_result(loop.out, space, loop.learners, loop.supernet)
    seconds = sum(row["seconds"] for row in loop.history)
    return SearchResult(loop.distributions, loop.supernet, list(targets), loop.history, seconds)


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
    ) -> None:
        if not targets:
            raise InputError("A search needs a target: a latency table and a budget, as target_ms.")
        torch.manual_seed(seed)
        self.settings, self.objective, self.data, self.seed = settings, objective, data, seed
        self.out = Path(out) if out else None
        self.device = choose_device(settings.device)
        self.supernet = Supernet(space, classes=data.classes)
        # as the batches are: training steps of FBNets take 0.6 of the time so (batches())
        self.supernet.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights_optimiser = torch.optim.SGD(
            self.supernet.parameters(),
            lr=settings.weights_lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.learners = [
            _learner(space, data.classes, target, objective, settings) for target in targets
        ]
        self.ascent = objective if isinstance(objective, DualAscent) else DualAscent()
        allowed = torch.stack([learner.distribution.offered.cpu() for learner in self.learners])
        self.uniform = ArchitectureDistribution(space, allowed.any(dim=0))
        self.weights_images, self.theta_images = split_for_search(
            data.train, fraction=settings.weights_fraction, seed=seed
        )
        self.augment = build_augmentation(**settings.augment) if settings.augment else None
        self.epoch, self.phase, self.step = 0, "weights", 0
        self.sums = _no_sums(self.device)
        self.history: list[dict[str, Any]] = []
        self.epoch_started = self.last_save = time.monotonic()
        self.epoch_seconds_before = 0.0
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
            scores = self.supernet(images, self.weights_gates(epoch))
            loss = functional.cross_entropy(scores, labels)
            self.weights_optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.weights_optimiser.step()
            self.count("weights", loss, scores, labels)
            self.finish_step(epoch, stop)
        self.phase, self.step = "theta", 0

    def train_theta(self, epoch: int, stop: Callable[[], bool]) -> None:
        """Passes over theta's images: each target's theta descends its objective."""
        self.supernet.train().requires_grad_(False)
        tau = self.settings.tau_at(epoch)
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
        gates = learner.distribution.gates(tau, hard=self.settings.gates == "hard")
        scores = self.supernet(images, gates)
        cross_entropy = functional.cross_entropy(scores, labels)
        costs = {limit.name: learner.expected(limit) for limit in learner.further}
        loss = cross_entropy
        if learner.first is not None:
            costs[learner.first.name] = learner.expected(learner.first)
            loss = self.objective.loss(
                cross_entropy,
                costs[learner.first.name],
                budget_ms=learner.first.budget,
                multiplier=learner.multipliers[learner.first.name],
            )
        for limit in learner.further:
            loss = loss + self.ascent.further_loss(
                costs[limit.name],
                budget=limit.budget,
                multiplier=learner.multipliers[limit.name],
            )
        learner.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        learner.optimiser.step()
        self.raise_multipliers(learner, {k: float(v.detach()) for k, v in costs.items()})
        self.count("theta", cross_entropy, scores, labels)

    def raise_multipliers(self, learner: Learner, costs: dict[str, float]) -> None:
        """Let every lambda follow what its expected cost was before the step."""
        for limit in learner.further:
            learner.multipliers[limit.name] = self.ascent.next_multiplier(
                learner.multipliers[limit.name], costs[limit.name], limit.budget
            )
        if learner.first is not None:
            name, budget = learner.first.name, learner.first.budget
            learner.multipliers[name] = self.objective.next_multiplier(
                learner.multipliers[name], costs[name], budget
            )

    def weights_gates(self, epoch: int) -> Tensor | list[int]:
        """A uniform path while theta sleeps; then what the recipe says, for one of the targets."""
        if epoch < self.settings.warmup or self.settings.weights_on == "uniform":
            return self.uniform.sample_path()
        learner = self.learners[int(torch.randint(len(self.learners), ()))]
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
        )

    def steps(self, images: Images) -> int:
        """Steps in one pass; the last batch is left out unless it is whole."""
        return max(len(images) // self.settings.batch_size, 1)

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
            group["lr"] = self.settings.weights_lr * cosine(step, total)

    def count(self, part: str, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        """Sum on the device: no step waits for a number that is only logged."""
        sums = self.sums[part]
        sums[0] += loss.detach().double() * len(labels)
        sums[1] += (scores.detach().argmax(1) == labels).sum()
        sums[2] += len(labels)

    def finish_step(self, epoch: int, stop: Callable[[], bool]) -> None:
        """Count the step; on Ctrl-C, or when minutes have passed, write a checkpoint."""
        self.step += 1
        self.advance(1)
        interrupted = stop()
        if interrupted or time.monotonic() - self.last_save > self.settings.checkpoint_every_s:
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
        found = {f"{part} loss is": [sums[0]] for part, sums in self.sums.items()}
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
            means=_means(self.sums),
            seconds=seconds,
        )
        self.history.append(row)
        self.epoch, self.phase, self.step = epoch + 1, "weights", 0
        self.sums = _no_sums(self.device)
        self.epoch_started, self.epoch_seconds_before = time.monotonic(), 0.0
        return row

    def save(self) -> None:
        """Replace the checkpoint by everything that the rest of the search depends on."""
        if self.out is not None:
            checkpoint.write(self, self.out / "checkpoint.pt")
            self.last_save = time.monotonic()

    def restore(self) -> None:
        """Continue from the checkpoint in `out`, if there is one."""
        if self.out is not None and (self.out / "checkpoint.pt").exists():
            checkpoint.read(self, self.out / "checkpoint.pt")
            log.info("resumed at epoch %d of %d", self.epoch + 1, self.settings.epochs)


def _learner(
    space: SearchSpace, classes: int, target: Target, objective: Objective, settings: SearchSettings
) -> Learner:
    """Start a target's theta; it never offers a block that a budget of a maximum forbids.

    Raises:
        InputError: a budget or a latency that nothing can be learned for.
    """
    limits = target.limits(space, classes)
    latency_ms, base_ms = limits[0].cost, limits[0].base
    if target.budget_ms is not None:
        check_budget(target.budget_ms, latency_ms, base_ms)
    check_limits(limits)
    fastest_ms = latency_range(latency_ms, base_ms)[0]
    objective.check(None if target.budget_ms is None else fastest_ms)
    device = choose_device(settings.device)
    allowed = torch.stack([limit.offered() for limit in limits]).all(dim=0)
    distribution = ArchitectureDistribution(space, allowed).to(device)
    adam = torch.optim.Adam(
        distribution.parameters(), lr=settings.theta_lr, weight_decay=settings.theta_weight_decay
    )
    on_device = tuple(replace(limit, cost=limit.cost.to(device)) for limit in limits)
    return Learner(target, distribution, adam, on_device)


def _no_sums(device: torch.device) -> dict[str, Tensor]:
    """(summed loss, right answers, images) of each part of an epoch."""
    return {
        part: torch.zeros(3, dtype=torch.double, device=device) for part in ("weights", "theta")
    }


def _means(sums: dict[str, Tensor]) -> dict[str, tuple[float, float] | None]:
    """(loss, accuracy) of each part, None for a part that saw no image."""
    return {
        part: (float(s[0] / s[2]), float(s[1] / s[2])) if s[2] > 0 else None
        for part, s in sums.items()
    }
