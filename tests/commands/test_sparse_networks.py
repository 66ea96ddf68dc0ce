"""fbnas compress with the methods that zero single weights: real runs, small."""

import csv
import json
from pathlib import Path

import pytest
import torch
from tiny_run import SPACE

from fbnas.commands import main
from fbnas.space import (
    Architecture,
    NetworkCard,
    SearchSpace,
    build_network,
    load_network,
    save_network,
)
from fbnas.training.data import load_data

QUICK = [
    "data=digits",
    "data.limit=320",
    "training.epochs=1",
    "compression.fine_tuning.epochs=1",
    "measure=false",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with its first weights, which is enough to be compressed."""
    torch.manual_seed(0)
    space = SearchSpace.from_dict(dict(SPACE))
    architecture = Architecture(("k3_e3", "k5_e1", "skip"), space.name)
    data = load_data("digits", resize=True, space=space)
    network = build_network(space, architecture, classes=data.classes)
    card = NetworkCard(space, architecture, data.class_names, data.mean, data.std)
    folder = tmp_path_factory.mktemp("model") / "net"
    save_network(folder, network, card)
    return folder


def test_sparsity_by_sensitivity_then_a_ticket_then_fewer_channels(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sparse"
    methods = "method=[sparsity,lottery_ticket,channel_pruning]"
    options = [
        "compression.sparsity.scope=sensitivity",
        "compression.sparsity.scan=[0.5,0.9]",
        "compression.sparsity.steps=2",
        "compression.sparsity.sparsity=0.5",
        "compression.lottery_ticket.rounds=1",
        "compression.lottery_ticket.rewind_epochs=1",
        "compression.lottery_ticket.control=true",
    ]
    arguments = ["compress", f"model={model}", methods, *QUICK, *options, f"out={out}"]
    assert main(arguments) == 0
    assert "linear: 0." in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    first, *after = [step["after"]["nonzero"] for step in result["steps"]]
    assert result["steps"][0]["before"]["nonzero"] > first > after[0] > after[1]
    layers = list(csv.DictReader((out / "sparsity.csv").open()))
    zeros = sum(int(row["zeros"]) for row in layers)
    assert zeros == round(0.5 * sum(int(row["weights"]) for row in layers))
    assert "<svg" in (out / "sparsity_scan.html").read_text()
    rounds = list(csv.DictReader((out / "lottery.csv").open()))
    assert [float(row["sparsity"]) for row in rounds] == pytest.approx([0.5, 0.6], abs=0.01)
    assert rounds[1]["control_accuracy"]
    network, _ = load_network(out)
    kept = sum(int((p != 0).sum()) for p in network.parameters() if p.ndim > 1)
    assert kept == after[1]

    weights = (out / "weights.safetensors").read_bytes()
    assert main([*arguments, "resume=true"]) == 0  # every training is there already
    assert (out / "weights.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("compression.sparsity.sparsity=1.5", "sparsity is 1.5; expected a fraction"),
        ("compression.sparsity.kinds=[conv]", "Unknown kind of layer 'conv'"),
        ("compression.sparsity.kinds=linear", "expected a list, as in [a, b]"),
        ("compression.sparsity.steps=1.5", "expected a whole number"),
        ("compression.lottery_ticket.rounds=0", "rounds is 0; expected a whole number"),
        ("compression.lottery_ticket.rewind=1", "Did you mean"),
    ],
)
def test_wrong_options_of_sparse_methods_are_answered_in_a_line(
    option: str, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["compress", f"model={model}", "method=sparsity", *QUICK, option, f"out={out}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (out / "result.json").exists()
