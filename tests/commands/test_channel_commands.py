"""fbnas compress by steps and to a latency: stopped at some step of training, resumed, the same."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import SPACE
from torch import nn

from fbnas.commands import main
from fbnas.commands.composition import compose_single
from fbnas.commands.compress import DeviceMeasure
from fbnas.commands.stages import Judge, Stage, _compressed
from fbnas.latency import Device
from fbnas.space import (
    Architecture,
    NetworkCard,
    SearchSpace,
    build_network,
    count,
    load_network,
    save_network,
)
from fbnas.training import TrainingSettings, load_data, train

SMALL = ["data=digits", "data.limit=320", "compression.fine_tuning.epochs=2"]  # 4 steps an epoch
ITERATIVE = [
    "method=iterative_pruning",
    "measure=false",
    *(f"compression.iterative_pruning.{option}" for option in
      ("step_ratio=0.3", "steps=3", "round_to=4", "max_accuracy_drop=0.9", "images=64")),
]  # fmt: skip
LATENCY = [
    "method=latency_pruning",
    *(f"compression.latency_pruning.{option}" for option in
      ("latency=0.6", "granularity=4", "images=64")),
]  # fmt: skip


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    space = SearchSpace.from_dict(dict(SPACE))
    data = load_data("digits", limit=320)
    architecture = Architecture(("k3_e3", "k5_e1", "k3_e3"), space.name)
    torch.manual_seed(0)
    found = build_network(space, architecture, data.classes)
    train(found, data, settings=TrainingSettings(epochs=3))
    card = NetworkCard(space, architecture, data.class_names, data.mean, data.std)
    save_network(folder, found, card)
    return folder


@pytest.fixture(scope="module")
def once(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("steps") / "once"
    assert main(["compress", f"model={network}", *ITERATIVE, *SMALL, f"out={out}"]) == 0
    return out


class Busy:
    """A device that is a little slower each time it is asked: no two runs plan by the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        monkeypatch.setattr(DeviceMeasure, "__call__", lambda _, networks: self.measure(networks))

    def measure(self, networks: Sequence[nn.Module]) -> list[float]:
        self.asked.append(len(networks))
        macs = [
            count(each, getattr(each, "input_shape", (1, 8, 8))).macs if [*each.parameters()] else 0
            for each in networks
        ]
        return [(100 + len(self.asked)) * (200 + each) * 1e-7 for each in macs]


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    step, taken = torch.optim.SGD.step, []

    def count_and_step(self: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(1)
        if len(taken) == number:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", count_and_step)


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    result = json.loads((folder / "result.json").read_text())
    kept = ("params", "macs", "accuracy_top1", "validation_accuracy")
    return {key: result[key] for key in kept}, load_network(folder)[0].state_dict()


def assert_same(first: Path, second: Path) -> None:
    (numbers, weights), (others, more) = outcome(first), outcome(second)
    assert numbers == others
    assert weights.keys() == more.keys()
    assert all(torch.equal(value, more[name]) for name, value in weights.items())


@pytest.mark.parametrize("step", [3, 12, 22], ids="step {}".format)
def test_steps_go_on_where_they_were_stopped(
    network: Path, once: Path, tmp_path: Path, step: int
) -> None:
    command = ["compress", f"model={network}", *ITERATIVE, *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        assert main([*command, f"out={tmp_path / 'twice'}"]) == 130
    assert not (tmp_path / "twice" / "result.json").exists()
    assert main([*command, f"out={tmp_path / 'twice'}", "resume=true"]) == 0
    assert_same(once, tmp_path / "twice")


def test_every_step_is_trained_in_a_folder_of_its_own(network: Path, once: Path) -> None:
    assert sorted(path.name for path in once.glob("tuning_*")) == ["tuning_02", "tuning_03"]
    smaller = outcome(once)[0]["params"]
    assert smaller < sum(p.numel() for p in load_network(network)[0].parameters()) / 2


def test_a_plan_is_kept_whatever_is_measured_later(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", f"model={network}", *LATENCY, *SMALL, f"out={tmp_path / 'r'}"]
    device = Busy(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        assert main(command) == 130
    plan = (tmp_path / "r" / "latency_pruning.json").read_text()
    asked = len(device.asked)
    assert asked > 1
    assert main([*command, "resume=true"]) == 0
    assert device.asked[asked:] == [2]  # before and after, for the report
    assert (tmp_path / "r" / "latency_pruning.json").read_text() == plan
    sets = json.loads(plan)["sets"]
    found = load_network(tmp_path / "r")[0]
    assert all(found.get_submodule(x["layer"]).out_channels == x["after"] for x in sets)
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    before, after = (result["steps"][0][x]["latency_ms"] for x in ("before", "after"))
    assert after <= 0.62 * before


def test_the_table_of_one_run_plans_another_without_a_device(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", f"model={network}", *LATENCY, *SMALL]
    Busy(monkeypatch)
    assert main([*command, f"out={tmp_path / 'timed'}"]) == 0
    table = f"compression.latency_pruning.table={tmp_path / 'timed' / 'channel_steps.csv'}"
    assert main([*command, table, "measure=false", f"out={tmp_path / 'told'}"]) == 0
    plan = json.loads((tmp_path / "told" / "latency_pruning.json").read_text())
    assert plan["latency_ms"] <= 0.6 * plan["own_ms"]
    assert plan["tries"][0]["measured_ms"] is None


def test_a_latency_out_of_reach_is_refused_in_a_line(
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Busy(monkeypatch)
    low = "compression.latency_pruning.latency=0.01"
    command = ["compress", f"model={network}", *LATENCY, low, *SMALL, f"out={tmp_path / 'r'}"]
    assert main(command) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fbnas")]
    assert "latency is 0.01 of" in line
    assert "raise max_ratio" in line


def judge_in(folder: Path, network: Path, *options: str) -> tuple[Judge, Stage]:
    """Return the judge of a run in `folder` that has trained `network`, and its first stage."""
    shutil.copytree(network, folder / "train")
    (folder / "models").mkdir()
    config = compose_single("run", [*LATENCY[1:], *SMALL, *options])
    trained = Stage("fp32", folder / "fp32.onnx", "train", 0, 0, 0.0)
    return Judge(config, folder, load_data("digits", limit=320), Device()), trained


def test_a_stage_of_a_run_measures_for_the_methods_that_ask(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Busy(monkeypatch)
    both = "compression.methods=[channel_pruning,latency_pruning]"
    judge, trained = judge_in(tmp_path, network, both, "compression.pruning.round_to=4")
    assert _compressed("latency_pruning", trained, judge, trained=trained, resume=False).params > 0
    assert (tmp_path / "latency_pruning" / "channel_steps.csv").is_file()
    asked = len(device.asked)
    assert asked > 2
    assert _compressed("channel_pruning", trained, judge, trained=trained, resume=False).params > 0
    assert len(device.asked) == asked


def test_a_run_goes_on_without_a_latency_that_its_network_cannot_reach(
    network: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Busy(monkeypatch)
    low = [f"compression.latency_pruning.{x}" for x in ("latency=0.01", "max_ratio=0.01")]
    judge, trained = judge_in(tmp_path, network, *low)
    assert _compressed("latency_pruning", trained, judge, trained=trained, resume=False) is None
    assert "latency_pruning is left out: latency is 0.01 of" in capsys.readouterr().out
    assert not (tmp_path / "pruned" / "network.yaml").exists()


def test_the_default_of_a_run_prunes_as_far_as_the_device_gets_faster(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Busy(monkeypatch)
    judge, trained = judge_in(tmp_path, network, "compression.latency_pruning.latency=0.01")
    assert judge.config["compression"]["methods"] == ["latency_pruning", "int8"]
    stage = _compressed("latency_pruning", trained, judge, trained=trained, resume=False)
    assert stage is not None and stage.name == "pruned"
    whole, card = load_network(network)
    assert stage.macs < 0.8 * count(whole, card.input_shape).macs
    reached = json.loads((tmp_path / "pruned" / "latency_pruning.json").read_text())
    assert reached["asked"] == 0.01
