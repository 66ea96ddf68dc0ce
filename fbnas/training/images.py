"""Images that training reads by index: in memory, or decoded when a batch asks for them."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from fbnas.errors import InputError
from fbnas.progress import progress

DECODE_CHUNK = 512  # images between two steps of the progress display


class Images(Protocol):
    """What training, search and calibration read."""

    @property
    def labels(self) -> Tensor:
        """(n,) int64 class indices."""

    @property
    def in_memory(self) -> bool:
        """Whether `batch` only copies memory, so that reading ahead gains nothing."""

    @property
    def workers(self) -> int | None:
        """Processes that shall call `batch`; None: as the device of the training suggests."""

    def __len__(self) -> int: ...

    def on(self, device: torch.device) -> "Images":
        """Return the images as they are best read for `device`; `labels` tells where indices go."""

    def batch(self, indices: Tensor) -> Tensor:
        """Return the images at `indices` (b,) as (b, c, R, R) uint8."""


@dataclass(frozen=True)
class TensorImages:
    """Images held as one (n, c, R, R) uint8 tensor.

    `resident`: an accelerator takes them all at once and keeps them, instead of batch by batch.
    """

    pixels: Tensor
    labels: Tensor
    in_memory: bool = True
    workers: int | None = 0
    resident: bool = True
    _copies: dict[torch.device, "TensorImages"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __len__(self) -> int:
        return len(self.labels)

    @torch.inference_mode(False)  # training may use the copy that a ranking made
    def on(self, device: torch.device) -> "TensorImages":
        device = torch.empty(0, device=device).device  # cuda and cuda:0 are one
        if not self.resident or device == self.pixels.device:
            return self
        if device not in self._copies:
            self._copies[device] = TensorImages(self.pixels.to(device), self.labels.to(device))
        return self._copies[device]

    def batch(self, indices: Tensor) -> Tensor:
        return self.pixels.index_select(0, indices)


@dataclass(frozen=True)
class Subset:
    """A view of some of the images of another."""

    images: Images
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        return self.images.labels[self.indices]

    @property
    def in_memory(self) -> bool:
        return self.images.in_memory

    @property
    def workers(self) -> int | None:
        return self.images.workers

    def __len__(self) -> int:
        return len(self.indices)

    def on(self, device: torch.device) -> "Subset":
        held = self.images.on(device)
        if held is self.images:
            return self
        return Subset(held, self.indices.to(held.labels.device))

    def batch(self, indices: Tensor) -> Tensor:
        return self.images.batch(self.indices[indices])


@dataclass(frozen=True)
class JoinedImages:
    """Images of several data sets, one after another; `offsets` are added to the labels of each."""

    parts: tuple[Images, ...]
    offsets: tuple[int, ...]

    @cached_property
    def labels(self) -> Tensor:
        return torch.cat(
            [part.labels + offset for part, offset in zip(self.parts, self.offsets, strict=True)]
        )

    @property
    def in_memory(self) -> bool:
        return all(part.in_memory for part in self.parts)

    @property
    def workers(self) -> int | None:
        return self.parts[0].workers

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def on(self, device: torch.device) -> "JoinedImages":
        held = tuple(part.on(device) for part in self.parts)
        if len({part.labels.device for part in held}) > 1:  # indices go to all of them
            return self
        return replace(self, parts=held)

    def batch(self, indices: Tensor) -> Tensor:
        found: Tensor | None = None
        first = 0
        for part in self.parts:
            mine = (indices >= first) & (indices < first + len(part))
            if mine.any():
                pixels = part.batch(indices[mine] - first)
                if found is None:
                    found = pixels.new_empty(len(indices), *pixels.shape[1:])
                found[mine] = pixels
            first += len(part)
        assert found is not None
        return found


@dataclass(frozen=True)
class FileImages:
    """Images decoded when asked for, by a pool of threads or in one of several worker processes.

    `open_image(i)` returns image i, not yet decoded; `where(i)` names it in errors. An image of
    another size is refused, or with `resize` scaled to cover R x R and cropped at the centre.
    """

    open_image: Callable[[int], Image.Image]
    where: Callable[[int], str]
    labels: Tensor
    channels: int = 0
    resolution: int = 0
    resize: bool = False
    in_memory: bool = False
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def on(self, device: torch.device) -> "FileImages":
        return self

    def batch(self, indices: Tensor) -> Tensor:
        in_worker = get_worker_info() is not None  # a fork, in which the pool has no threads
        decoded = (map if in_worker else _pool().map)(self._decode, indices.tolist())
        pixels = np.stack(list(decoded))
        return torch.from_numpy(pixels)

    def header(self, index: int) -> tuple[str, int, int]:
        """Return (mode, width, height) of one image as stored.

        Raises:
            InputError: it cannot be read.
        """
        with naming(self.where, index):
            image = self.open_image(index)
            return image.mode, image.width, image.height

    def select(self, indices: Tensor) -> "FileImages":
        """Return the images at `indices`, in that order."""
        chosen = indices.tolist()
        return replace(
            self,
            open_image=lambda i: self.open_image(chosen[i]),
            where=lambda i: self.where(chosen[i]),
            labels=self.labels[indices],
        )

    def decoded(self, description: str) -> TensorImages:
        """Decode all of them into memory, behind a progress display."""
        shape = (len(self), self.channels, self.resolution, self.resolution)
        pixels = torch.empty(shape, dtype=torch.uint8)
        with progress(description, total=len(self)) as advance:
            for chunk in torch.arange(len(self)).split(DECODE_CHUNK):
                pixels[chunk] = self.batch(chunk)
                advance(len(chunk))
        return TensorImages(pixels, self.labels)

    def _decode(self, index: int) -> np.ndarray:
        with naming(self.where, index):
            image = _convert(ImageOps.exif_transpose(self.open_image(index)), self.channels)
        size = (self.resolution, self.resolution)
        if image.size != size:
            if not self.resize:
                raise InputError(
                    f"{self.where(index)}: the image is {image.width}x{image.height}; expected "
                    f"{size[0]}x{size[1]}. Set data.resize=true to scale and crop all."
                )
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def naming(where: Callable[[int], str], index: int) -> Iterator[None]:
    """Turn Pillow's many ways of refusing a file into one line with its name.

    Raises:
        InputError: whatever stopped the body from reading the image.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise InputError(
            f"{where(index)}: the image cannot be read ({reason}); expected a whole image file. "
            "Replace it or take it out."
        ) from error


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Decode to 8-bit grey or RGB from whatever is stored (grey, palette, alpha, CMYK, 16 bit)."""
    if image.mode.startswith("I"):  # 16 bit: Pillow's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode")
