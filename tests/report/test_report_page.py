"""The report of a whole run: every number on the page is the one in the files."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import made_run as made
import pytest
from parsed_page import ParsedPage

from fbnas.files import read_json, write_json
from fbnas.report import write_report

SIX_MB = 6_000_000


def test_the_page_stands_alone(page: ParsedPage) -> None:
    assert len(page.source.encode()) < SIX_MB
    loaded = [(t, a) for t, a in page.tags if "src" in a or (t == "link" and a["href"] != "data:,")]
    assert loaded == []
    assert page.source.count("plotly.js v") == 1
    assert "default-src 'none'" in page.source


def test_what_the_user_wrote_cannot_break_out(page: ParsedPage) -> None:
    assert "</script><b>" in page.text_of["environment"]  # config.yaml holds it as text
    assert "a 2-core <x86> machine" in page.text_of["environment-table"]
    assert not [tag for tag, _ in page.tags if tag == "x86"]


def test_page_is_usable_without_eyes_and_mouse(page: ParsedPage) -> None:
    assert len(page.ids()) == len(set(page.ids()))
    plots = [a for _, a in page.tags if a.get("class") == "plot"]
    assert {a["id"] for a in plots} == set(page.figures)
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in plots)
    assert all(a["tabindex"] == "0" for a in plots)
    captions = [tag for tag, _ in page.tags if tag == "caption"]
    assert len(captions) == len(page.tables) >= 5
    links = [a["href"][1:] for tag, a in page.tags if tag == "a" and a["href"].startswith("#")]
    assert set(links) <= set(page.ids())
    assert [a["id"] for tag, a in page.tags if tag == "input" and a["type"] == "range"] == ["epoch"]
    assert [a["for"] for tag, a in page.tags if tag == "label"] == ["epoch"]
    layers = [a for tag, a in page.tags if tag == "li" and a.get("class") == "layer"]
    assert len(layers) == 7 + 2 and all(a["tabindex"] == "0" for a in layers)


def test_sections_come_in_order(page: ParsedPage) -> None:
    assert page.sections() == [
        *("stages", "front", "architecture", "theta", "search", "latency"),
        *("training", "table", "environment"),
    ]


def test_plotly_knows_every_attribute(page: ParsedPage) -> None:
    from plotly.graph_objects import Figure

    assert len(page.figures) == 17
    for figure in page.figures.values():
        Figure(data=figure["data"], layout=figure["layout"])  # raises on an unknown attribute


def test_sentence_says_asked_predicted_and_measured(page: ParsedPage) -> None:
    words = page.text_of["summary"].replace("\u202f", " ")
    assert words == (
        "Asked for at most 0.250 ms, the search predicted 0.238 ms and the final file takes "
        "0.243 ms (0.238 to 0.250) on local (onnxruntime, int8), with 97.2 % top-1 accuracy."
    )
    assert "Budget met: 2.8\u202f% below the target." in page.source


@pytest.mark.parametrize(
    ("measured_ms", "noise", "verdict"),
    [
        (0.25, 0.0, "Budget met: 0.0\u202f% below"),
        (0.26, 0.0, "Budget met within 5.0\u202f%: 4.0\u202f% above"),
        (0.27, 0.015, "Budget missed: 8.0\u202f% above"),
        (0.27, 0.05, "Budget met within 10.0\u202f%: 8.0\u202f% above"),  # twice the noise floor
        (0.30, 0.30, "Budget missed: 20.0\u202f% above"),  # but no busy machine meets all budgets
    ],
)
def test_verdict_follows_the_exit_code(
    run_folder: Path, measured_ms: float, noise: float, verdict: str
) -> None:
    result = read_json(run_folder / "result.json")
    result |= {"latency_ms": made.latency(measured_ms), "noise_floor": noise}
    write_json(run_folder / "result.json", result)
    assert verdict in ParsedPage(write_report(run_folder)).source


def test_stage_table(page: ParsedPage) -> None:
    heads, fp32, pruned, int8 = page.tables["stage-table"]
    assert heads[0] == "Stage" and heads[-1] == "Verdict"
    assert fp32[0] == "fp32" and fp32[1] == "97.5 %" and fp32[3] == "265 kB"
    assert fp32[2] == "0.410 ms0.402 to 0.422"
    assert pruned[1] == "95.1 %\u22122.4 points"
    assert pruned[2] == "0.330 ms0.323 to 0.3401.24\u00d7 as fast"
    assert pruned[4:6] == ["40.1 k", "2.01 M"]
    assert pruned[6] == "✗ rejectedcosts 0.024 accuracy, more than max_accuracy_drop=0.01"
    assert int8[6] == "✓ accepted, final file1.69 times faster"
    finals = [a for tag, a in page.tags if tag == "tr" and a.get("class") == "final"]
    assert len(finals) == 1


def test_theta_by_epoch_is_the_softmax_of_the_logits(page: ParsedPage) -> None:
    figure = page.figures["theta-0"]
    assert len(figure["frames"]) == made.EPOCHS
    assert figure["data"][0]["z"] == figure["frames"][-1]
    assert figure["data"][0]["y"] == made.BLOCKS
    for epoch, frame in enumerate(figure["frames"]):
        for k, logits in enumerate(made.logits(epoch)):
            total = sum(math.exp(x) for x in logits if x is not None)
            for i, x in enumerate(logits):
                if x is None:
                    assert frame[i][k] is None
                else:
                    assert frame[i][k] == pytest.approx(math.exp(x) / total, abs=6e-4)
    marks = page.trace("theta-0", "chosen")
    assert marks["y"] == made.CHOSEN and marks["x"] == list(range(7))


def test_expected_latency_against_target(page: ParsedPage) -> None:
    line = page.trace("expected-latency", "E[LAT]")
    assert line["x"] == list(range(made.EPOCHS))
    assert line["y"] == pytest.approx([made.expected_ms(e) for e in range(made.EPOCHS)])
    assert page.trace("expected-latency", "target")["y"] == [made.BUDGET_MS] * 2
    shade = page.figures["expected-latency"]["layout"]["shapes"][0]
    assert (shade["x0"], shade["x1"]) == (-0.5, made.WARMUP - 0.5)


def test_search_curves(page: ParsedPage) -> None:
    assert page.trace("search-loss", "weights")["y"][3] == pytest.approx(2.3 * 0.85**3)
    theta = page.trace("search-accuracy", "theta")["y"]
    assert theta[: made.WARMUP] == [None] * made.WARMUP
    assert theta[-1] == pytest.approx(0.98 - 0.9 * 0.82**11)
    assert page.trace("entropy", "target")["y"][-1] == pytest.approx(2.2 * 0.8**5)
    assert page.trace("skips", "target")["y"][0] == pytest.approx(0.6)
    assert page.tables["target-table"][1][:2] == ["0.250 ms", "0.223 ms"]


def test_training_curves_mark_the_kept_epoch(page: ParsedPage) -> None:
    validation = page.trace("train-accuracy", "validation")["y"]
    assert page.trace("train-accuracy", "kept")["x"] == [6]  # the last of the eight is worse
    assert page.trace("train-accuracy", "kept")["y"] == [max(validation)] == [validation[6]]
    assert page.trace("train-loss", "training")["y"][1] == pytest.approx(1.4)


def test_predicted_against_measured(page: ParsedPage) -> None:
    result = made.result()
    points = page.trace("predicted-measured", "candidates")
    assert points["x"] == [c["predicted_latency_ms"] for c in result["candidates"]]
    assert points["y"] == [c["latency_ms"]["value"] for c in result["candidates"]]
    tops = [y + up for y, up in zip(points["y"], points["error_y"]["array"], strict=True)]
    assert tops == pytest.approx([c["latency_ms"]["high"] for c in result["candidates"]])
    assert points["text"][0].replace("<br>", " ").split() == result["candidates"][0]["architecture"]
    networks = result["calibration"]["networks"]
    held_out = page.trace("predicted-measured", "corrected, held out")
    assert held_out["x"] == [n["corrected_ms"] for n in networks if n["held_out"]]
    raw = page.trace("predicted-measured", "plain sum")
    assert raw["x"] == [n["predicted_ms"] for n in networks]
    assert raw["y"] == [n["measured_ms"] for n in networks]
    final = page.trace("predicted-measured", "final file")
    assert (final["x"], final["y"]) == ([0.238], [0.243])


def test_diagonal_and_noise_band(page: ParsedPage) -> None:
    exact = page.trace("predicted-measured", "exact")
    assert exact["x"] == exact["y"]
    band = page.trace("predicted-measured", "noise")
    ratios = [y / x for x, y in zip(band["x"], band["y"], strict=True)]
    assert ratios == pytest.approx([0.985, 0.985, 1.015, 1.015])
    layout = page.figures["predicted-measured"]["layout"]
    assert layout["xaxis"]["range"] == layout["yaxis"]["range"] == exact["x"]


def test_architecture_as_a_table(page: ParsedPage) -> None:
    rows = page.tables["layers"][1:]
    assert [row[2] for row in rows] == made.CHOSEN
    assert [row[1] for row in rows] == ["0", "1", "1", "1", "2", "2", "2"]
    assert rows[1][3] == "16 → 32, stride 2, 16\u00d716"
    assert rows[3][4] == "0 ms"
    expected = made.block_ms("k5_e6", made.SHAPES[1])
    assert float(rows[1][4].removesuffix(" ms")) == pytest.approx(expected, rel=5e-3)


def test_architecture_as_boxes(page: ParsedPage) -> None:
    boxes = [a for _, a in page.tags if a.get("class", "").startswith("box k")]
    drawn = [a for a in boxes if a["style"]][:6]  # seven layers, one of them a skip
    sizes = {
        block: tuple(int(part.split(":")[1].removesuffix("px")) for part in a["style"].split(";"))
        for block, a in zip([b for b in made.CHOSEN if b != "skip"], drawn, strict=True)
    }
    assert sizes["k5_e6"][0] > sizes["k3_e3"][0] == sizes["k3_e1"][0]  # width is the kernel
    assert sizes["k5_e6"][1] > sizes["k5_e3"][1] == sizes["k3_e3"][1] > sizes["k3_e1"][1]
    assert sizes["k3_e1_g2"] == sizes["k3_e1"]
    assert [a["class"] for a in drawn].count("box k3 grouped") == 1
    assert "Layer 1: k5_e616 → 32, stride 2, 16\u00d716" in page.text_of["architecture"]


def test_heatmap_holds_the_table(page: ParsedPage, made_folder: Path) -> None:
    heatmap = page.figures["table-0"]["data"][0]
    assert heatmap["y"] == made.BLOCKS
    assert heatmap["x"][:2] == ["16→16, 16\u00d716", "16→32, s2, 16\u00d716"]
    lines = [x for x in (made_folder / "table.csv").read_text().splitlines() if x[0] != "#"]
    rows = [row for row in csv.DictReader(lines) if row["block"] in made.BLOCKS]
    shown = [v for line in heatmap["z"] for v in line if v is not None]
    assert sorted(shown) == sorted(float(row["latency_ms"]) for row in rows)
    assert heatmap["z"][made.BLOCKS.index("skip")][1] is None  # not offered at a reduction
    at = heatmap["z"][made.BLOCKS.index("k5_e3")][1]
    assert at == made.block_ms("k5_e3", (16, 32, 2, 16, 16))


def test_environment(page: ParsedPage, made_folder: Path) -> None:
    rows = dict(row for row in page.tables["environment-table"])
    assert rows["fbnas"] == "0.1.0" and rows["seed"] == "3" and rows["threads"] == "1"
    assert "fbnas run experiment=quickstart seed=3" in page.text_of["environment"]


def test_report_needs_no_torch(made_folder: Path) -> None:
    code = (
        "import sys, pathlib; from fbnas.report import write_report; heavy = {'torch', 'plotly'};"
        "assert not heavy & set(sys.modules); write_report(pathlib.Path(sys.argv[1]));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(made_folder)], check=True)
