"""A training that is killed and resumed ends at exactly the numbers of one that was not."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from training_run import main

from fbnas.files import load_checkpoint, read_jsonl, save_checkpoint

SCRIPT = Path(__file__).with_name("training_run.py")
STEPS = 5  # an epoch of training_run.py: 160 images, batches of 32


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return forked.run(SCRIPT, out, out.with_suffix(".pt"), *options)


def finish(out: Path, *options: str) -> dict[str, Any]:
    process = run(out, *options)
    assert process.returncode == 0, process.stderr
    return torch.load(out.with_suffix(".pt"), weights_only=True)


def position(out: Path) -> list[int]:
    return load_checkpoint(out / "checkpoint.pt")["position"]


def without_seconds(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if "seconds" not in key} for row in history]


def assert_equal(resumed: dict[str, Any], whole: dict[str, Any], out: Path) -> None:
    assert without_seconds(resumed["history"]) == without_seconds(whole["history"])
    assert without_seconds(read_jsonl(out / "metrics.jsonl")) == without_seconds(whole["history"])
    assert resumed["weights"].keys() == whole["weights"].keys()
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    main(str(out), str(out.with_suffix(".pt")))
    return out, torch.load(out.with_suffix(".pt"), weights_only=True)


def test_sigkill_twice(tmp_path: Path, whole_run: tuple[Path, dict[str, Any]]) -> None:
    out = tmp_path / "run"
    assert run(out, "SIGKILL@2").returncode == -signal.SIGKILL
    assert not (out / "checkpoint.pt").exists()  # killed before the first: resume starts anew
    assert run(out, "resume", f"SIGKILL@{STEPS + 3}").returncode == -signal.SIGKILL
    assert position(out) == [1, 0]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "lo')  # a kill in the middle of a line
    assert_equal(finish(out, "resume"), whole_run[1], out)


def test_sigint_in_mid_epoch_and_at_its_end(
    tmp_path: Path, whole_run: tuple[Path, dict[str, Any]]
) -> None:
    out = tmp_path / "run"
    interrupted = run(out, f"SIGINT@{STEPS + 2}")
    assert "KeyboardInterrupt" in interrupted.stderr
    assert position(out) == [1, 2]
    assert run(out, "resume", f"SIGTERM@{STEPS - 2}").returncode != 0
    assert position(out) == [2, 0]
    assert_equal(finish(out, "resume"), whole_run[1], out)


def test_resuming_a_finished_run_returns_its_result(
    whole_run: tuple[Path, dict[str, Any]],
) -> None:
    out, result = whole_run
    main(str(out), str(out.with_suffix(".pt")), "resume")
    assert_equal(torch.load(out.with_suffix(".pt"), weights_only=True), result, out)


def test_the_wait_for_images_adds_up(
    tmp_path: Path, whole_run: tuple[Path, dict[str, Any]]
) -> None:
    out = tmp_path / "run"
    run(out, f"SIGINT@{STEPS + 2}")
    interrupted = load_checkpoint(out / "checkpoint.pt")
    assert 0 < interrupted["data_wait_seconds"] < interrupted["seconds"]
    save_checkpoint(out / "checkpoint.pt", {**interrupted, "data_wait_seconds": 1000.0})
    main(str(out), str(out.with_suffix(".pt")), "resume")
    waited = [row["data_wait_seconds"] for row in read_jsonl(out / "metrics.jsonl")]
    assert waited[1] > 1000 > waited[0] + waited[2]
    del interrupted["data_wait_seconds"]  # as an older fbnas wrote it
    save_checkpoint(out / "checkpoint.pt", interrupted)
    main(str(out), str(out.with_suffix(".pt")), "resume")
    resumed = torch.load(out.with_suffix(".pt"), weights_only=True)
    assert_equal(resumed, whole_run[1], out)
