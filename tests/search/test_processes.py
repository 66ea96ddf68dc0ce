"""A search on two processes is the search of one: same draws, same numbers but for rounding."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from search_run import run
from torch import nn

from fbnas.errors import InputError
from fbnas.files import load_checkpoint, read_json, read_jsonl
from fbnas.training.processes import SyncedBatchNorm, part_of, synchronise_bn_

SCRIPT = Path(__file__).with_name("search_run.py")


def start(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return forked.run(SCRIPT, out, *options)


def finish(out: Path, *options: str) -> Path:
    process = start(out, *options)
    assert process.returncode == 0, process.stderr
    return out


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("single") / "run", "plain", "watch")


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("double") / "run", "plain", "watch", "devices=2")


def seen(out: Path, rank: int) -> list[dict[str, Any]]:
    """What a process held after every epoch."""
    files = sorted(out.parent.glob(f"rank_{rank}_epoch_*.pt"))
    return [torch.load(file, weights_only=True) for file in files]


def files(out: Path) -> list[str]:
    """What a run folder holds; as often as it holds log files: the folder of TensorBoard's."""
    return sorted(p.relative_to(out).parts[0] for p in out.rglob("*") if p.is_file())


def test_all_processes_hold_the_same_after_every_epoch(double: Path) -> None:
    first, second = seen(double, 0), seen(double, 1)
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        assert a["paths"] == b["paths"]
        assert len(a["paths"]) > 0
        for key in ("theta", "weights"):
            assert a[key].keys() == b[key].keys()
            for name in a[key]:
                assert torch.equal(a[key][name], b[key][name]), name


def test_two_processes_find_what_one_does(single: Path, double: Path) -> None:
    (one, two) = (seen(out, 0) for out in (single, double))
    for a, b in zip(one, two, strict=True):
        assert a["paths"] == b["paths"]
        for name, value in a["weights"].items():
            torch.testing.assert_close(b["weights"][name], value, rtol=2e-2, atol=2e-4)
        for name, value in a["theta"].items():
            torch.testing.assert_close(b["theta"][name], value, rtol=1e-2, atol=1e-3)
    rows, others = read_jsonl(single / "metrics.jsonl"), read_jsonl(double / "metrics.jsonl")
    for row, other in zip(rows, others, strict=True):
        for key in ("weights_loss", "theta_loss"):
            assert other[key] == (None if row[key] is None else pytest.approx(row[key], rel=2e-3))
        assert other["weights_accuracy"] == pytest.approx(row["weights_accuracy"], abs=0.02)
    assert files(double) == files(single)  # the second process adds none


def test_two_killed_processes_continue_to_the_same_numbers(double: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(out, "plain", "devices=2", "SIGKILL@9").returncode == -signal.SIGKILL
    assert (out / "checkpoint.pt").is_file()
    second = start(out, "plain", "devices=2", "resume", "strike=1", "SIGKILL@3")
    assert second.returncode != 0  # and the first ended: it would hold the pipes that start() reads
    assert start(out, "plain", "devices=2", "resume", "SIGINT@5").returncode != 0
    stopped = load_checkpoint(out / "checkpoint.pt")["position"]
    assert stopped[0] < 4  # in the middle: all processes agreed to stop
    assert not (out / "theta.json").exists()
    finish(out, "plain", "devices=2", "resume")
    assert read_json(out / "theta.json") == read_json(double / "theta.json")
    name = "supernet.safetensors"
    assert (out / name).read_bytes() == (double / name).read_bytes()


def test_a_checkpoint_of_another_search_is_refused_by_all(double: Path) -> None:
    refused = start(double, "plain", "devices=2", "resume", "seed=1")
    assert refused.returncode == 2
    assert "seed was 0, now 1" in refused.stderr


def test_batches_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be divided among 1 process.* and 3 part"):
        run(settings={"accumulate": 3})


def test_parts_make_up_the_batch() -> None:
    batch = torch.randperm(12)
    parts = [part_of(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat(parts), batch)


def test_synced_bn_keeps_the_tensors_and_is_plain_in_eval_mode() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    images = torch.randn(8, 3, 5, 5)
    net(images)
    names, weight, expected = list(net.state_dict()), net[0][1].weight, net.eval()(images)
    synchronise_bn_(net)
    assert isinstance(net[0][1], SyncedBatchNorm)
    assert net[0][1].weight is weight
    assert list(net.state_dict()) == names
    assert torch.equal(net(images), expected)
