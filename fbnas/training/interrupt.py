"""Ctrl-C without losing work: a loop asks at every step boundary whether it should stop."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


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
