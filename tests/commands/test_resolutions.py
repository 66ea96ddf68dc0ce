"""Several resolutions of one space in a search: one supernet, and a theta for each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import SMALL, write_space

from fbnas.commands import main
from fbnas.files import read_jsonl
from fbnas.latency.table import LatencyTable
from fbnas.search import read_result, read_supernet
from fbnas.space import Architecture, SearchSpace, load_network

QUICK = [x for x in SMALL if not x.startswith("compression")]
SIDES = [8, 12]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the space, one table with the rows of both sides, and the search of both."""
    root = tmp_path_factory.mktemp("sides")
    space = f"space={write_space(root)}"
    planned = ["device=roofline", "device.gmacs_per_s=1", "classes=10"]
    for side in SIDES:
        at = [f"space.resolution={side}", f"table={root / 'table.csv'}"]
        assert main(["profile", space, *at, *planned]) == 0
    assert main(["search", *searching(root), f"out={root / 's'}"]) == 0
    return root


def searching(root: Path) -> list[str]:
    sides = ["resolution=[8,12]", "target_fraction=0.5", "search.warmup_epochs=1"]
    return [f"space={root / 'tiny.yaml'}", f"table={root / 'table.csv'}", *sides, *QUICK[:-1]]


def targets(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "result.json").read_text())["targets"]
    return found


def test_each_target_costs_what_the_table_says_at_its_resolution(place: Path) -> None:
    table, space = LatencyTable.load(place / "table.csv"), SearchSpace.load(place / "tiny.yaml")
    found = targets(place / "s")
    assert [target["resolution"] for target in found] == SIDES
    for target in found:
        latency_ms, base_ms = table.tensor(space.at(target["resolution"]), classes=10)
        path = Architecture(tuple(target["architecture"])).path(space)
        expected = base_ms + sum(float(latency_ms[i, choice]) for i, choice in enumerate(path))
        assert target["predicted_latency_ms"] == pytest.approx(expected)
    assert found[1]["predicted_latency_ms"] > 1.5 * found[0]["predicted_latency_ms"]


def test_one_supernet_serves_both(place: Path) -> None:
    space, learned, classes = read_result(place / "s")
    assert [x.distribution.space for x in learned] == [space.at(side) for side in SIDES]
    supernet = read_supernet(place / "s", space, classes)
    for side in SIDES:
        assert supernet(torch.zeros(2, 1, side, side), [0, 0, 0]).shape == (2, 10)
    rows = read_jsonl(place / "s" / "metrics.jsonl")
    assert len(rows[-1]["targets"]) == 2


def test_sample_train_and_export_are_at_the_targets_resolution(place: Path) -> None:
    for number, side in enumerate(SIDES):
        ranked = ["rank=shared_weights", "candidates=4", "count=1", "data.limit=320"]
        out = place / f"sampled_{side}"
        sample = ["sample", f"run={place / 's'}", f"target={number}", *ranked, f"out={out}"]
        assert main(sample) == 0
        file = out / "architectures" / "01.yaml"
        assert yaml.safe_load(file.read_text())["resolution"] == side
        trained = place / f"trained_{side}"
        start = [f"supernet={place / 's'}", f"space={place / 'tiny.yaml'}", "training.epochs=1"]
        given = [f"architecture={file}", "data.limit=320", f"out={trained}"]
        assert main(["train", *given, *start]) == 0
        network, card = load_network(trained)
        assert network.input_shape == card.input_shape == (1, side, side)
        files = place / f"files_{side}"
        assert main(["export", f"model={trained}", "measure=false", f"out={files}"]) == 0
        assert f"({side}, {side})" in (files / "classify_onnx.py").read_text()


def test_an_interrupted_search_ends_at_the_same_numbers(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = torch.optim.SGD.step, []

    def stop_at_nine(self: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(1)
        if len(taken) == 9:
            raise KeyboardInterrupt  # before the step, in the third of the epochs
        return step(self, *arguments, **options)

    arguments = ["search", *searching(place), f"out={place / 'broken'}"]
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.SGD, "step", stop_at_nine)
        assert main(arguments) == 130
    assert main([*arguments, "resume=true"]) == 0
    assert targets(place / "broken") == targets(place / "s")
    names = ("s", "broken")
    whole, resumed = (json.loads((place / name / "theta.json").read_text()) for name in names)
    assert resumed == whole
    space, _, classes = read_result(place / "s")
    first, second = (read_supernet(place / x, space, classes).state_dict() for x in names)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("resolution=[8,16]", "space.resolution=16"),
        ("resolution=0", "resolution=0; expected a whole number from 1"),
        ("resolution=[8,big]", "resolution='big'; expected a whole number of pixels"),
        ("resolution=[2]", "expected at least 2x2"),
    ],
)
def test_resolutions_that_cannot_be_searched_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    assert main(["search", *searching(place), option, f"out={place / 'x'}"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
