"""Several runs side by side."""

from pathlib import Path

import made_run as made
import pytest
from parsed_page import ParsedPage

from fbnas.errors import InputError
from fbnas.files import read_json, write_json, write_yaml
from fbnas.report import build_comparison, write_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sides")
    folders = [made.write_run(root / name) for name in ("slow", "fast")]
    result = read_json(folders[1] / "result.json")
    change = {"latency_ms": made.latency(0.2), "accuracy_top1": 0.96, "seed": 4}
    write_json(folders[1] / "result.json", result | change)
    write_yaml(folders[1] / "config.yaml", {"seed": 4, "target_ms": 0.25, "search": {"epochs": 9}})
    write_report(folders[1])
    return folders


@pytest.fixture(scope="module")
def both(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> ParsedPage:
    folder = tmp_path_factory.mktemp("both")
    (folder / "report.html").write_text(build_comparison(runs, runs[0].parent / "both"))
    return ParsedPage(folder / "report.html")


def test_parts_of_the_comparison(both: ParsedPage) -> None:
    assert both.sections() == [
        *("runs", "front", "stages", "architectures", "latency", "training", "table"),
        "environment",
    ]
    assert len(both.ids()) == len(set(both.ids()))
    words = both.text_of["summary"].replace("\u202f", " ")
    assert words == (
        "Of 2 runs fast is the fastest with 0.200 ms, slow is the most accurate with 97.2 % top-1 "
        "and 2 of 2 met the budget."
    )


def test_a_row_per_run_and_a_link_to_its_page(both: ParsedPage) -> None:
    _, slow, fast = both.tables["runs-table"]
    assert slow[:3] == ["slow", "0.250 ms", "0.238 ms"]
    assert fast[3:5] == ["0.200 ms0.196 ms to 0.206 ms", "96.0 %"]
    links = [a["href"] for tag, a in both.tags if tag == "a" and a["href"].endswith(".html")]
    assert links == ["../fast/report.html"]  # the other has no page yet


def test_figures_hold_both(both: ParsedPage) -> None:
    assert both.trace("front-measured", "slow")["x"] == [0.41, 0.243]
    assert both.trace("stages-latency", "fast")["y"] == ["fp32", "pruned", "int8"]
    assert both.trace("stages-latency", "fast")["marker"]["pattern"]["shape"] == ["", "/", ""]
    assert both.trace("predicted-measured", "fast, final")["y"] == [0.2]
    assert len(both.trace("train-accuracy", "slow")["x"]) == 8
    assert {"layers-0", "layers-1"} <= set(both.tables)


def test_options_that_differ(both: ParsedPage, runs: list[Path]) -> None:
    rows = {row[0]: row[1:] for row in both.tables["differences"]}
    assert rows["seed"] == ["3", "4"] and rows["search.epochs"] == ["\u2013", "9"]
    assert "target_ms" not in rows and "device" not in rows
    assert f"'run=[{runs[0]},{runs[1]}]' out=FOLDER" in both.text_of["environment"]


def test_equal_names_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    other = made.write_run(tmp_path / "elsewhere" / "slow")
    html = build_comparison([runs[0], other], tmp_path)
    assert f"{runs[0]}: fp32" in html and f"{other}: fp32" in html


def test_a_folder_twice_is_refused(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"twice; expected different folders"):
        build_comparison([runs[0], runs[0]], tmp_path)
