"""fbnas search on several processes and in other precisions, as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import forked
import pytest
from tiny_run import write_space, write_table

from fbnas.commands import main

FBNAS = Path(sys.executable).with_name("fbnas")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
SMALL = ["data=digits", "data.limit=160", "search.epochs=2", "search.warmup_epochs=1",
         "search.batch_size=32", "search.device=cpu"]  # fmt: skip


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_space(tmp_path)
    write_table(tmp_path / "table.csv")
    return tmp_path


def search(out: str, *options: str) -> list[str]:
    return ["search", "space=tiny.yaml", "table=table.csv", "target_ms=8", *SMALL, *options,
            f"out={out}"]  # fmt: skip


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The first process is forked, those that it starts are not."""
    return forked.run(FBNAS, *arguments, cwd=Path.cwd())


def logits(out: str) -> list[Any]:
    target = json.loads(Path(out, "theta.json").read_text())["targets"][0]
    return [x for row in target["logits"] for x in row if x is not None]


def test_two_processes_torchrun_and_one_find_the_same(stand: Path) -> None:
    assert main(search("one")) == 0
    two = start(*search("two", "fabric.devices=2"))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("predicted") == 1  # one process speaks
    command = [*TORCHRUN, FBNAS, *search("elastic")]
    elastic = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert elastic.returncode == 0, elastic.stderr
    assert elastic.stdout.count("predicted") == 1
    assert logits("two") == pytest.approx(logits("one"), abs=1e-3)
    assert logits("elastic") == logits("two")
    assert Path("two", "result.json").is_file()


def test_no_process_outlives_a_first_that_is_killed_at_the_start(stand: Path) -> None:
    command = search("two", "fabric.devices=2")
    with subprocess.Popen([FBNAS, *command], stdout=PIPE, stderr=PIPE, text=True) as first:
        assert first.stderr
        said = iter(first.stderr.readline, "")
        started = any("GLOBAL_RANK: 0" in line for line in said)  # and so has just been the other
        first.kill()
        assert started
        first.communicate(timeout=60)  # until nobody holds the pipes
    assert not Path("two", "checkpoint.pt").exists()
    again = start(*command, "resume=true")
    assert again.returncode == 0, again.stderr


def test_a_search_on_two_processes_that_is_refused_says_so_once(stand: Path) -> None:
    refused = start(*search("two", "fabric.devices=2", "target_ms=99"))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "over the slowest network" in refused.stderr
    assert not Path("two").exists()


def test_bf16_and_clipped_gradients_search_too(stand: Path) -> None:
    assert main(search("half", "fabric.precision=bf16", "search.clip_norm=1.0")) == 0
    assert main(search("full", "search.clip_norm=1.0")) == 0
    assert logits("half") != logits("full")
    assert logits("half") == pytest.approx(logits("full"), abs=0.2)
    again = ["half", "resume=true", "search.clip_norm=1.0"]
    assert main(search(*again)) == 2  # at another precision it would be another search


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("fabric.devices=0", "fabric.devices is 0; expected a whole number from 1"),
        ("fabric.devices=two", "fabric.devices='two'; expected a whole number"),
        ("fabric.precision=fp23", "Did you mean 'fp32'?"),
        ("fabric.devises=2", "Did you mean 'fabric.devices'?"),
        ("search.accumulate=7", "cannot be divided among 1 process"),
        ("search.clip_norm=0", "search.clip_norm is 0"),
    ],
)
def test_wrong_values_are_refused_in_one_line(
    stand: Path, option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(search("out", option)) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
