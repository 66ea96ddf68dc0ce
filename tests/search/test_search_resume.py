"""A search that is killed and resumed ends at exactly the numbers of one that was not."""

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from search_run import SETTINGS, Table, run
from torch import Tensor

from fbnas.errors import InputError
from fbnas.files import load_checkpoint, read_json, read_jsonl, save_checkpoint
from fbnas.search import Target, build_objective, loop, read_result, read_supernet

SCRIPT = Path(__file__).with_name("search_run.py")
WEIGHTS_STEPS, THETA_STEPS = 4, 1  # 160 training images: 128 for the weights, 32 for theta
WARMUP_STEPS = SETTINGS["warmup_epochs"] * WEIGHTS_STEPS
EPOCH_STEPS = WEIGHTS_STEPS + THETA_STEPS
SOFT = {  # as the published recipe: all blocks mixed
    "weights_on": "gates",
    "theta_step": "all",
    "tau": 5.0,
    "tau_final": None,
    "theta_passes": 2,
}


def start(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return forked.run(SCRIPT, out, *options)


def finish(out: Path, *options: str) -> None:
    process = start(out, *options)
    assert process.returncode == 0, process.stderr


def position(out: Path) -> list[Any]:
    return load_checkpoint(out / "checkpoint.pt")["position"]


def rows(out: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in read_jsonl(out / "metrics.jsonl")
    ]


def weights(out: Path) -> dict[str, Tensor]:
    space, _, classes = read_result(out)
    return read_supernet(out, space, classes).state_dict()


def assert_same_run(resumed: Path, whole: Path) -> None:
    assert read_json(resumed / "theta.json") == read_json(whole / "theta.json")
    assert rows(resumed) == rows(whole)
    expected = weights(whole)
    found = weights(resumed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


def test_sigkill_in_three_places(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)  # an older search's: a new one takes its checkpoint away
    assert start(out, "SIGKILL@1").returncode == -signal.SIGKILL
    assert not (out / "checkpoint.pt").exists()  # killed before the first: resume starts anew
    in_mid_warmup = WEIGHTS_STEPS + 2
    assert start(out, "resume", f"SIGKILL@{in_mid_warmup}").returncode == -signal.SIGKILL
    assert position(out) == [1, "weights", 1]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "ph')  # a kill in the middle of a line
    left = WARMUP_STEPS - WEIGHTS_STEPS - 1
    in_theta = left + WEIGHTS_STEPS + THETA_STEPS  # killed before theta's only step is saved
    assert start(out, "resume", f"SIGKILL@{in_theta}").returncode == -signal.SIGKILL
    assert position(out) == [2, "weights", WEIGHTS_STEPS]
    finish(out, "resume")
    assert_same_run(out, whole)


def test_sigint_after_theta_and_sigterm_in_mid_epoch(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    interrupted = start(out, f"SIGINT@{WARMUP_STEPS + EPOCH_STEPS}")
    assert "KeyboardInterrupt" in interrupted.stderr
    assert position(out) == [2, "theta", THETA_STEPS]
    assert not (out / "theta.json").exists()
    assert start(out, "resume", "SIGTERM@2").returncode != 0
    assert position(out) == [3, "weights", 2]
    finish(out, "resume")
    assert_same_run(out, whole)


@pytest.mark.parametrize("settings", [{}, SOFT], ids=["hard gates", "soft gates"])
def test_kill_between_a_row_and_its_checkpoint(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "whole", settings=settings)
    out = tmp_path / "run"
    save = loop.Loop.save

    def die_after_epoch_3(self: Any) -> None:
        if (self.epoch, self.step) == (3, 0):
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "save", die_after_epoch_3)
        with pytest.raises(KeyboardInterrupt):
            run(out, settings=settings)
    assert len(rows(out)) == 3  # the third row is written, its checkpoint is not
    assert position(out)[0] == 2
    resumed = run(out, resume=True, settings=settings)
    assert_same_run(out, tmp_path / "whole")
    for found, theta in zip(resumed.distributions, expected.distributions, strict=True):
        assert torch.equal(found.logits, theta.logits)


def test_resuming_a_finished_search_returns_its_result(tmp_path: Path, whole: Path) -> None:
    result = run(whole, resume=True)
    stored = read_result(whole)[1]
    for distribution, learned in zip(result.distributions, stored, strict=True):
        assert torch.equal(distribution.logits, learned.distribution.logits)
    assert len(result.history) == SETTINGS["epochs"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"settings": {"epochs": 5}}, "search.epochs was 4, now 5"),
        ({"settings": {"augment": {}}}, "search.augment"),
        ({"objective": build_objective("hinge")}, "objective"),
        ({"targets": [Target(Table(), 5.0), Target(Table(2.0), 8.0)]}, "budgets_ms"),
        ({"targets": [Target(Table(), 5.0), Target(Table(2.1), 9.0)]}, "tables"),
    ],
)
def test_another_search_s_checkpoint_is_refused(
    whole: Path, options: dict[str, Any], named: str
) -> None:
    before = (whole / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match="of another search") as refused:
        run(whole, resume=True, **options)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (whole / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "a training's", "without weights", "other shapes"])
def test_a_damaged_or_foreign_checkpoint_is_refused(
    tmp_path: Path, whole: Path, damage: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    state = load_checkpoint(whole / "checkpoint.pt")
    if damage == "a training's":
        save_checkpoint(path, {"identity": {}, "network": {}, "position": [0, 1]})
    elif damage == "without weights":
        save_checkpoint(path, {k: v for k, v in state.items() if k != "supernet"})
    elif damage == "other shapes":
        name = next(iter(state["supernet"]))
        save_checkpoint(path, {**state, "supernet": {**state["supernet"], name: torch.zeros(1)}})
    else:
        path.write_bytes((whole / "checkpoint.pt").read_bytes()[:5000])
    with pytest.raises(InputError, match="overwrite=true") as refused:
        run(tmp_path, resume=True)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_wait_for_images_adds_up(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    start(out, f"SIGINT@{WEIGHTS_STEPS + 2}")
    interrupted = load_checkpoint(out / "checkpoint.pt")
    assert 0 < interrupted["data_wait_seconds"] < interrupted["epoch_seconds"]
    save_checkpoint(out / "checkpoint.pt", {**interrupted, "data_wait_seconds": 1000.0})
    run(out, resume=True)
    waited = [row["data_wait_seconds"] for row in read_jsonl(out / "metrics.jsonl")]
    assert waited[1] > 1000 > waited[0] + waited[2]
    del interrupted["data_wait_seconds"]  # as an older fbnas wrote it
    save_checkpoint(out / "checkpoint.pt", interrupted)
    run(out, resume=True)
    assert_same_run(out, whole)
