"""Fronts, the stages' waterfalls, the comparison of blocks and the history of theta."""

from pathlib import Path

import made_run as made
import pytest
from parsed_page import ParsedPage

from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.report import write_report
from fbnas.report.front import Spot, best_of


def test_the_front_is_what_none_beats_in_both() -> None:
    values = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.6), (3.0, 0.6), (4.0, 0.9), (1.0, 0.3)]
    best = best_of(Spot("x", str(v), *v) for v in values)
    assert [(s.latency_ms, s.accuracy) for s in best] == [(1.0, 0.5), (2.0, 0.6), (4.0, 0.9)]


def test_judged_networks_stand_where_the_table_puts_them(
    page: ParsedPage, made_folder: Path
) -> None:
    rows = read_json(made_folder / "search" / "front.json")["networks"]
    chosen = page.trace("front-0", "chosen")
    costs = sum(made.block_ms(b, s) for b, s in zip(made.CHOSEN, made.SHAPES, strict=True))
    assert chosen["x"] == pytest.approx([made.BASE_MS + costs])
    assert chosen["y"] == [0.9]
    assert chosen["text"][0].split("<br>")[:2] == ["<b>chosen</b>", "target 0.250\u202fms"]
    assert " ".join(chosen["text"][0].split("<br>")[2:]).split() == made.CHOSEN
    uniform = page.trace("front-0", "one block")
    assert uniform["y"] == [r["accuracy"] for r in rows if r["kind"] == "uniform"]
    budget = page.figures["front-0"]["layout"]["shapes"][0]
    assert budget["x0"] == budget["x1"] == made.BUDGET_MS
    assert len(page.tables["front-table-0"]) == 1 + len(rows)


def test_targets_of_one_table_share_a_front(tmp_path: Path) -> None:
    made.write_search(tmp_path, (0.2, 0.3, 0.4))
    made.write_front(tmp_path, targets=3)
    page = ParsedPage(write_report(tmp_path))
    assert page.trace("front-0", "chosen")["y"] == pytest.approx([0.9, 0.91, 0.92])
    assert [s["x0"] for s in page.figures["front-0"]["layout"]["shapes"]] == [0.2, 0.3, 0.4]
    assert "front-1" not in page.figures
    both = [{"architecture": made.CHOSEN}] * 3
    result = {"targets": both, "target_ms": 0.2, "architecture": made.CHOSEN, "seconds": 9.0}
    write_json(tmp_path / "result.json", result)
    page = ParsedPage(write_report(tmp_path))
    assert "It is the first target's." in page.text_of["architecture"]
    assert "<dt>asked" not in page.source and "<dt>time" in page.source


def test_measured_files_beside_given_baselines(run_folder: Path, tmp_path: Path) -> None:
    others = tmp_path / "others.csv"
    others.write_text(
        "name,latency_ms,accuracy,architecture\nfriend <b>,0.3,0.96,a b\nfoe,0.2,0.9,\n"
    )
    page = ParsedPage(write_report(run_folder, baselines=others))
    given = page.trace("front-measured", "baselines")
    assert (given["x"], given["y"]) == ([0.3, 0.2], [0.96, 0.9])
    assert given["text"][0] == "<b>friend &lt;b&gt;</b><br>a b"
    stages = page.trace("front-measured", "stages")
    assert (stages["x"], stages["y"]) == ([0.41, 0.243], [0.975, 0.972])
    assert page.trace("front-measured", "rejected")["x"] == [0.33]
    front = page.trace("front-measured", "front")
    assert front["x"] == [0.2, 0.243, 0.41]
    low, high = page.figures["front-measured"]["layout"]["xaxis"]["range"]
    assert low < 0.2 and high > 0.41


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "name,latency_ms\na,1\n",
            r"others\.csv: the columns accuracy are missing; expected a CSV",
        ),
        ("name,latency_ms,accuracy\na,fast,0.5\n", r"others\.csv, line 2: .*'fast'.*Mend the line"),
        ("name,latency_ms,accuracy\na,1,55\n", r"line 2: accuracy is 55, not from 0 to 1"),
        ("name,latency_ms,accuracy\na,-1,0.5\n", r"line 2: a latency of -1 ms"),
        ("name,latency_ms,accuracy\na,1\n", r"line 2: "),
        ("name,latency_ms,accuracy\n", r"others\.csv: holds no rows"),
    ],
)
def test_baselines_that_are_none(
    run_folder: Path, tmp_path: Path, content: str, words: str
) -> None:
    (tmp_path / "others.csv").write_text(content)
    with pytest.raises(InputError, match=words):
        write_report(run_folder, baselines=tmp_path / "others.csv")


def test_a_waterfall_leads_from_the_best_stage_before(page: ParsedPage) -> None:
    (bars,) = page.figures["stages-latency"]["data"]
    assert bars["y"] == ["fp32", "pruned", "int8", "final file"]
    assert bars["base"] == [0, 0.41, 0.41, 0]  # pruned was rejected: int8 starts from fp32
    ends = [base + length for base, length in zip(bars["base"], bars["x"], strict=True)]
    assert ends == pytest.approx([0.41, 0.33, 0.243, 0.243])
    assert bars["marker"]["pattern"]["shape"] == ["", "/", "", ""]
    texts = [a["text"] for a in page.figures["stages-bytes"]["layout"]["annotations"]]
    assert texts[2:] == ["98.0\u202fkB  \u221263\u202f%"] * 2
    accuracy = page.figures["stages-accuracy"]["layout"]["annotations"][1]["text"]
    assert accuracy == "95.1\u202f%  \u22122.4\u202fpoints"


def test_blocks_are_compared_at_equal_shapes(page: ParsedPage) -> None:
    (bars,) = page.figures["depthwise"]["data"]
    assert bars["x"][0] == "expansion 1" and bars["x"][1] == "expansion 1,<br>2 groups"
    ratios = sorted(
        made.block_ms("k5_e6", s) / made.block_ms("k3_e6", s) for s in dict.fromkeys(made.SHAPES)
    )
    assert bars["y"][3] == pytest.approx(ratios[len(ratios) // 2])
    assert bars["y"][3] + bars["error_y"]["array"][3] == pytest.approx(ratios[-1])
    (bars,) = page.figures["relative"]["data"]
    assert "skip" not in bars["x"] and "k3_e1" not in bars["x"]
    assert bars["y"][bars["x"].index("k3_e1_g2")] == pytest.approx(1.0)


def test_every_layer_has_its_history(page: ParsedPage) -> None:
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert len(labels) == len(made.CHOSEN)
    assert labels[1].startswith("Layer 1, stage 1: k5_e6 ends with 9")
    paths = [a["d"] for tag, a in page.tags if tag == "path"]
    assert len(paths) == sum(made.offered(k, b) for k in range(7) for b in made.BLOCKS)
    assert all(path.startswith("M0 64L0 ") and path.endswith("V64Z") for path in paths)
