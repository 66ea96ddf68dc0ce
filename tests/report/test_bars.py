"""The page of bars: a bar per value, as long as it is, with names that cannot break the page."""

import re
from pathlib import Path

import pytest

from fbnas.report.bars import WIDTH, Bar, write_bars


def drawn(path: Path) -> list[tuple[str, float]]:
    """The kind and the width of every bar."""
    found = re.findall(r'<rect class="([^"]+)"[^>]*? width="([0-9.]+)"', path.read_text())
    return [(kind, float(width)) for kind, width in found]


def test_bars_are_as_long_as_their_values(tmp_path: Path) -> None:
    bars = [Bar("a", 10.0, "ten"), Bar("b", 20.0, "twenty", marked=True), Bar("c", -5.0, "less")]
    page = write_bars(tmp_path / "bars.html", bars, title="T", axis="dB", words=["Said <once>."])
    (one, two, three) = drawn(page)
    assert [kind for kind, _ in (one, two, three)] == ["bar", "bar marked", "bar"]
    assert two[1] == pytest.approx(2 * one[1], abs=0.2)
    assert three[1] == pytest.approx(one[1] / 2, abs=0.2)
    assert two[1] + three[1] <= WIDTH
    assert "Said &lt;once&gt;." in page.read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    page = write_bars(
        tmp_path / "bars.html", [Bar("<b>", 1.0, "<i>")], title="<u>", axis="<s>", words=[]
    )
    text = page.read_text()
    assert not re.search("<b>|<i>|<u>|<s>|<script", text)


def test_a_single_zero_is_drawn(tmp_path: Path) -> None:
    page = write_bars(tmp_path / "bars.html", [Bar("a", 0.0, "")], title="T", axis="x", words=[])
    assert drawn(page) == [("bar", 1.0)]
