"""Budgets on the command line: search, sample and run with energy, memory and parameters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import SMALL, write_space, write_table

from fbnas.commands import main
from fbnas.files import read_json
from fbnas.latency.table import LatencyTable

MJ = {"k3_e1": 2.0, "k3_e3": 4.0, "k5_e1": 3.0, "skip": 1.0}  # a network: 4 mJ to 15 mJ


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny.yaml, plain.csv and table.csv, which knows energy and peak memory."""
    monkeypatch.chdir(tmp_path)
    write_space(tmp_path)
    plain = LatencyTable.load(write_table(tmp_path / "plain.csv"))
    entries = [
        replace(entry, energy_mj=mj, peak_mb=mj / 10)
        for entry in plain.entries
        for mj in [MJ.get(entry.shape.block, 1.0) if entry.samples else 0.0]
    ]
    LatencyTable(plain.header, entries).save(tmp_path / "table.csv")
    return tmp_path


def search(*options: str, table: str = "table.csv") -> int:
    shown = ["space=tiny.yaml", f"table={table}", "data=digits", "data.limit=200"]
    return main(["search", *shown, "search.epochs=3", "out=s", *options])


def chosen(folder: str, name: str = "01") -> dict[str, Any]:
    return yaml.safe_load((Path(folder) / "architectures" / f"{name}.yaml").read_text())


def test_search_and_sample_within_several_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    assert search("target_mj=[9,12]", "target_ms=[null,8]", "target_mb=0.35") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("(budgets 9 mJ, 0.35 MB)")
    assert lines[1].endswith("(budgets 8 ms, 12 mJ, 0.35 MB)")
    result = read_json(Path("s/result.json"))
    for target, line in zip(result["targets"], lines, strict=False):
        assert target["predicted_energy_mj"] <= target["target_mj"]
        assert target["predicted_peak_mb"] <= target["target_mb"] == 0.35
        assert "k3_e3" not in target["architecture"]
        ms, mj = target["predicted_latency_ms"], target["predicted_energy_mj"]
        mb, params = target["predicted_peak_mb"], target["params"]
        assert f"predicted {ms:.4g} ms, {mj:.4g} mJ, {mb:.4g} MB, {params} params" in line
    assert "target_ms" not in result["targets"][0]
    assert result["targets"][1]["predicted_latency_ms"] <= result["targets"][1]["target_ms"] == 8

    assert main(["sample", "run=s", "out=a", "count=2", "random=1"]) == 0
    best = chosen("a")
    assert best["blocks"] == result["targets"][0]["architecture"]
    assert best["predicted_energy_mj"] == result["targets"][0]["predicted_energy_mj"]
    assert "predicted_peak_mb" in chosen("a", "random_01")
    most = best["params"] - 1
    assert main(["sample", "run=s", "out=b", f"max_params={most}", "target_mj=8"]) == 0
    assert chosen("b")["params"] <= most
    assert chosen("b")["predicted_energy_mj"] <= 8
    assert read_json(Path("b/result.json"))["target_mj"] == 8
    assert main(["report", "run=s"]) == 0


def test_run_within_other_budgets_than_latency(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["space=tiny.yaml", "table=table.csv", "networks=0", "candidates=2", "out=r"]
    assert main(["run", *SMALL, *given, "target_mj=10", "max_params=1e5"]) == 0
    shown = capsys.readouterr().out
    assert "2/5 search in space tiny for 10 mJ, 100000 params" in shown
    result = read_json(Path("r/result.json"))
    mj, params = result["predicted_energy_mj"], chosen("r", "chosen")["params"]
    assert mj <= result["target_mj"] == 10
    assert params <= result["max_params"] == 1e5
    last = shown.splitlines()[-1]
    assert f"energy {mj:.4g} of 10 mJ by the table, params {params} of 100000 params" in last
    assert "asked" not in last


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["target_mj=3"], "target_mj=3 is too low: in this space the lowest needs"),
        (["target_mj=-1"], "target_mj=-1; expected a positive number of millijoules"),
        (["target_mb=abc"], "target_mb='abc'; expected a number"),
        (["max_params=[1,abc]"], "max_params='abc'; expected a positive number of parameters"),
        (["target_mj=[8,9]", "target_mb=[1,2,3]"], "2 values of target_mj for 3 targets"),
        (["table=plain.csv", "target_mj=9"], "has no column energy_mj"),
        (["target_mj=9", "objective=fbnet"], "give target_ms as well"),
        (["target_ms=4", "target_mj=5", "max_params=10"], "max_params=10 is too low"),
    ],
)
def test_budgets_that_cannot_be_are_refused_before_anything_is_written(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(*options) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert not Path("s").exists()


def test_sample_refuses_a_budget_that_the_search_knew_nothing_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert search("target_ms=8", table="plain.csv") == 0
    assert main(["sample", "run=s", "out=a", "target_mj=9"]) == 2
    assert "target_mj=9; the search's table had no column energy_mj" in capsys.readouterr().err
    assert main(["sample", "run=s", "out=a", "max_params=100000"]) == 0
