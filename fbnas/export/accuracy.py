"""Top-1 accuracy of an exported file, as the runtime computes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fbnas.errors import InputError
from fbnas.export.session import open_session, run

if TYPE_CHECKING:
    from fbnas.training.data import Images


def accuracy_of_file(
    path: Path | str,
    images: "Images",
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    threads: int | None = None,
) -> float:
    """Return the fraction of images whose highest score is that of their label, 0 to 1.

    Args:
        mean: per channel, for images scaled to [0, 1]; `read_metadata(path)["preprocessing"]` has
            the file's own.
        std: likewise.
        threads: of ONNX Runtime; all cores where not given.

    Raises:
        InputError: not an ONNX file, or one for other images or fewer classes.
    """
    from fbnas.training.data import batches

    if not len(images):
        raise InputError(f"There are no images to judge {path} by; expected at least one.")
    session = open_session(path, threads=threads)
    correct = 0
    for inputs, labels in batches(images, batch_size, mean=mean, std=std):
        scores = run(session, inputs)
        if scores.ndim != 2 or scores.shape[1] <= int(labels.max()):
            raise InputError(
                f"{path}: its scores are {tuple(scores.shape)} and the data has label "
                f"{int(labels.max())}; expected (images, classes) with a score for every class. "
                "Use the data that it was trained on."
            )
        correct += int((scores.argmax(1) == labels).sum())
    return correct / len(images)
