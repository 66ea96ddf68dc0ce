"""The page of measured against predicted latency."""

import re
from pathlib import Path

import pytest

from fbnas.report.scatter import Point, write_scatter


def circles(page: str) -> list[tuple[str, float, float, str]]:
    pattern = r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+"><title>(.*?)</title>'
    found = re.findall(pattern, page, flags=re.DOTALL)
    return [(kind, float(x), float(y), tip) for kind, x, y, tip in found]


def test_every_network_is_a_point_at_its_place(tmp_path: Path) -> None:
    before = [Point("k3_e1 skip", 1.0, 2.0), Point("k5_e6 <b>", 3.0, 4.0)]
    after = [Point("k3_e1 skip", 2.0, 2.0), Point("k5_e6 <b>", 4.0, 4.0)]
    path = write_scatter(
        tmp_path / "new" / "t.html", {"before": before, "after": after}, title="T", noise_floor=0.02
    )
    page = path.read_text()
    drawn = circles(page)
    assert [kind for kind, *_ in drawn] == ["one", "one", "two", "two"]
    per_ms = (drawn[1][1] - drawn[0][1]) / 2.0  # both axes have one scale
    assert drawn[3][1] - drawn[2][1] == pytest.approx(2 * per_ms, abs=0.3)
    assert drawn[0][2] - drawn[1][2] == pytest.approx(2 * per_ms, abs=0.3)
    line = re.search(r'class="equal" d="M(\d+) (\d+)L(\d+) (\d+)"', page)
    assert line is not None
    left, bottom, *_ = (float(end) for end in line.groups())
    for _, x, y, _ in drawn[2:]:  # measured as predicted: on the line of equality
        assert x - left == pytest.approx(bottom - y, abs=0.3)
    assert "k3_e1 skip\npredicted 1 ms, measured 2 ms" in drawn[0][3]
    assert "<b>" not in page
    assert "noise floor of 2.0 %" in page
    assert "<script" not in page


def test_one_network_makes_a_page_too(tmp_path: Path) -> None:
    point = Point("skip", 0.5, 0.5)
    page = write_scatter(tmp_path / "t.html", {"a": [point]}, title="T", noise_floor=0.0)
    assert len(circles(page.read_text())) == 1
