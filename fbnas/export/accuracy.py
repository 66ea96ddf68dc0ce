"""Scores and top-1 accuracy of an exported file, as the runtime computes it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.latency.devices import Device
from fbnas.latency.profiling import AnyDevice
from fbnas.latency.saturation import saturates
from fbnas.latency.session import open_session, run
from fbnas.progress import progress
from fbnas.training.heads import Accuracy, accuracy_by_head, task_of
from fbnas.training.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    from fbnas.training.data import Data, Images


PIECE_BYTES = 128_000_000  # of images that are handed to a device at once


def accuracy_of_file(
    path: Path | str,
    images: "Images",
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    threads: int | None = None,
    device: AnyDevice | None = None,
    task: Task = CLASSIFICATION,
) -> float:
    """Return the fraction of images whose highest score is that of their label, 0 to 1.

    Args:
        mean: per channel, for images scaled to [0, 1]; `read_metadata(path)["preprocessing"]` has
            the file's own.
        std: likewise.
        threads: of ONNX Runtime; all cores where not given.
        device: whose runtime computes the scores; ONNX Runtime on this CPU where not given.
        task: whose metric it is, where that is not classification.

    Raises:
        InputError: not a file of the runtime, or one for other images or fewer classes.
    """
    if not len(images):
        raise InputError(f"There are no images to judge {path} by; expected at least one.")
    correct = 0.0
    answers = _answers(
        Path(path), images, mean, std, batch_size=batch_size, threads=threads, device=device
    )
    for scores, labels in answers:
        correct += float(task.metric(scores, labels).sum())
    return correct / len(images)


def judge_file(
    path: Path | str, data: "Data", images: "Images", *, device: AnyDevice | None = None
) -> Accuracy:
    """Judge a file by some of the images of its data, with the mean and std that it states.

    Args, Raises: as of `accuracy_of_file`.
    """
    task = task_of(data.heads)

    def accuracy(some: "Images") -> float:
        return accuracy_of_file(path, some, mean=data.mean, std=data.std, device=device, task=task)

    return accuracy_by_head(images, data.heads, accuracy)


def scores_of_file(
    path: Path | str,
    images: "Images",
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    threads: int | None = None,
    device: AnyDevice | None = None,
) -> Tensor:
    """Return the scores of images, (n, classes), as the runtime computes them.

    Args, Raises: as of `accuracy_of_file`.
    """
    answers = _answers(
        Path(path), images, mean, std, batch_size=batch_size, threads=threads, device=device
    )
    return torch.cat([scores for scores, _ in answers])


def _answers(
    path: Path,
    images: "Images",
    mean: Sequence[float],
    std: Sequence[float],
    *,
    batch_size: int,
    threads: int | None,
    device: AnyDevice | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores and labels, some images at a time."""
    from fbnas.training.data import batches

    shown = batches(images, batch_size, mean=mean, std=std)
    cut_off_here = device is not None and _is_cut_off_here_alone(path, device)
    if device is None or _is_plain(device) or cut_off_here:
        session = open_session(path, threads=threads, whole_sums=cut_off_here)
        answers: Iterator[tuple[Tensor, Tensor]] = (
            (run(session, inputs), labels) for inputs, labels in shown
        )
    else:
        answers = _pieces(path, shown, device)
    with progress(f"Scoring by {path.name}", total=len(images)) as advance:
        for scores, labels in answers:
            _check_scores(path, scores, labels)
            yield scores, labels
            advance(len(labels))


def _check_scores(path: Path, scores: Tensor, labels: Tensor) -> None:
    """Refuse scores that are not one for every class.

    Raises:
        InputError: what they are and what was expected.
    """
    if scores.ndim != 2 or scores.shape[1] <= int(labels.max()):
        raise InputError(
            f"{path}: its scores are {tuple(scores.shape)} and the data has label "
            f"{int(labels.max())}; expected (images, classes) with a score for every class. "
            "Use the data that it was trained on."
        )


def _pieces(
    path: Path, shown: Iterator[tuple[Tensor, Tensor]], device: AnyDevice
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores and labels in large pieces: each is a process of its own on the device."""
    held: list[tuple[Tensor, Tensor]] = []
    for inputs, labels in shown:
        held.append((inputs, labels))
        if sum(images.nbytes for images, _ in held) >= PIECE_BYTES:
            yield _scored(path, held, device)
            held = []
    if held:
        yield _scored(path, held, device)


def _scored(
    path: Path, held: list[tuple[Tensor, Tensor]], device: AnyDevice
) -> tuple[Tensor, Tensor]:
    inputs, labels = (torch.cat(parts) for parts in zip(*held, strict=True))
    return torch.from_numpy(device.scores(path, inputs.numpy())), labels


def _is_cut_off_here_alone(path: Path, device: AnyDevice) -> bool:
    """Whether this machine would cut off int8 sums of an ONNX file that its device computes whole.

    They are then imitated in float here, or an error that is not the device's would be judged.
    """
    elsewhere = not isinstance(device, Device) or bool(device.host)
    if path.suffix != ".onnx" or not elsewhere:  # nothing is tried for what runs here
        return False
    return saturates(Device()) and not saturates(device)


def _is_plain(device: AnyDevice) -> bool:
    """Whether ONNX Runtime on this CPU, in this process, computes the same."""
    if device.kind == "roofline":
        return True
    return isinstance(device, Device) and (device.runtime, device.provider, device.host) == (
        "onnxruntime",
        "CPU",
        "",
    )
