"""Several targets in one search: as options, as a list, as a front."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import FASTEST_MS, SLOWEST_MS, SPACE, write_space, write_table

from fbnas.commands import main
from fbnas.commands.targets import targets_asked
from fbnas.files import read_json

NONE: dict[str, Any] = {
    "table": "a.csv",
    "target_ms": None,
    "target_mj": None,
    "target_mb": None,
    "max_params": None,
    "target_fraction": 0.5,
    "resolution": None,
    "targets": None,
    "count": 3,
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_space(tmp_path)
    for name in ("a.csv", "b.csv"):
        write_table(tmp_path / name)


def asked(**options: Any) -> list[tuple[str, Any, float]]:
    found = targets_asked({**NONE, **options})
    return [(str(a.table), a.budgets["target_ms"], a.fraction) for a in found]


def test_options_pair_up() -> None:
    assert asked(target_ms=8) == [("a.csv", 8, 0.5)]
    assert asked(table=["a.csv", "b.csv"], target_ms=[8, 9]) == [
        ("a.csv", 8, 0.5),
        ("b.csv", 9, 0.5),
    ]
    assert asked(target_fraction=[0.3, 0.6]) == [("a.csv", None, 0.3), ("a.csv", None, 0.6)]


def test_a_front_spreads_budgets_over_every_table() -> None:
    front = asked(table=["a.csv", "b.csv"], targets="pareto")
    assert [(table, ms) for table, ms, _ in front] == [("a.csv", None)] * 3 + [("b.csv", None)] * 3
    assert [fraction for *_, fraction in front] == pytest.approx([0.1, 0.5, 0.9] * 2)
    assert [fraction for *_, fraction in asked(targets="pareto", count=1)] == [0.5]


def test_a_list_says_each_target_by_itself() -> None:
    listed = [{"table": "b.csv", "target_ms": 7}, {"target_fraction": 0.2}]
    assert asked(targets=listed) == [("b.csv", 7, 0.5), ("a.csv", None, 0.2)]


def search(*options: str) -> int:
    small = ["data=digits", "data.limit=200", "search.epochs=3", "space=tiny.yaml"]
    return main(["search", *small, "out=s", *options])


def test_one_search_gives_the_whole_front_and_uses_every_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert search("table=[a.csv,b.csv]", "targets=pareto", "count=2") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5  # four targets, and what is next
    targets = read_json(Path("s/result.json"))["targets"]
    low, high = (FASTEST_MS + f * (SLOWEST_MS - FASTEST_MS) for f in (0.1, 0.9))
    assert [t["target_ms"] for t in targets] == pytest.approx([low, high] * 2)
    for target in targets:
        assert 0.9 * target["target_ms"] <= target["predicted_latency_ms"] <= target["target_ms"]
    judged = read_json(Path("s/front.json"))
    rows = judged["networks"]
    chosen = [row for row in rows if row["kind"] == "target"]
    assert [row["architecture"] for row in chosen] == [t["architecture"] for t in targets]
    assert [row["target"] for row in chosen] == [0, 1, 2, 3]
    uniform = [row["architecture"] for row in rows if row["kind"] == "uniform"]
    assert uniform == [[block] * 3 for block in SPACE["blocks"]]
    drawn = [row for row in rows if row["kind"] == "random"]
    assert {row["target"] for row in drawn} == {0, 1, 2, 3}
    costs = read_json(Path("s/theta.json"))["targets"]
    for row in drawn:
        layers = zip(costs[row["target"]]["latency_ms"], row["architecture"], strict=True)
        spent = sum(layer[SPACE["blocks"].index(block)] for layer, block in layers)
        assert costs[row["target"]]["base_ms"] + spent <= targets[row["target"]]["target_ms"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_targets_from_a_file_of_the_user(tmp_path: Path) -> None:
    content = {"targets": [{"table": "a.csv", "target_ms": 6}, {"table": "b.csv", "target_ms": 9}]}
    (tmp_path / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content))
    assert search("experiment=mine.yaml", "table=a.csv") == 0
    found = read_json(Path("s/result.json"))["targets"]
    assert [t["target_ms"] for t in found] == [6, 9]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["targets=paretto"], "Did you mean 'pareto'?"),
        (["targets=pareto", "target_ms=8"], "expected no target_ms beside it"),
        (["targets=pareto", "count=0"], "count=0; expected a whole number from 1"),
        (["targets=[]"], "expected at least one target"),
        (["targets=[8,9]"], "targets[0] is 8; expected a mapping"),
        (["targets=[{tabel: a.csv}]"], "Did you mean 'table'?"),
        (["targets=[{target_ms: 8}]", "target_fraction=[0.2,0.3]"], "leaves lists to pair up"),
        (["target_fraction=[0.2,abc]"], "target_fraction='abc'; expected a number between 0"),
        (["targets=[{target_ms: 99}]"], "over the slowest network"),
        (["targets=[{table: c.csv, target_ms: 8}]"], "c.csv: no such latency table"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_written(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search("table=a.csv", *options) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
    assert not Path("s").exists()
