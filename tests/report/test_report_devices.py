"""Networks made for one device on another: predicted by a search's tables, measured, given."""

from pathlib import Path
from typing import Any

import made_run as made
import pytest
from parsed_page import ParsedPage

from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.report import build_comparison, write_report


def write_page(folder: Path, html: str) -> ParsedPage:
    (folder / "page.html").write_text(html)
    return ParsedPage(folder / "page.html")


def test_a_search_with_two_tables_predicts_the_matrix(tmp_path: Path) -> None:
    made.write_search(tmp_path, (0.25, 0.25))
    theta = read_json(tmp_path / "theta.json")
    first, second = theta["targets"]
    first["table"], second["table"] = "phone.csv", "board.csv"
    second["base_ms"] = 0.1
    second["latency_ms"] = [[c and 2 * c for c in row] for row in second["latency_ms"]]
    write_json(tmp_path / "theta.json", theta)
    other = ["k3_e1"] * 7
    targets = [{"architecture": made.CHOSEN}, {"architecture": other}]
    write_json(tmp_path / "result.json", {"command": "search", "targets": targets})
    (heat,) = ParsedPage(write_report(tmp_path)).figures["devices-0"]["data"]
    assert heat["x"] == ["phone", "board"]

    def cost(blocks: list[str], factor: float, base: float) -> float:
        return base + factor * sum(map(made.block_ms, blocks, made.SHAPES))

    own = cost(made.CHOSEN, 1, made.BASE_MS), cost(other, 2, 0.1)
    assert heat["z"][0] == pytest.approx([0, 100 * (cost(made.CHOSEN, 2, 0.1) / own[1] - 1)])
    assert heat["z"][1] == pytest.approx([100 * (cost(other, 1, made.BASE_MS) / own[0] - 1), 0])
    assert heat["text"][1][1].endswith("<br>its own")


def evaluation(folder: Path, **fields: Any) -> Path:
    device = {"name": "local", "runtime": "openvino", "precision": "int8"}
    result = {"command": "evaluate", "architecture": made.CHOSEN, "device": device}
    write_json(folder / "result.json", result | {"latency_ms": made.latency(0.3)} | fields)
    return folder


def test_evaluations_of_a_run_elsewhere_are_measured(run_folder: Path, tmp_path: Path) -> None:
    elsewhere = evaluation(tmp_path / "there")
    page = write_page(tmp_path, build_comparison([run_folder, elsewhere], tmp_path))
    (heat,) = page.figures["devices-0"]["data"]
    assert heat["y"] == ["run"] and heat["x"] == ["onnxruntime<br>int8", "openvino<br>int8"]
    assert [t.replace("\u202f", " ") for t in heat["text"][0]] == [
        "0.243 ms<br>its own",
        "0.300 ms",
    ]


def test_a_matrix_that_was_given(run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cross.csv"
    file.write_text("network,device,measured_ms,more\na,a,1,x\na,b,2,x\nb,a,1.5,x\nb,b,4,x\n")
    page = ParsedPage(write_report(run_folder, cross_device=file))
    (heat,) = page.figures["devices-0"]["data"]
    assert heat["z"] == [[0.0, -50.0], [50.0, 0.0]]
    assert page.tables["devices-table-0"][2][1:] == ["1.50 ms+50.0 %", "4.00 msits own"]
    file.write_text("network,device\na,a\n")
    with pytest.raises(InputError, match=r"cross\.csv: the columns measured_ms are missing"):
        write_report(run_folder, cross_device=file)
    with pytest.raises(InputError, match=r"cross_device=nowhere\.csv cannot be read; expected"):
        write_report(run_folder, cross_device=Path("nowhere.csv"))
