"""Ctrl-C without losing work, and processes that end with the one that needs them."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)

WATCH_S = 1.0


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one interrupts at once.

        with stop_on_signal() as stop:
            for batch in batches:
                step(batch)
                if stop():
                    save()
                    raise KeyboardInterrupt

    A flag that the body never looked at raises KeyboardInterrupt when the block ends, so no signal
    is lost. Outside the main thread, where Python delivers no signals, `stop()` is always False.

    Raises:
        KeyboardInterrupt: on a second signal, or at the end of the block after a first one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    stopped = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        log.warning("Stopping after this step; once more to stop at once without a checkpoint.")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt


def end_with(parent: int) -> None:
    """End this process soon after its parent, however that one ends.

    Args:
        parent: its id, as the parent itself knows it: it may be gone before this is called.
    """
    threading.Thread(target=_outlive_not, args=(parent,), daemon=True).start()


def _outlive_not(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(1)  # the main thread may wait in C++, where no exception reaches it
