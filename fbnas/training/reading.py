"""Pixels batch after batch, from memory or decoded ahead, and how long a loop waited for them."""

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fbnas.errors import InputError
from fbnas.training.images import Images
from fbnas.training.interrupt import end_with

log = logging.getLogger(__name__)

MOST_WORKERS = 8  # that data.workers=null starts for an accelerator
FOR_THE_PARENT = tuple(  # the latter two are SLURM's, and not everywhere
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
WORTH_SAYING = 0.05  # of an epoch: a shorter wait is not shown


@dataclass
class Wait:
    """Seconds that the steps of a loop waited for their images."""

    seconds: float = 0.0


def wait_words(row: Mapping[str, Any]) -> str:
    """Return what to add to the line of an epoch: nothing, unless steps waited for much of it."""
    waited = row.get("data_wait_seconds", 0.0)  # rows of older runs have none
    if waited <= WORTH_SAYING * row["seconds"]:
        return ""
    return f", {waited:.1f} s of them waiting for images (raise data.workers or data.memory_mb)"


def read(
    images: Images,
    chunks: Sequence[Tensor],
    device: torch.device,
    *,
    processes: int = 1,
    wait: Wait | None = None,
) -> Iterator[Tensor]:
    """Yield the pixels of each chunk of indices, (b, c, R, R) uint8, adding to `wait`.

    What is in memory is copied when asked for. What is not is decoded ahead: by worker processes,
    two batches each, or by the threads of this process, one batch.

    Args:
        device: what the pixels are for. For CUDA they come in pinned memory.
        processes: that train together; the cores are divided among them.

    Raises:
        InputError: an image that cannot be read, or a worker process that was killed.
    """
    coming = _pixels(images, chunks, device, processes)
    wait = wait or Wait()
    while True:
        asked = time.perf_counter()
        pixels = next(coming, None)
        wait.seconds += time.perf_counter() - asked
        if pixels is None:
            return
        yield pixels


def worker_count(asked: int | None, device: torch.device, processes: int = 1) -> int:
    """Return how many processes decode: none for steps on the CPU itself, which need its cores."""
    if asked is not None:
        return asked
    if device.type == "cpu":
        return 0
    return max(min(MOST_WORKERS, (os.cpu_count() or 1) // processes), 1)


def _pixels(
    images: Images, chunks: Sequence[Tensor], device: torch.device, processes: int
) -> Iterator[Tensor]:
    pin = device.type == "cuda" and images.labels.device.type == "cpu"
    if not chunks or (images.in_memory and not pin):
        return map(images.batch, chunks)
    workers = 0 if images.in_memory else worker_count(images.workers, device, processes)
    if workers and _can_fork():
        return _by_processes(images, chunks, min(workers, len(chunks)), pin=pin)
    return _by_threads(images, chunks, pin=pin)


@cache
def _can_fork() -> bool:
    """Whether worker processes can be had; said once where they cannot."""
    if sys.platform == "linux":
        return True
    log.warning("Worker processes need Linux's fork: threads decode the images (data.workers=0).")
    return False


def _by_threads(images: Images, chunks: Sequence[Tensor], *, pin: bool) -> Iterator[Tensor]:
    def decode(chunk: Tensor) -> Tensor:
        pixels = images.batch(chunk)
        return pixels.pin_memory() if pin else pixels

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        coming = reader.submit(decode, chunks[0])
        for following in [*chunks[1:], None]:
            pixels = coming.result()
            if following is not None:
                coming = reader.submit(decode, following)
            yield pixels


def _by_processes(
    images: Images, chunks: Sequence[Tensor], workers: int, *, pin: bool
) -> Iterator[Tensor]:
    loader = DataLoader(
        _Chunks(images, chunks),
        batch_size=None,  # an item is a batch already
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=partial(_follow_the_parent, os.getpid()),
        multiprocessing_context="fork",  # images hold functions, which cannot be sent
        generator=torch.Generator(),  # or it would draw from the one that augmentation uses
    )
    try:
        for found in _started(loader):
            if isinstance(found, InputError):
                raise found
            yield found
        return
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        pids = re.findall(r"\d+", str(error))
    # not within `except`: what is caught there keeps the other workers alive
    raise InputError(
        f"A worker process that decodes images (pid {', '.join(pids)}) was killed, most likely for "
        "want of memory or of /dev/shm; expected it to live as long as the pass. Lower "
        "data.workers; 0 decodes in this process."
    )


class _Chunks(Dataset[Tensor | InputError]):
    """A batch of pixels per index, or the error of an image in it."""

    def __init__(self, images: Images, chunks: Sequence[Tensor]) -> None:
        self.images, self.chunks = images, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Tensor | InputError:
        try:
            return self.images.batch(self.chunks[index])
        except InputError as error:
            return error  # raised, it would arrive within a traceback of many lines


def _as_it_is(found: Any) -> Any:
    return found


def _follow_the_parent(parent: int, worker: int) -> None:
    """Live on when Ctrl-C or SIGTERM goes to the whole group: the parent still finishes its step.

    A worker ends with its pass, or when its parent was killed: torch's own watch for that misses a
    parent that was gone before the watch began.
    """
    end_with(parent)
    os.setpgrp()
    for number in FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)  # drops what came since the fork, too
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's last resort
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_PARENT)


def _started(loader: "DataLoader[Any]") -> Iterator[Any]:
    """Start the workers, and take back torch's SIGCHLD handler.

    It raises wherever the loop is when a worker dies, in the middle of a step; without it `next`
    does, after at most 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)  # workers inherit handlers
    try:
        coming = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return coming
