"""Methods that change a network's structure, by the real command, and their files."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import SMALL, write_space

from fbnas.commands import main
from fbnas.space import load_network
from fbnas.space.structure import Rounding

QUICK = [*SMALL[:2], "measure=false", "compression.fine_tuning.epochs=1"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("structure")
    (root / "a.yaml").write_text("space: tiny\nblocks: [k3_e3, k3_e3, k5_e1]\n")
    space = f"space={write_space(root)}"
    train = ["train", space, f"architecture={root / 'a.yaml'}", *SMALL[:2], "training.epochs=3"]
    assert main([*train, f"out={root / 'net'}"]) == 0
    return root / "net"


def test_a_factored_and_rounded_network_is_exported_and_judged(net: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    methods = ["method=[low_rank,fixed_point]", "compression.low_rank.speedup=1.5"]
    assert main(["compress", f"model={net}", *methods, *QUICK, f"out={small}"]) == 0
    result = read(small / "result.json")
    assert result["macs"] <= result["macs_before"] / 1.5
    assert [step["method"] for step in result["steps"]] == ["low_rank", "fixed_point"]
    network, _ = load_network(small)
    assert any(isinstance(module, Rounding) for module in network.modules())
    exported = tmp_path / "exported"
    assert main(["export", f"model={small}", f"out={exported}"]) == 0
    evaluate = ["evaluate", f"model={exported}/model.onnx", *SMALL[:2], "rounds=2"]
    assert main([*evaluate, f"out={tmp_path / 'e'}"]) == 0
    found = read(tmp_path / "e" / "result.json")["accuracy_top1"]
    assert found == pytest.approx(result["accuracy_top1"], abs=0.01)


def test_ternary_weights_come_out_of_the_command(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "ternary"
    assert main(["compress", f"model={net}", "method=ternary", *QUICK, f"out={out}"]) == 0
    network, _ = load_network(out)
    assert len(network.head[0].weight.unique()) <= 3
    assert len(network.classifier.linear.weight.unique()) > 3


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("low_rank.energy=2", "energy is 2; expected a fraction"),
        ("low_rank.speedup=fast", "speedup='fast'; expected a number"),
        ("low_rank.speedup=0.5", "speedup is 0.5; expected more than 1"),
        ("ternary.threshold=1.5", "threshold is 1.5; expected a fraction"),
        ("ternary.threshhold=0.5", "Did you mean 'compression.ternary.threshold'"),
        ("fixed_point.bits=1", "bits is 1; expected a whole number from 2 to 16"),
        ("fixed_point.static=yes_please", "expected true or false"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(
    option: str, words: str, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", f"model={net}", f"compression.{option}", f"out={tmp_path / 'x'}"]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
