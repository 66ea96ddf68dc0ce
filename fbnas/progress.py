"""One progress display for everything that takes more than a few seconds."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

QUIET_INTERVAL_S = 10.0  # without a terminal: a plain line no more often than this


@contextlib.contextmanager
def progress(description: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with time left on a terminal, or a log line every few seconds elsewhere.

    Yields a function that is called with the number of steps just done.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        # A stdout that goes elsewhere stays there; one on the terminal is printed above the bar.
        with Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        ) as bar:
            task = bar.add_task(description, total=total)
            yield lambda steps: bar.advance(task, steps)
        return
    yield plain_lines(description, total)


def plain_lines(description: str, total: int) -> Callable[[int], None]:
    """Return a function that logs a line every few seconds, called with the steps just done."""
    started = last = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= QUIET_INTERVAL_S:
            last = now
            left = (now - started) / max(done, 1) * (total - done)
            log.info("%s: %d/%d, about %.0f s left", description, done, total, max(left, 0))

    return advance
