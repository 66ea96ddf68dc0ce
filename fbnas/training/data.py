"""From a source to training, validation and test images, and from those to batches."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from fbnas.errors import InputError, unknown
from fbnas.space.search_space import SearchSpace
from fbnas.training.augmentation import Augment
from fbnas.training.images import FileImages, Images, Subset, TensorImages
from fbnas.training.layout import memory_format
from fbnas.training.processes import part_of
from fbnas.training.reading import Wait, read
from fbnas.training.sources import SOURCES, Source

__all__ = ["Data", "Images", "Subset", "TensorImages", "batches", "load_data", "split_for_search"]

log = logging.getLogger(__name__)

STATISTICS_IMAGES = 2000  # mean and std of so many are within 1 % of those of all of CIFAR-10
NAMED = 3  # images that cannot be read, beside the first
HEADERS_READ = 64  # images asked for their size and colour mode before anything is decoded


@dataclass(frozen=True)
class Data:
    """A dataset as one run sees it.

    `mean` and `std` are per channel, of training images in [0, 1]. `load_test` hands out the test
    images on the first access of `test`, which only the final evaluation makes. `heads`: of the
    data of several, the names of each one's classes; labels count through those of all.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    resolution: int
    train: Images
    validation: Images
    load_test: Callable[[], Images]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def test(self) -> Images:
        return self.load_test()


def load_data(
    source: str = "digits",
    *,
    path: str | None = None,
    resolution: int | None = None,
    resize: bool = False,
    channels: int | None = None,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.2,
    limit: int | None = None,
    seed: int = 0,
    memory_mb: float = 2048,
    device_mb: float = 2048,
    workers: int | None = None,
    space: SearchSpace | None = None,
) -> Data:
    """Load a dataset, read its resolution, channels and classes, and split it.

    Splits the source does not hold are taken from its training images, class by class, by `seed`:
    first the test set, then, after `limit`, the validation set. `limit`: keep so many training
    images (the first of a seeded order in which every class advances evenly). `resize`: scale and
    crop to `resolution` (default: the space's). `memory_mb`: decode lazily where more would be
    needed. `device_mb`: where decoded images need no more, all splits together, an accelerator
    keeps those that it is to see. `workers`: processes that decode lazily, 0 for threads; None: 0
    for steps on the CPU, min(8, cores) for an accelerator.

    Raises:
        InputError: an unknown source, unreadable data (of decoded images all are named at once), or
            data that does not fit the space.
    """
    if source not in SOURCES:
        raise unknown("data source", source, SOURCES)
    _check_options(resolution, channels, validation_fraction, test_fraction, limit)
    _check_reading(device_mb, workers)
    raw = SOURCES[source](path)
    _check_classes(raw)
    splits = _split(raw, validation_fraction, test_fraction, limit, seed)
    resolution, channels = _shape(splits, resolution, resize, channels, space)
    splits = {
        name: replace(
            images, resolution=resolution, channels=channels, resize=resize, workers=workers
        )
        for name, images in splits.items()
    }
    decoded_mb = sum(map(len, splits.values())) * channels * resolution**2 / 2**20
    lazy = decoded_mb > memory_mb
    if lazy:
        log.info(
            "%s needs %.0f MB decoded: images are decoded batch by batch.", raw.name, decoded_mb
        )

    held: Mapping[str, Images] = splits
    if not lazy:
        held = _decoded(splits, resident=decoded_mb <= device_mb)
    mean, std = statistics(held["train"], seed)
    return Data(
        name=raw.name,
        class_names=raw.class_names,
        channels=channels,
        resolution=resolution,
        train=held["train"],
        validation=held["validation"],
        load_test=lambda: held["test"],
        mean=mean,
        std=std,
    )


def _decoded(splits: Mapping[str, FileImages], *, resident: bool) -> dict[str, Images]:
    """Decode all splits, the test split too: what cannot be read must not show hours later."""
    found: dict[str, Images] = {}
    refused: list[tuple[str, InputError]] = []
    for name, images in splits.items():
        try:
            found[name] = replace(images.decoded(f"Reading {name} images"), resident=resident)
        except InputError:
            refused += _refused(images, lambda each, i: each.batch(torch.tensor([i])))
    if refused:
        raise _refusal(refused)
    return found


def _refused(
    images: FileImages, read: Callable[[FileImages, int], Any]
) -> list[tuple[str, InputError]]:
    """Return the name of each image that cannot be read, with the reason."""
    found = []
    for index in range(len(images)):
        try:
            read(images, index)
        except InputError as error:
            found.append((images.where(index), error))
    return found


def _refusal(refused: Sequence[tuple[str, InputError]]) -> InputError:
    """Build the error for images that cannot be read: the first one's, and the names of others."""
    (_, first), *others = refused
    if not others:
        return first
    names = ", ".join(name for name, _ in others[:NAMED])
    more = ", ..." if len(others) > NAMED else ""
    return InputError(f"{first} The same holds for {len(others)} more: {names}{more}")


def split_for_search(
    images: Images,
    fraction: float = 0.8,
    *,
    seed: int = 0,
    strata: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Subset, Subset]:
    """Return two views of the training images, class by class: for the weights and for theta.

    Args:
        strata: from labels to what is to be spread evenly, for labels that are no classes.
    """
    labels = images.labels if strata is None else strata(images.labels)
    weights, theta = stratified_split(labels, fraction, seed)
    return Subset(images, weights), Subset(images, theta)


def batches(
    images: Images,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
    mean: Sequence[float],
    std: Sequence[float],
    augment: Augment | None = None,
    drop_last: bool = False,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
    wait: Wait | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (b, c, R, R) normalised float images and (b,) labels, once over all images.

    x = (augment(pixels / 255) - mean) / std, channels last in memory (1.6 to 1.8 times faster
    training steps of FBNets on CPU). `generator`: draws the order; None keeps the images' own.
    `start`: leave out so many batches at the beginning of that same order, to go on in the middle
    of an epoch. `part`: (rank, processes), of which each sees its part of every batch. `wait`:
    takes up the time spent waiting for pixels.

    Nothing but pixels that do not fit on the device is copied there batch by batch.
    """
    device = torch.device(device)
    images = images.on(device)
    count = len(images)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    if drop_last and count > batch_size:
        order = order[: count - count % batch_size]
    order = order.to(images.labels.device)
    chunks, labels = (
        [part_of(piece, *part) for piece in whole.split(batch_size)[start:]]
        for whole in (order, images.labels[order].to(device))
    )
    centre, scale = (_per_channel(tuple(values), device) for values in (mean, std))
    pixels_ahead = read(images, chunks, device, processes=part[1], wait=wait)
    for pixels, y in zip(pixels_ahead, labels, strict=True):
        x = pixels.to(device, non_blocking=True).float().div_(255)
        if augment is not None:
            x = augment(x)
        x = x.sub(centre).div_(scale)
        yield x.contiguous(memory_format=memory_format(device)), y


@cache
@torch.inference_mode(False)  # whoever asks first, it is for all
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices of `fraction` of each class and of the rest, at least one per class in each.

    Raises:
        InputError: a class has a single image.
    """
    order = stratified_order(labels, seed)
    first, second = [], []
    for label in labels.unique().tolist():
        members = order[labels[order] == label]
        if len(members) < 2:
            raise InputError(
                f"class {label} (counted from 0) has 1 image where a split needs 2; expected "
                "images of every class in every split. Add images, or raise data.limit."
            )
        cut = min(max(round(fraction * len(members)), 1), len(members) - 1)
        first.append(members[:cut])
        second.append(members[cut:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return a seeded order of all indices in which every class advances at its own share."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        rank[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return rank.argsort(stable=True)


def _split(
    raw: Source, validation_fraction: float, test_fraction: float, limit: int | None, seed: int
) -> dict[str, FileImages]:
    splits = dict(raw.splits)
    if "test" not in splits:
        if "validation" in splits:
            log.info("%s has no test split: %g of train is held out.", raw.name, test_fraction)
        test, rest = stratified_split(splits["train"].labels, test_fraction, seed)
        splits["test"], splits["train"] = splits["train"].select(test), splits["train"].select(rest)
    if limit is not None and limit < len(splits["train"]):
        kept = stratified_order(splits["train"].labels, seed)[:limit].sort().values
        splits["train"] = splits["train"].select(kept)
        _check_classes(replace(raw, splits=splits), f" after data.limit={limit}; raise it")
    if "validation" not in splits:
        # Another seed than the test split's, so that the two draws are independent.
        part, rest = stratified_split(splits["train"].labels, validation_fraction, seed + 1)
        splits["validation"] = splits["train"].select(part)
        splits["train"] = splits["train"].select(rest)
    return splits


def _check_classes(source: Source, hint: str = "") -> None:
    names = source.class_names
    if len(names) < 2:
        raise InputError(
            f"{source.name}: only one class ({', '.join(names)}); expected at least two. Give the "
            "folder or file that holds all classes."
        )
    for split, images in source.splits.items():
        present = torch.bincount(images.labels, minlength=len(names)) > 0
        for label in (~present).nonzero().flatten().tolist():
            raise InputError(
                f"{source.name}: class '{names[label]}' has no image in the {split} split{hint}; "
                f"expected images of all {len(names)} classes in every split."
            )


def _check_options(
    resolution: int | None,
    channels: int | None,
    validation_fraction: float,
    test_fraction: float,
    limit: int | None,
) -> None:
    for name, value in (("resolution", resolution), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"data.{name} is {value}; expected a whole number of at least 1.")
    if channels not in (None, 1, 3):
        raise InputError(f"data.channels is {channels}; expected 1 (grey) or 3 (colour).")
    for name, fraction in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 < fraction < 1:
            raise InputError(
                f"data.{name}_fraction is {fraction}; expected more than 0, less than 1."
            )


def _check_reading(device_mb: float, workers: int | None) -> None:
    if not device_mb >= 0:
        raise InputError(f"data.device_mb is {device_mb}; expected 0 or more.")
    if workers is not None and workers < 0:
        raise InputError(
            f"data.workers is {workers}; expected a whole number from 0, or null to choose."
        )


def _headers(splits: Mapping[str, FileImages]) -> list[tuple[str, int, int]]:
    """Return (mode, width, height) of some training images; where one has none, look at all."""
    images = splits["train"]
    step = max(len(images) // HEADERS_READ, 1)
    try:
        return [images.header(i) for i in range(0, len(images), step)]
    except InputError as error:
        refused = [x for each in splits.values() for x in _refused(each, FileImages.header)]
        raise _refusal(refused) from error


def _shape(
    splits: Mapping[str, FileImages],
    resolution: int | None,
    resize: bool,
    channels: int | None,
    space: SearchSpace | None,
) -> tuple[int, int]:
    """Return resolution and channels, read from the data where not given; check the space's."""
    headers = _headers(splits)
    if channels is None:
        grey = all(mode in ("1", "L", "LA") or mode.startswith("I") for mode, _, _ in headers)
        channels = 1 if grey else 3
    if resolution is None and resize:
        if space is None:
            raise InputError(
                "data.resize=true needs a size; expected data.resolution=PIXELS as well."
            )
        resolution = space.resolution
    if resolution is None:
        _, width, height = headers[0]
        if width != height:
            raise InputError(
                f"{splits['train'].where(0)}: the image is {width}x{height}; expected square "
                "images. Set data.resize=true and data.resolution=PIXELS to scale and crop all."
            )
        resolution = width
    if space is not None and resolution != space.resolution:
        raise InputError(
            f"The images are {resolution}x{resolution}, the space {space.name} expects "
            f"{space.resolution}x{space.resolution}. Set data.resize=true to scale them, or choose "
            "another space."
        )
    if space is not None and channels != space.input_channels:
        raise InputError(
            f"The images have {channels} channel(s), the space {space.name} expects "
            f"{space.input_channels}. Set data.channels={space.input_channels} to convert them, or "
            "choose another space."
        )
    return resolution, channels


def statistics(images: Images, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std per channel, in [0, 1], of at most STATISTICS_IMAGES training images."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = order[:STATISTICS_IMAGES]
    total = squares = torch.zeros((), dtype=torch.float64)
    for chunk in chosen.split(256):
        values = images.batch(chunk).double() / 255
        total = total + values.mean(dim=(2, 3)).sum(dim=0)
        squares = squares + values.square().mean(dim=(2, 3)).sum(dim=0)
    mean = total / len(chosen)
    std = (squares / len(chosen) - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
