"""Several runs of one command: real ones compared with single ones, and all that surrounds them."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_space, write_table

from fbnas.commands import COMMANDS, jobs, launchers, main
from fbnas.commands.composition import describe
from fbnas.commands.multirun import worst
from fbnas.commands.sweep import folder_name, plan
from fbnas.shipped import shipped_names

HERE = Path(__file__).parent
TINY = ["space=tiny.yaml", "table=table.csv", "data=digits", "data.limit=320", "search.epochs=3"]
COUNT = ["count", "architecture=fbnet_a"]
STRIKE_AT = 5  # SGD steps: in the second of three epochs
SEARCHED = ("theta.json", "supernet.safetensors", "space.yaml")


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def codes(out: str) -> dict[str, int | None]:
    return {row["name"]: row["exit_code"] for row in read(f"{out}/multirun.json")["jobs"]}


@pytest.fixture(autouse=True)
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let jobs be `stub_job.py`, which does what it is told for each seed."""

    def tell(**actions: str) -> None:
        told = {seed.removeprefix("seed_"): action for seed, action in actions.items()}
        monkeypatch.setenv("STUB", json.dumps(told))

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    monkeypatch.setattr(jobs, "COMMAND", (sys.executable, str(HERE / "stub_job.py")))
    tell()
    return tell


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Searches by themselves, with seeds 1 and 2."""
    root = tmp_path_factory.mktemp("searched")
    write_space(root)
    write_table(root / "table.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for seed in (1, 2):
            assert main(["search", *TINY, f"seed={seed}", f"out=single/seed={seed}"]) == 0
    return root


def test_a_folder_of_a_job_needs_no_quotes(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(searched)
    assert main(["sample", "run=single/seed=1", "count=1", "out=sampled/seed=1"]) == 0
    assert read("sampled/seed=1/result.json")["command"] == "sample"
    sweep = plan("sample", ["run=single/seed=1,single/seed=2", "out=r"])
    assert [config["run"] for config in sweep.configs] == ["single/seed=1", "single/seed=2"]


STRUCK = """
import os, signal, sys, time
import torch
from fbnas.commands import main

step, taken, told = torch.optim.SGD.step, [], []

def step_and_strike(self, *arguments, **options):
    taken.append(1)
    if len(taken) == {step} and "resume=true" not in sys.argv:
        stop = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda *said: (told.append(1), stop(*said)))
        os.kill(os.getppid(), signal.{name})
        while not told:
            time.sleep(0.01)
    return step(self, *arguments, **options)

torch.optim.SGD.step = step_and_strike
torch.set_num_threads(1)
sys.exit(main(sys.argv[1:]))
"""


def struck(name: str) -> tuple[str, ...]:
    """The command, which strikes whoever started it at a step and waits to be told to stop."""
    return (sys.executable, "-c", STRUCK.format(name=name, step=STRIKE_AT))


def test_jobs_stopped_and_resumed_are_the_same_as_commands_by_themselves(
    searched: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(searched)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "COMMAND", struck("SIGINT"))
        assert main(["search", "-m", *TINY, "seed=1,2", "out=several"]) == 130
    assert codes("several") == {"seed=1": 130, "seed=2": None}
    assert Path("several/seed=1/checkpoint.pt").is_file()
    assert not Path("several/seed=2").exists()
    shown = capfd.readouterr().err
    assert "interrupted. Continue with: fbnas search -m space=tiny.yaml" in shown
    assert "seed=1,2 out=several resume=true" in shown

    resumed = ["search", *TINY, "seed=1,2", "-m", "out=several", "resume=true", "launcher.jobs=2"]
    assert main(resumed) == 0
    rows = read("several/multirun.json")["jobs"]
    assert [(row["overrides"], row["exit_code"]) for row in rows] == [
        (["seed=1"], 0), (["seed=2"], 0)
    ]  # fmt: skip
    assert "epoch   1" in Path(rows[0]["log"]).read_text()  # of before
    for seed, row in zip((1, 2), rows, strict=True):
        single, job = searched / "single" / f"seed={seed}", searched / "several" / f"seed={seed}"
        for name in SEARCHED:
            assert (job / name).read_bytes() == (single / name).read_bytes(), name
        alone, result = read(single / "result.json"), read(job / "result.json")
        for key in set(alone) - {"seconds", "command_line"}:
            assert result[key] == alone[key], key
        assert result["command_line"].startswith(row["command_line"])
        assert row["result"]["predicted_latency_ms"] == alone["predicted_latency_ms"]
    assert len({(searched / f"single/seed={x}/theta.json").read_bytes() for x in (1, 2)}) == 2


def test_the_last_key_varies_fastest_and_lists_are_one_value() -> None:
    sweep = plan(
        "search",
        ["search.epochs=choice(5,6)", "table=[a.csv,b.csv]", "seed=range(1,4)", "out=my runs/a"],
    )
    assert [job.swept for job in sweep.jobs] == [
        (f"search.epochs={epochs}", f"seed={seed}") for epochs in (5, 6) for seed in (1, 2, 3)
    ]
    assert {str(config["table"]) for config in sweep.configs} == {"['a.csv', 'b.csv']"}
    assert [config["seed"] for config in sweep.configs] == [1, 2, 3, 1, 2, 3]
    last = sweep.jobs[-1]
    assert last.folder == Path("my runs/a/search.epochs=6+seed=3")
    assert sweep.configs[-1]["out"] == str(last.folder)
    sweep = plan("search", ["table=[a.csv,b.csv],c.csv", "target_ms=[1,2]", "out=r"])
    assert [config["table"] for config in sweep.configs] == [["a.csv", "b.csv"], "c.csv"]
    assert [job.name for job in sweep.jobs] == ["table=a.csv_b.csv", "table=c.csv"]


def test_groups_files_and_names_are_swept(tmp_path: Path) -> None:
    for name in ("my space", "b"):
        (tmp_path / name).mkdir()
        write_space(tmp_path / name).rename(tmp_path / name / "s.yaml")
    sweep = plan("search", ["space='my space/s.yaml',b/s.yaml,fbnet", "table=t", "out=r"])
    assert [config["space"]["name"] for config in sweep.configs] == ["tiny", "tiny", "fbnet"]
    assert [job.name for job in sweep.jobs] == [
        "space=my_space_s.yaml",
        "space=b_s.yaml",
        "space=fbnet",
    ]
    sweep = plan("count", ["architecture=glob(fbnet_*)", "out=r"])
    assert [config["architecture"] for config in sweep.configs] == shipped_names("architecture")
    sweep = plan(
        "profile", ["device.precision=fp32,int8", "table=${device.precision}.csv", "out=r"]
    )
    assert [config["table"] for config in sweep.configs] == ["fp32.csv", "int8.csv"]


def test_names_of_folders_are_short_and_safe() -> None:
    assert folder_name(["data.path=/a b/*?", "seed=-1"]) == "data.path=a_b+seed=-1"
    long = [folder_name([f"model={'x' * 300}{end}"]) for end in "ab"]
    assert len(set(long)) == 2
    assert all(len(name) < 200 for name in long)


REFUSED = [
    ("count -m architecture=fbnet_a out=r", "every key has one"),
    ("count -m architecture=fbnet_a seed=1,2", "needs out=DIR"),
    ("count -m architecture=fbnet_a seed=1,2 out=a,b", "'out=a,b' is several folders"),
    ("count -m architecture=fbnet_a seed=1,2 out=r${seed}", "expected one folder"),
    ("count -m architecture=fbnet_a seed=1,2 out=file", "out=file is a file"),
    ("count -m architecture=fbnet_a seed=1,2 out=full", "no multirun but other files"),
    ("count -m architecture=fbnet_a seed=1,2 out=r resume=true", "no multirun to resume"),
    ("count -m architecture=fbnet_a seed=1,2 out=r resume=yes", "expected true or false"),
    ("count -m architecture=fbnet_a seed=1,1 out=r", "would both write to r/seed=1"),
    ("count -m architecture=a/b,a_b out=r", "would both write to r/architecture=a_b"),
    ("count -m architecture=fbnet_a seed=1,2 seed=3 out=r", "seed is given 2 times"),
    ("count -m architecture=fbnet_a seed=interval(1,2) out=r", "no end of values"),
    ("count -m architecture=fbnet_a seed=1,[ out=r", "is not understood"),
    ("count -m architecture=fbnet_a seed=1,x out=r", "seed='x'; expected a whole number"),
    ("count -m architecture=fbnet_a,fbnet_x out=r", "Unknown architecture 'fbnet_x'"),
    ("count -m architecture=fbnet_a sed=1,2 out=r", "Did you mean 'seed'?"),
    ("run -m search.epochs=3,0 out=r", "search.epochs is 0"),
    ("run -m objective=target,hing out=r", "Did you mean 'hinge'?"),
    ("run -m device.precision=fp32,fp23 out=r", "Did you mean 'fp32'?"),
    ("search -m table=nowhere.csv seed=1,2 out=r", "nowhere.csv: no such file"),
    ("profile -m table=t.csv seed=1,2 out=r", "several jobs would write table=t.csv"),
    ("count -m architecture=fbnet_a seed=1,2 out=r launcher=slrum", "Did you mean 'slurm'?"),
    ("count -m architecture=fbnet_a seed=1,2 out=r launcher=local,slurm", "one launcher"),
    ("count -m architecture=fbnet_a seed=1,2 out=r launcher.jobs=0", "a whole number from 1"),
    (
        "count -m architecture=fbnet_a seed=1,2 out=r launcher.qos=x",
        "launcher=local has no such",
    ),
    ("count architecture=fbnet_a launcher.jobs=2 out=r", "expected -m"),
    ("count architecture=fbnet_a seed=1,2 out=r", "fbnas count -m seed=1,2"),
    ("-m", "fbnas search -m seed=1,2,3"),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_is_wrong_in_any_job_is_said_before_the_first_starts(
    line: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(jobs, "COMMAND", ("/nowhere",))
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/mine").write_text("")
    assert main(line.split()) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("launcher", "package"), [("submitit_local", "submitit"), ("slurm", "submitit"), ("ray", "ray")]
)
def test_a_missing_package_is_named_with_its_command(
    launcher: str,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: None)
    assert main([*COUNT, "-m", "seed=1,2", "out=r", f"launcher={launcher}"]) == 2
    shown = capsys.readouterr().err
    assert f"launcher={launcher}: {package} is not installed" in shown
    assert "pip install '.[" in shown
    assert not Path("r").exists()


def test_one_that_fails_stops_no_other_and_the_worst_code_counts(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stub(seed_1="wrong", seed_2="miss", seed_3="kill")
    assert main([*COUNT, "--multirun", "seed=range(1,5)", "out=r"]) == 1
    assert codes("r") == {"seed=1": 2, "seed=2": 3, "seed=3": 137, "seed=4": 0}
    rows = read("r/multirun.json")["jobs"]
    assert rows[0]["error"] == "no such luck"
    assert rows[1]["result"] == {"latency_ms": {"value": 2.0}, "target_ms": 1.0, "params": 102}
    shown = capsys.readouterr().out
    table = [x.split() for x in shown.splitlines() if x.startswith("  seed=")]
    assert [row[:2] for row in table] == [
        ["seed=1", "2"], ["seed=2", "3"], ["seed=3", "137"], ["seed=4", "0"]
    ]  # fmt: skip
    assert table[1][-1] == "102"
    assert "ended by SIGKILL" in shown

    # finished jobs are kept, with their codes; the others are done again
    stub(seed_1="miss", seed_2="fail")
    assert main([*COUNT, "-m", "seed=range(1,5)", "out=r", "resume=true"]) == 3
    assert codes("r") == {"seed=1": 3, "seed=2": 3, "seed=3": 0, "seed=4": 0}
    line = [*COUNT, "-m", "seed=range(1,5)", "out=r"]
    assert main(line) == 2
    assert "holds a multirun" in capsys.readouterr().err
    assert main([*line, "classes=10", "resume=true"]) == 2
    assert "was begun with another classes" in capsys.readouterr().err
    assert main(["doctor", "-m", "seed=1,2", "out=r", "resume=true"]) == 2
    assert "holds jobs of fbnas count" in capsys.readouterr().err

    # where nobody noted the code of a job, its result tells
    content = read("r/multirun.json")
    for row in content["jobs"]:
        row["exit_code"] = None
    Path("r/multirun.json").write_text(json.dumps(content))
    assert main([*line, "resume=true"]) == 3

    stub()
    Path("r/seed=1/old").write_text("")
    assert main([*COUNT, "-m", "seed=1,2", "out=r", "overwrite=true"]) == 0
    assert not Path("r/seed=1/old").exists()
    assert Path("r/seed=4/result.json").exists()


def test_the_worst_exit_code() -> None:
    assert [worst(x) for x in ([0], [0, 3], [3, 2, 0], [2, 1, 3], [0, 137], [3, 130])] == [
        0, 3, 2, 1, 1, 1
    ]  # fmt: skip


def test_jobs_run_side_by_side(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stub(seed_1="meet 2", seed_2="meet 2", seed_3="meet 3")
    line = [*COUNT, "-m", "seed=1,2,3", "out=r", "launcher.jobs=2"]
    assert main(line) == 0
    shown = capsys.readouterr()
    assert "[seed=1] seed 1 resume False meet" in shown.out


def need_submitit() -> None:
    if importlib.util.find_spec("submitit") is None:  # not importorskip: see import_submitit
        pytest.skip("submitit is not installed")


FOREIGN_HANDLER = """
import logging, os, sys
from fbnas.commands.launchers import import_submitit

class Handler(logging.StreamHandler):
    def close(self):
        sys.exit("closed")

kept = Handler()
os.environ["SUBMITIT_LOG_LEVEL"] = "DEBUG"
assert import_submitit().__name__ == "submitit" and not logging.getLogger("submitit").handlers
assert os.environ["SUBMITIT_LOG_LEVEL"] == "DEBUG"
os._exit(0)  # at its end logging closes every handler
"""


def test_submitit_leaves_the_log_handlers_of_others_open() -> None:
    need_submitit()
    ran = subprocess.run([sys.executable, "-c", FOREIGN_HANDLER], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_submitit_runs_jobs_and_what_runs_out_of_time_goes_on(
    stub: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    need_submitit()
    stub(seed_1="preempt", seed_2="fail")
    line = ["search", "-m", "table=t.csv", "seed=1,2", "out=r", "launcher=submitit_local"]
    Path("t.csv").write_text("")
    assert main([*line, "launcher.jobs=2"]) == 1
    assert codes("r") == {"seed=1": 0, "seed=2": 1}
    said = Path("r/logs/seed=1.log").read_text().splitlines()
    assert said == ["seed 1 resume False preempt", "stopped", "seed 1 resume True preempt"]
    assert "seed=2: no such luck" in capsys.readouterr().out


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The commands of a SLURM cluster that is this machine; returns where they keep their notes."""
    need_submitit()
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel"):
        file = folder / name
        file.write_text(f"#!{sys.executable}\n{(HERE / 'fake_slurm.py').read_text()}")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


def test_slurm_gets_one_array_and_finds_its_jobs_again(
    stub: Callable[..., None], cluster: Path
) -> None:
    stub(seed_1="miss")
    line = [*COUNT, "-m", "seed=1,2", "out=r", "launcher=slurm", "launcher.partition=gpu"]
    more = [
        "launcher.gpus=1",
        "launcher.memory_gb=8",
        "launcher.sbatch=[constraint=a100,exclusive]",
    ]
    assert main([*line, *more, "launcher.jobs=5", "launcher.setup=[export A=1]"]) == 3
    assert codes("r") == {"seed=1": 3, "seed=2": 0}
    asked = (cluster / "submitted.sh").read_text()
    for option in (
        "partition=gpu",
        "gpus-per-node=1",
        "mem=8GB",
        "constraint=a100",
        "exclusive",
        "time=240",
    ):
        assert f"#SBATCH --{option}\n" in asked
    assert "\nexport A=1\n" in asked
    assert [row["id"] for row in read("r/multirun.json")["jobs"]] == ["7_0", "7_1"]

    # one of them seems to be under way still: it is awaited, not submitted again
    (cluster / "submitted.sh").unlink()
    (ended,) = Path("r/submitit").glob("7_0*_result.pkl")
    ended.rename("kept.pkl")
    (cluster / "7_0").write_text(str(os.getpid()))
    launcher = launchers.Slurm()
    job = plan("count", [*COUNT[1:], "seed=1,2", "out=r"]).jobs[0]
    found = launcher.find(job, Path("r"), "7_0")
    assert found is not None
    assert found.poll() is None
    Path("kept.pkl").rename(ended)
    assert found.poll() == 3
    assert launcher.find(job, Path("r"), "7_0") is None
    assert not (cluster / "submitted.sh").exists()


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("local", signal.SIGINT),
        ("local", signal.SIGTERM),
        ("submitit_local", signal.SIGINT),
        ("slurm", signal.SIGINT),
        ("ray", signal.SIGINT),
    ],
)
def test_a_signal_stops_all_that_run(
    launcher: str,
    number: int,
    stub: Callable[..., None],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if launcher == "slurm":
        request.getfixturevalue("cluster")
    elif launcher == "submitit_local":
        need_submitit()
    elif launcher == "ray":
        pytest.importorskip("ray", reason="ray is not installed")
    stub(seed_1="wait", seed_2="strike 2")
    monkeypatch.setenv("STRUCK", str(os.getpid()))
    monkeypatch.setenv("SIGNAL", str(int(number)))
    seeds = "1,2" if launcher == "slurm" else "1,2,3"
    line = [*COUNT, "-m", f"seed={seeds}", "out=r", f"launcher={launcher}", "launcher.jobs=2"]
    line += ["launcher.cpus=0.5"] if launcher == "ray" else []
    assert main(line) == 130
    assert list(codes("r").values()) == [130, 130, None][: len(codes("r"))]
    assert read("r/multirun.json")["exit_code"] == 130
    for seed in (1, 2):
        assert Path(f"r/logs/seed={seed}.log").read_text().endswith("stopped\n")


def test_the_same_jobs_through_ray(stub: Callable[..., None]) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    stub(seed_1="miss")
    assert main([*COUNT, "-m", "seed=1,2,3", "out=r", "launcher=ray"]) == 3
    assert codes("r") == {"seed=1": 3, "seed=2": 0, "seed=3": 0}
    assert "seed 1 resume False" in Path("r/logs/seed=1.log").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_of_several_runs(command: str) -> None:
    shown = describe(command)
    assert f"fbnas {command} -m key=a,b runs once for each value" in shown
    assert "launcher=local | ray | slurm | submitit_local" in shown
