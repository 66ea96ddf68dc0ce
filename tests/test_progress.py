"""The progress display: how far, and how long it will take."""

import io
import logging
import re
import sys

import pytest

from fbnas import progress as display
from fbnas.progress import duration_words, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress("Searching", total=10, done=4) as advance:
        advance(3)
    shown = screen.getvalue()
    assert "Searching" in shown
    assert "4/10" in shown or "7/10" in shown
    assert re.search(r"-:--:--|\d:\d\d:\d\d", shown)


def test_one_bar_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress("Training", total=2), progress("Judging", total=3) as advance:
        advance(3)
    with progress("Converting", total=4):
        pass
    shown = screen.getvalue()
    assert "Training" in shown
    assert "Judging" not in shown
    assert "Converting" in shown


def test_elsewhere_lines_tell_the_time_left_by_the_steps_of_now(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO, "fbnas")
    with progress("Searching", total=85, done=50) as advance:
        now[0] += 5
        advance(1)  # too early for a line
        now[0] += 25
        advance(4)  # 6 s a step; those before the resumption took none of this time
        now[0] += 5
        advance(1)
    assert [record.getMessage() for record in caplog.records] == [
        "Searching: 55/85, about 3 min left"
    ]


def test_durations_are_rounded_to_what_matters() -> None:
    found = [duration_words(seconds) for seconds in (0.4, 42, 720, 7500)]
    assert found == ["0 s", "42 s", "12 min", "2 h 5 min"]
