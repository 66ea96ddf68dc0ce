"""Distillation: a network learns from a teacher's soft labels and, if asked, its feature maps."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbnas.errors import InputError, check_known
from fbnas.modes import modes_kept
from fbnas.training.layout import memory_format

EVERY_CLASS = (slice(None),)  # of one head


@dataclass(frozen=True)
class Distillation:
    """How much a teacher counts, and in what.

        loss = (1 - alpha) CE + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T))
               + feature_weight * mean over layers of 1/2 mean (f_t - r(f_s))^2

    z: scores of teacher and student, both shown the same (augmented) images; T^2 keeps the
    gradients of soft labels as large as those of labels (Hinton et al. 2015, arXiv 1503.02531,
    section 2). With several heads it is the mean of theirs, each among its own classes: an image
    teaches all heads, for the teacher answers it by all. f: feature maps; r: a learned 1x1
    convolution where their widths differ (Romero et al. 2015, FitNets, arXiv 1412.6550, equation 3,
    here trained together with the rest).

    Args:
        alpha: weight of the soft labels, 0 to 1.
        temperature: T.
        feature_weight: weight of the feature maps; 0 leaves them out.
        layers: names of modules whose outputs (n, c, h, w) are compared, as NAME, or NAME:TEACHERS
            where the teacher's has another; none: the last feature map before the classifier.

    Raises:
        InputError: a value out of its range.
    """

    alpha: float = 0.5
    temperature: float = 4.0
    feature_weight: float = 0.0
    layers: Sequence[str] = ()

    def __post_init__(self) -> None:
        ranges = {
            "alpha": (0 <= self.alpha <= 1, "from 0 (labels alone) to 1 (the teacher alone)"),
            "temperature": (0 < self.temperature < math.inf, "more than 0"),
            "feature_weight": (0 <= self.feature_weight < math.inf, "0 (off) or more"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise InputError(
                    f"distillation.{name} is {getattr(self, name)}; expected {expected}."
                )
        if isinstance(self.layers, str) or (self.layers and not self.feature_weight):
            raise InputError(
                f"distillation.layers is {self.layers} and feature_weight {self.feature_weight:g}; "
                "expected a list of names, and a weight of more than 0 for them."
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Distillation":
        """Build it from a mapping; an unknown key is refused with the closest known one."""
        check_known("option of distillation:", content, [f.name for f in fields(cls)])
        return cls(**content)


class Ensemble(nn.Module):
    """Several networks as one: its probabilities are the mean of theirs.

    Raises:
        InputError: no network.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise InputError("An ensemble of no networks; expected at least one.")
        self.members = nn.ModuleList(members)

    def probabilities(
        self, images: Tensor, temperature: float = 1.0, heads: Sequence[slice] = ()
    ) -> Tensor:
        """Return mean_i softmax(z_i / T), (n, classes)."""
        soft = [probabilities(member, images, temperature, heads) for member in self.members]
        return torch.stack(soft).mean(0)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (n, classes): the logarithm of the mean probabilities."""
        return self.probabilities(images).log()


def probabilities(
    teacher: nn.Module, images: Tensor, temperature: float = 1.0, heads: Sequence[slice] = ()
) -> Tensor:
    """Return softmax(z / T) of a network, or the mean of those of an ensemble: (n, classes).

    Args:
        heads: where each head's classes lie, whose probabilities then add up to 1; none: one head.
    """
    if isinstance(teacher, Ensemble):
        return teacher.probabilities(images, temperature, heads)
    scores: Tensor = teacher(images).float() / temperature
    return torch.cat([scores[:, rows].softmax(1) for rows in heads or EVERY_CLASS], dim=1)


def soft_label_loss(
    scores: Tensor, soft: Tensor, temperature: float, heads: Sequence[slice] = ()
) -> Tensor:
    """Return T^2 KL(soft || softmax(scores / T)), the mean over images, and over heads.

    Args:
        scores: (n, classes), the student's.
        soft: (n, classes), the teacher's probabilities at the same temperature.
        heads: as of `probabilities`.
    """
    heads, scores = heads or EVERY_CLASS, scores / temperature
    student = torch.cat([scores[:, rows].log_softmax(1) for rows in heads], dim=1)
    return temperature**2 * F.kl_div(student, soft, reduction="batchmean") / len(heads)


class Teaching:
    """A teacher in front of a network: what it says of a batch, and what is trained beside it.

    The teacher is copied to the network's device, in eval mode; it is never trained.

    Args:
        image: (1, c, h, w), like those that both are shown.
        classes: of the data.
        heads: as of `probabilities`.

    Raises:
        InputError: the teacher takes no such images, has other classes, or lacks a layer.
    """

    def __init__(
        self,
        teacher: nn.Module,
        network: nn.Module,
        how: Distillation,
        image: Tensor,
        classes: int,
        *,
        heads: Sequence[slice] = (),
    ) -> None:
        self.how, self.heads = how, heads
        self.digest = _digest(teacher)
        self.teacher = deepcopy(teacher).requires_grad_(False).eval()
        self.teacher.to(image.device, memory_format=memory_format(image.device))  # type: ignore[call-overload]
        self.network = network
        _check_scores(self.teacher, image, classes)
        self.pairs = _pairs(network, self.teacher, how, image) if how.feature_weight else []
        self.regressors = nn.ModuleList(
            nn.Conv2d(ours[1], theirs[1], 1) if ours[1] != theirs[1] else nn.Identity()
            for _, ours, _, theirs in self.pairs
        ).to(image.device)
        self.seen: dict[str, Tensor] = {}  # the network's feature maps of the batch under way

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the network's feature maps down while the block trains it."""
        with _noted(self.network, [name for name, _, _, _ in self.pairs], self.seen):
            yield

    def identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to equal an uninterrupted one."""
        return {**asdict(self.how), "layers": list(self.how.layers), "teacher": self.digest}

    def loss(self, labelled: Tensor, scores: Tensor, images: Tensor) -> Tensor:
        """Return the loss of the batch that the network has just been shown.

        Args:
            labelled: its cross-entropy with the labels.
            scores: (n, classes), its own.
            images: (n, c, h, w), the same.
        """
        theirs: dict[str, Tensor] = {}
        with torch.no_grad(), _noted(self.teacher, [name for _, _, name, _ in self.pairs], theirs):
            soft = probabilities(self.teacher, images, self.how.temperature, self.heads)
        softened = soft_label_loss(scores, soft, self.how.temperature, self.heads)
        loss = (1 - self.how.alpha) * labelled + self.how.alpha * softened
        if self.pairs:
            losses = [
                feature_loss(regress(self.seen[ours].float()), theirs[name].float())
                for (ours, _, name, _), regress in zip(self.pairs, self.regressors, strict=True)
            ]
            loss = loss + self.how.feature_weight * torch.stack(losses).mean()
        return loss


def feature_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return 1/2 mean (f_t - f_s)^2 of maps (n, c, h, w); the larger one is averaged down."""
    size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
    ours, theirs = (F.adaptive_avg_pool2d(maps, size) for maps in (ours, theirs))
    return F.mse_loss(ours, theirs) / 2


Shape = tuple[int, ...]


def _pairs(
    network: nn.Module, teacher: nn.Module, how: Distillation, image: Tensor
) -> list[tuple[str, Shape, str, Shape]]:
    """Names and shapes of the feature maps that are compared, the network's and the teacher's."""
    if isinstance(teacher, Ensemble):
        raise InputError(
            "The teacher is an ensemble, whose members have feature maps of their own; expected "
            "one network, or distillation.feature_weight=0."
        )
    ours, theirs = _maps(network, image), _maps(teacher, image)
    named = [layer.partition(":") for layer in how.layers]
    wanted = [(mine, other or mine) for mine, _, other in named] or [(_last(ours), _last(theirs))]
    for found, names in zip((ours, theirs), zip(*wanted, strict=True), strict=True):
        check_known("layer with a feature map:", names, found)
    return [(mine, ours[mine], other, theirs[other]) for mine, other in wanted]


def _maps(network: nn.Module, image: Tensor) -> dict[str, Shape]:
    """Shapes of the outputs (n, c, h, w) of all modules by name, in the order of their ends."""
    seen: dict[str, Tensor] = {}
    every = [name for name, _ in network.named_modules()]
    with torch.no_grad(), modes_kept(network), _noted(network, every, seen):
        network.eval()(image)
    return {name: tuple(maps.shape) for name, maps in seen.items() if maps.ndim == 4}


def _last(maps: Mapping[str, Shape]) -> str:
    """The last map that is one: pooling to a single place comes after it."""
    wide = [name for name, shape in maps.items() if shape[2] * shape[3] > 1]
    found = wide or list(maps)
    if not found:
        raise InputError(
            "The network has no feature maps (n, c, h, w); expected one, or "
            "distillation.feature_weight=0."
        )
    return found[-1]


@contextmanager
def _noted(network: nn.Module, names: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep the outputs of modules in `seen`, by name, while the block runs the network."""
    modules = dict(network.named_modules())

    def noting(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.pop(name, None)
                seen[name] = output

        return note

    hooks = [modules[name].register_forward_hook(noting(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_scores(teacher: nn.Module, image: Tensor, classes: int) -> None:
    try:
        with torch.no_grad():
            shape = tuple(teacher(image).shape)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"The teacher cannot take images of {tuple(image.shape[1:])} ({reason}); expected one "
            "that was trained on such images."
        ) from error
    if shape != (1, classes):
        raise InputError(
            f"The teacher answers an image with scores of shape {shape[1:]}, the data has "
            f"{classes} classes; expected a score for each of them."
        )


def _digest(teacher: nn.Module) -> str:
    """Return what tells teachers of different weights apart."""
    whole = hashlib.sha256()
    for name, value in teacher.state_dict().items():
        whole.update(name.encode())
        whole.update(value.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]
