"""One progress display for everything that takes more than a few seconds."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

QUIET_INTERVAL_S = 10.0  # without a terminal: a plain line no more often than this
SPEED_PERIOD_S = 600.0  # the time left follows from the steps of so long; one may take minutes

_shown: list[str] = []  # the bar on the terminal


@contextlib.contextmanager
def progress(description: str, *, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar with time left on a terminal, or a log line every few seconds elsewhere.

    Yields a function that is called with the number of steps just done. `done`: steps that were
    done before, by what is resumed: the time left follows from those of now. Within a bar that is
    shown already a second one is not.
    """
    if sys.stderr.isatty() and _shown:
        yield lambda steps: None
        return
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
            speed_estimate_period=SPEED_PERIOD_S,
        ) as bar:
            task = bar.add_task(description, total=total, completed=done)
            _shown.append(description)
            try:
                yield lambda steps: bar.advance(task, steps)
            finally:
                _shown.pop()
        return
    yield plain_lines(description, total, done)


def plain_lines(description: str, total: int, before: int = 0) -> Callable[[int], None]:
    """Return a function that logs a line every few seconds, called with the steps just done."""
    started = last = time.monotonic()
    done = before

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= QUIET_INTERVAL_S:
            last = now
            left = (now - started) / max(done - before, 1) * max(total - done, 0)
            log.info("%s: %d/%d, about %s left", description, done, total, duration_words(left))

    return advance


def duration_words(seconds: float) -> str:
    """40 s, 12 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
