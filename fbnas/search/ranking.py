"""Architectures ranked by how well the shared weights do on images they were not trained on."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fbnas.progress import progress
from fbnas.search.folding import Folded, folded, tracked
from fbnas.search.supernet import MixedBlock, Path, Supernet
from fbnas.space.architecture import Architecture
from fbnas.training.allocator import memory_kept
from fbnas.training.data import Data, Images, Subset, batches, split_for_search
from fbnas.training.evaluation import recalibrate_bn
from fbnas.training.layout import memory_format

BATCH = 256

Statistics = dict[Path, list[Tensor]]  # mean and variance of each BN of the part that steps end on


@dataclass(frozen=True)
class Ranked:
    """An architecture with its cross-entropy (nats) and accuracy (0 to 1) by the shared weights."""

    architecture: Architecture
    cross_entropy: float
    accuracy: float

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: by accuracy, and by cross-entropy where that is equal."""
        return -self.accuracy, self.cross_entropy


def rank_by_shared_weights(
    supernet: Supernet,
    architectures: Sequence[Architecture],
    data: Data,
    *,
    weights_fraction: float = 0.8,
    seed: int = 0,
    calibration_images: int = 512,
    held_out_images: int = 2048,
    device: str | torch.device | None = None,
) -> list[Ranked]:
    """Rank by accuracy on theta's part of the training images, best first.

    `SharedWeightsJudge` says how; use it where more than one list is to be ranked.
    """
    judge = SharedWeightsJudge(
        supernet,
        data,
        weights_fraction=weights_fraction,
        seed=seed,
        calibration_images=calibration_images,
        held_out_images=held_out_images,
        device=device,
    )
    return judge(architectures)


class SharedWeightsJudge:
    """Ranks architectures by the shared weights, and remembers those that it has judged.

    The statistics of batch normalisation in a supernet are those of a mixture, so each network's
    own are estimated first, on the weights' part of the training images. What counts is accuracy on
    theta's part: against the truth of 324 networks its Kendall correlation within a budget is 0.46
    for weights trained by the default recipe, that of cross-entropy 0.25 (scripts/ground_truth).

    No network is built: images run through the shared blocks. What a block makes of them, and its
    statistics, depend only on the blocks before it, so what the beginnings of two architectures
    have in common is computed once; the numbers are those of each network by itself.

    Args:
        supernet: it is copied, and stays as it is.
        data: the search's.
        weights_fraction: the search's; with `seed` it decides the split.
        seed: the search's.
        calibration_images: at most so many, for the statistics; 0 leaves the supernet's own, of a
            mixture of networks.
        held_out_images: at most so many, for cross-entropy and accuracy.
        device: where images run through the copy; the supernet's own by default.
    """

    def __init__(
        self,
        supernet: Supernet,
        data: Data,
        *,
        weights_fraction: float = 0.8,
        seed: int = 0,
        calibration_images: int = 512,
        held_out_images: int = 2048,
        device: str | torch.device | None = None,
    ) -> None:
        self.supernet = deepcopy(supernet).requires_grad_(False).eval()
        # as the batches are: an eval step on CPU takes half the time so
        self.device = torch.device(device or next(supernet.parameters()).device)
        self.supernet.to(self.device, memory_format=memory_format(self.device))  # type: ignore[call-overload]
        self.data = data
        weights_images, theta_images = split_for_search(
            data.train, fraction=weights_fraction, seed=seed
        )
        self.calibration = _some(weights_images, calibration_images, seed)
        self.held_out = _some(theta_images, held_out_images, seed)
        self.known: dict[Path, tuple[float, float]] = {}  # cross-entropy, accuracy
        self.folded: dict[tuple[int, int], Folded] = {}  # by depth and choice
        self.own: dict[tuple[int, int], list[Tensor]] = {}  # likewise

    def __call__(self, architectures: Sequence[Architecture]) -> list[Ranked]:
        """Return the architectures best first; those judged before cost nothing.

        Raises:
            InputError: an architecture of another space.
        """
        paths = [tuple(a.path(self.supernet.space)) for a in architectures]
        new = sorted(set(paths) - self.known.keys())
        if new:
            self._judge(new)
        ranked = [
            Ranked(architecture, *self.known[path])
            for architecture, path in zip(architectures, paths, strict=True)
        ]
        return sorted(ranked, key=lambda r: r.rank)

    @torch.inference_mode()
    def _judge(self, paths: Sequence[Path]) -> None:
        """Add `paths`, sorted and distinct, to those known."""
        passes = sum(-(-len(images) // BATCH) for images in (self.calibration, self.held_out))
        with (
            memory_kept(self.device),
            progress("Ranking with the shared weights", total=passes * len(paths)) as advance,
        ):
            statistics = self._statistics(paths, advance) if len(self.calibration) else None

            def run(steps: Path, part: nn.Module, features: Tensor) -> Tensor:
                place = (len(steps), steps[-1])
                found = self._own(place, part) if statistics is None else statistics[steps]
                if place not in self.folded:  # built once for all that come to it
                    self.folded[place] = folded(part, features, found)
                return self.folded[place](features, found)

            # of cross-entropy and right answers; on the device, so that no network waits for them
            sums = torch.zeros(len(paths), 2, dtype=torch.double, device=self.device)
            for images, labels in self._batches(self.held_out):
                for row, scores in zip(sums, self._scores(paths, images, run), strict=True):
                    row[0] += functional.cross_entropy(scores, labels, reduction="sum")
                    row[1] += (scores.argmax(1) == labels).sum()
                    advance(1)
        for path, (loss, right) in zip(paths, (sums / len(self.held_out)).tolist(), strict=True):
            self.known[path] = (loss, right)

    def _statistics(self, paths: Sequence[Path], advance: Callable[[int], None]) -> Statistics:
        """Return the plain mean over the calibration batches, as `recalibrate_bn` takes it."""
        sums: Statistics = {}

        def run(steps: Path, part: nn.Module, features: Tensor) -> Tensor:
            output, found = _estimated(part, features)
            so_far = sums.setdefault(steps, found)
            if so_far is not found:
                for total, value in zip(so_far, found, strict=True):
                    total.add_(value)
            return output

        count = 0
        for images, _ in self._batches(self.calibration):
            for _ in self._scores(paths, images, run):
                advance(1)
            count += 1
        return {steps: [total / count for total in totals] for steps, totals in sums.items()}

    def _scores(
        self,
        paths: Sequence[Path],
        images: Tensor,
        run: Callable[[Path, nn.Module, Tensor], Tensor],
    ) -> Iterator[Tensor]:
        """Yield each path's scores, (n, classes); `run(steps so far, part, features)` runs a part.

        The features of the path before are kept as far as the next one goes the same way: at most
        one batch of features per layer.
        """
        before: Path = ()
        features = [images]
        for path in paths:
            steps = (0, *path, 0)  # stem, a block per layer, head
            pairs = enumerate(zip(before, steps, strict=False))
            same = next((depth for depth, (a, b) in pairs if a != b), 0)
            del features[same + 1 :]
            for depth in range(same, len(steps)):
                part = self._part(depth, steps[depth])
                features.append(run(steps[: depth + 1], part, features[-1]))
            before = steps
            yield self.supernet.classifier(features[-1])

    def _own(self, place: tuple[int, int], part: nn.Module) -> list[Tensor]:
        """The statistics that the supernet itself holds; the same object at each call."""
        if place not in self.own:
            self.own[place] = _buffers(part)
        return self.own[place]

    def _part(self, depth: int, choice: int) -> nn.Module:
        if depth == 0:
            return self.supernet.stem
        if depth > len(self.supernet.layers):
            return self.supernet.head
        mixed = self.supernet.layers[depth - 1]
        assert isinstance(mixed, MixedBlock)
        return mixed.branch(choice)

    def _batches(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        parts = math.ceil(len(images) / BATCH)
        size = math.ceil(len(images) / parts)  # even ones: a last one of few has odd statistics
        return batches(images, size, mean=self.data.mean, std=self.data.std, device=self.device)


def _estimated(part: nn.Module, features: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run a part on its own batch statistics; return its output and them."""
    outputs: list[Tensor] = []
    recalibrate_bn(part, lambda x: outputs.append(part(x)), [(features, features)])
    return outputs[0], [buffer.clone() for buffer in _buffers(part)]


def _buffers(part: nn.Module) -> list[Tensor]:
    """Mean and variance of each batch normalisation in a part, in turn."""
    return [x for m in tracked(part) for x in (m.running_mean, m.running_var) if x is not None]


def _some(images: Images, limit: int, seed: int) -> Subset:
    """At most `limit` images in a random order: a batch of theirs, by class, has odd statistics."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Subset(images, order[:limit])
