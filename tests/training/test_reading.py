"""Where pixels are, who decodes them, and the wait for them."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.training import Data, Subset, TensorImages, Wait, batches, load_data, reading
from fbnas.training.data import _per_channel

META = torch.device("meta")
PREPROCESSING = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
HERE = Path(__file__).parent


def lazily(folder: Path, workers: int | None) -> Data:
    return load_data("image_folder", path=str(folder), memory_mb=0, workers=workers)


def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"start": 1}, {"drop_last": True, "part": (1, 2)}, {"augment": noisy}, {"start": 9}],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_no_bit(
    two_classes: Path, options: dict[str, Any], workers: int
) -> None:
    def seen(workers: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        torch.manual_seed(3)
        images = Subset(lazily(two_classes, workers).train, torch.tensor([5, 2, 7, 0, 3]))
        generator = torch.Generator().manual_seed(1)
        read = list(batches(images, 2, generator=generator, **PREPROCESSING, **options))
        return read, torch.rand(1)

    (expected, after), (found, after_too) = seen(0), seen(workers)
    assert torch.equal(after, after_too)  # nothing was drawn from the global generator
    for (x, y), (x2, y2) in zip(expected, found, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not multiprocessing.active_children()


def test_a_bad_image_is_named_in_the_same_line_by_a_worker(two_classes: Path) -> None:
    lines = []
    for workers in (0, 2):
        train = lazily(two_classes, workers).train
        file = Path(train.where(3))
        whole = file.read_bytes()
        file.write_bytes(whole[:50])
        read = batches(train, 1, **PREPROCESSING)
        assert len([next(read) for _ in range(3)]) == 3  # batches before it are not lost
        with pytest.raises(InputError, match="the image cannot be read") as caught:
            next(read)
        file.write_bytes(whole)
        lines.append(str(caught.value))
    assert lines[0] == lines[1] and "\n" not in lines[0]
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error_at_the_next_batch(two_classes: Path) -> None:
    data = lazily(two_classes, 2)
    before = signal.getsignal(signal.SIGCHLD)
    read = batches(data.train, 1, **PREPROCESSING)
    next(read)
    assert signal.getsignal(signal.SIGCHLD) == before
    first = multiprocessing.active_children()[0]
    os.kill(first.pid, signal.SIGKILL)
    first.join(5)
    with pytest.raises(InputError, match=rf"pid .*{first.pid}.* was killed.*Lower data.workers"):
        list(read)
    assert not multiprocessing.active_children()


def test_a_pass_that_is_left_takes_its_workers_along(two_classes: Path) -> None:
    read = batches(lazily(two_classes, 2).train, 1, **PREPROCESSING)
    next(read)
    assert len(multiprocessing.active_children()) == 2
    read.close()
    assert not multiprocessing.active_children()


@pytest.fixture
def reader(two_classes: Path) -> Any:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "reading_run.py"), str(two_classes)],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.communicate(timeout=60)  # until nobody holds the pipes


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_the_end_of(*processes: int) -> None:
    limit = time.monotonic() + 60
    while any(map(alive, processes)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(alive, processes))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_to_all_and_no_pass(reader: Any, number: int) -> None:
    workers = [int(pid) for pid in reader.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    os.killpg(reader.pid, number)
    lines, errors = reader.stdout.read().splitlines(), reader.stderr.read()
    assert len(lines) == 10 and "stopping" in lines  # of the 10 images none is missing
    assert errors.count("Stopping after this step") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not any(map(alive, workers))


def test_workers_do_not_outlive_a_killed_parent(reader: Any) -> None:
    workers = [int(pid) for pid in reader.stdout.readline().split()]
    reader.kill()
    wait_for_the_end_of(*workers)


def test_a_worker_whose_parent_was_gone_before_it_looked_ends(tmp_path: Path) -> None:
    """As on a busy machine: the worker comes to its first instruction when the parent is dead."""
    code = (
        "import os, sys, time\n"
        "from fbnas.training.reading import _follow_the_parent\n"
        "parent = os.getpid()\n"
        "if os.fork():\n    os._exit(0)\n"
        "while os.getppid() == parent:\n    time.sleep(0.01)\n"
        "print(os.getpid(), flush=True)\n"
        "_follow_the_parent(parent, 0)\n"
        "time.sleep(1000)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60).stdout
    wait_for_the_end_of(int(said))


@pytest.mark.parametrize(
    ("arguments", "cores", "expected"),
    [
        ((None, torch.device("cpu"), 1), 16, 0),
        ((None, META, 1), 16, 8),
        ((None, META, 1), 4, 4),
        ((None, META, 4), 16, 4),
        ((None, META, 4), 2, 1),
        ((3, torch.device("cpu"), 1), 2, 3),
        ((0, META, 1), 16, 0),
    ],
)
def test_how_many_workers(
    arguments: tuple[Any, ...], cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert reading.worker_count(*arguments) == expected


def test_threads_where_there_is_no_fork_said_once(
    two_classes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = lazily(two_classes, 2)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        reading._can_fork.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                for _ in batches(data.train, 2, **PREPROCESSING):
                    assert not multiprocessing.active_children()
    reading._can_fork.cache_clear()
    assert caplog.text.count("Worker processes need Linux's fork") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_wait_is_that_for_pixels_alone(two_classes: Path, workers: int) -> None:
    def late(index: int) -> Any:
        time.sleep(0.1)
        return train.open_image(index)

    def work(x: Tensor) -> Tensor:
        time.sleep(0.2)
        return x

    train = lazily(two_classes, workers).train
    wait = Wait()
    next(batches(replace(train, open_image=late), 1, **PREPROCESSING, wait=wait))
    assert wait.seconds >= 0.1
    wait, started = Wait(100.0), time.perf_counter()
    for _ in batches(train, 5, **PREPROCESSING, augment=work, wait=wait):
        time.sleep(0.2)
    assert 100 < wait.seconds < 100 + time.perf_counter() - started - 4 * 0.2


def test_only_a_wait_that_matters_is_shown() -> None:
    assert reading.wait_words({"seconds": 10.0}) == ""
    assert reading.wait_words({"seconds": 10.0, "data_wait_seconds": 0.5}) == ""
    said = reading.wait_words({"seconds": 10.0, "data_wait_seconds": 0.6})
    assert "0.6 s" in said and "data.workers" in said and "data.memory_mb" in said


def held(count: int = 10, *, resident: bool = True) -> TensorImages:
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return TensorImages(pixels.contiguous(), torch.arange(count), resident=resident)


def test_an_accelerator_holds_small_data_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[int, ...]] = []
    move = Tensor.to

    def note(tensor: Tensor, *where: Any, **options: Any) -> Tensor:
        result = move(tensor, *where, **options)
        if tensor.device != result.device:
            copied.append(tuple(tensor.shape))
        return result

    monkeypatch.setattr(Tensor, "to", note)
    images = held()
    part = Subset(images, torch.arange(6))
    for each in (part, images, part):
        for x, y in batches(each, 2, device="meta", **PREPROCESSING):
            assert x.device == y.device == META and x.shape == (2, 3, 2, 2)
    assert copied.count((10, 3, 2, 2)) == 1  # the pixels
    assert set(copied) == {(10, 3, 2, 2), (10,), (6,)}  # labels, indices and order, never a batch
    assert images.on(META) is images.on(META)
    assert images.on(torch.device("cpu")) is images
    assert part.on(torch.device("cpu")) is part


def test_data_that_does_not_fit_is_copied_batch_by_batch() -> None:
    images = held(resident=False)
    assert images.on(META) is images
    assert all(
        x.device == y.device == META for x, y in batches(images, 4, device="meta", **PREPROCESSING)
    )
    assert load_data().train.resident
    assert not load_data(device_mb=0.01).train.resident


def test_what_a_ranking_moved_may_be_trained_on() -> None:
    images = held()
    with torch.inference_mode():
        copy = images.on(META)
        mean = _per_channel((0.125,), torch.device("cpu"))
    assert not any(x.is_inference() for x in (copy.pixels, copy.labels, mean))
