"""Measuring for real on this machine: a process of its own, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.latency import runner
from fbnas.latency.checks import check_path
from fbnas.latency.converting import lacking, needed
from fbnas.latency.devices import Device, Measurement, device_from
from fbnas.latency.runtimes import RUNTIMES, available_runtime, runtime

ROOT = Path(__file__).parents[2]
LONG_JOB = """
import sys; from pathlib import Path; from fbnas.latency.devices import Device
files = sorted(Path(sys.argv[1]).glob("*.onnx"))
Device().measure(files, rounds=int(sys.argv[3]), work=Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for width in (1, 64):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3))
        paths.append(folder / f"{width:03d}.onnx")
        Device().compile(module, (3, 32, 32), paths[-1])
    return paths


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited a minute in vain"
        time.sleep(0.02)


def finished_rounds(work: Path) -> int:
    path = work / "timings.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def parent(files: list[Path], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that measures for longer than any test, three rounds into it."""
    command = [sys.executable, "-c", LONG_JOB, str(files[0].parent), str(tmp_path), "200000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        try:
            wait_for(lambda: finished_rounds(tmp_path) >= 3)
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_runtime_measures_at_each_of_its_precisions(
    name: str, threads: int, tmp_path: Path
) -> None:
    file, elsewhere = runtime(name), os.environ.get(f"FBNAS_{name.upper()}_PYTHON")
    if not file.available() and elsewhere is None:
        pytest.skip(f"{name} is not installed here ({file.INSTALL})")
    for precision in file.PRECISIONS:
        if lacking(needed(file, precision)) and elsewhere is None:
            continue  # test_runtimes.py says so
        provider = "compiled" if (name, precision) == ("pytorch", "int8") else ""
        device = Device(
            runtime=name, provider=provider, precision=precision, threads=threads, python=elsewhere
        )
        path = tmp_path / f"{precision}{device.suffix}"
        device.compile(nn.Conv2d(3, 4, 3), (3, 8, 8), path)
        measurement = device.measure([path], rounds=3)
        timing = measurement.whole[0]
        assert 0 < timing.low_ms <= timing.latency_ms <= timing.high_ms
        assert timing.samples >= 3
        images = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)
        assert device.scores(path, images).shape == (5, 4, 6, 6)


def test_more_work_takes_longer(files: list[Path]) -> None:
    narrow, wide = Device().measure(files, rounds=5).whole
    assert narrow.latency_ms * 2 < wide.latency_ms  # 64 times the multiply-adds


def test_a_killed_parent_takes_the_child_along_and_the_job_continues(
    parent: subprocess.Popen[bytes], files: list[Path], tmp_path: Path
) -> None:
    (child,) = children(parent.pid)
    parent.kill()
    parent.wait()
    wait_for(lambda: not runs(child))
    with (tmp_path / "timings.jsonl").open("a") as timings:
        timings.write('{"round": 99, "ms": [0.')  # what a kill in mid-line leaves
    before = (tmp_path / "timings.jsonl").read_text().splitlines()[:-1]
    measurement = Device().measure(files, rounds=len(before) + 2, work=tmp_path)
    after = (tmp_path / "timings.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    assert len(measurement.samples_ms) >= len(before) + 2
    assert [json.loads(line)["round"] for line in after] == list(range(len(after)))


def test_ctrl_c_ends_the_child(parent: subprocess.Popen[bytes]) -> None:
    (child,) = children(parent.pid)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert errors.decode().rstrip().endswith("KeyboardInterrupt")
    assert not runs(child)


def test_a_killed_child_is_reported(parent: subprocess.Popen[bytes]) -> None:
    os.kill(children(parent.pid)[0], signal.SIGKILL)
    _, errors = parent.communicate(timeout=60)
    assert "RuntimeError: the measuring process ended early (exit code -9)" in errors.decode()


def test_finished_rounds_are_kept_and_another_jobs_rounds_are_not(
    files: list[Path], tmp_path: Path
) -> None:
    def measured(rounds: int, seed: int) -> np.ndarray:
        return Device().measure(files, rounds=rounds, seed=seed, work=tmp_path).samples_ms

    first = measured(3, seed=0)
    steps: list[int] = []
    more = Device().measure(files, rounds=8, work=tmp_path, progress=steps.append).samples_ms
    assert np.array_equal(more[:3], first[:3], equal_nan=True)
    assert steps[0] >= 3
    assert sum(steps) == 8
    assert not np.array_equal(measured(3, seed=1)[:3], first[:3])


@pytest.mark.parametrize(
    ("floors", "made", "kept"), [((0.2, 0.01), 2, 0.01), ((0.3, 0.06, 0.2, 0.1, 0.01), 4, 0.06)]
)
def test_on_a_busy_machine_the_quietest_of_four_counts(
    floors: tuple[float, ...], made: int, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def measure(*_: object, seed: int, **__: object) -> Measurement:
        seeds.append(seed)
        return Measurement((), floors[len(seeds) - 1], np.empty((0, 0)))

    monkeypatch.setattr(Device, "measure", measure)
    assert Device().measure_quietly([], "Timing", seed=7).noise_floor == kept
    assert seeds == list(range(7, 7 + made))


def test_wrong_input_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rounds is 1; expected at least 2"):
        Device().measure(files, rounds=1)
    with pytest.raises(InputError, match=r"none\.onnx: no such model file"):
        Device().measure([tmp_path / "none.onnx"])
    (tmp_path / "cut.onnx").write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(InputError, match=r"cut\.onnx cannot be run by onnxruntime: .*expected a"):
        Device().measure([tmp_path / "cut.onnx"])
    with pytest.raises(InputError, match=r"Unknown precision 'in8'. Did you mean 'int8'\?"):
        Device(precision="in8")
    with pytest.raises(InputError, match="Unknown runtime 'onnx'. Did you mean 'onnxruntime'"):
        Device(runtime="onnx")
    with pytest.raises(InputError, match="threads is 0; expected a whole number from 1"):
        Device(threads=0)
    with pytest.raises(InputError, match="Unknown device option 'thread'. Did you mean 'threads'"):
        Device.from_dict({"thread": 2})
    assert Device.from_dict({"name": "x", "threads": 2}) == Device(name="x", threads=2)


def test_a_runtime_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime("onnxruntime"), "available", lambda: False)
    with pytest.raises(InputError, match="not installed here; install it: pip install onnxruntime"):
        available_runtime("onnxruntime")


def test_unstable_models_are_those_whose_halves_disagree() -> None:
    steady, drifting = [5.0] * 8, [5.0] * 4 + [6.0] * 4
    rounds: list[list[float | None]] = [list(pair) for pair in zip(steady, drifting, strict=True)]
    assert runner.unstable(rounds, [0, 1], 8) == [1]
    assert runner.unstable(rounds, [0, 1], 9) == [0, 1]  # fewer visits than asked for
    assert runner.unstable([*rounds, *([[None, 5.0]] * 60)], [0, 1], 8) == []


def test_short_models_are_repeated_within_a_visit() -> None:
    class Timed:
        @staticmethod
        def run(seconds: float) -> None:
            time.sleep(seconds)

    assert runner.warm_up(Timed, 0.01, 2) == 1  # type: ignore[arg-type]
    assert runner.warm_up(Timed, 0.0, 2) > 1  # type: ignore[arg-type]


def test_a_model_that_answers_otherwise_than_torch_is_not_timed(
    files: list[Path], tmp_path: Path
) -> None:
    wrong, check = tmp_path / "wrong.onnx", check_path(tmp_path / "wrong.onnx")
    wrong.write_bytes(files[1].read_bytes())
    with np.load(check_path(files[1])) as archive:
        saved = {name: archive[name] for name in archive.files}
    np.savez(check, **{**saved, "values": saved["values"] * 1.5})
    with pytest.raises(
        InputError, match=r"wrong\.onnx cannot be run .*differs from torch's by 0\.4"
    ):
        Device().measure([wrong], rounds=2)
    found = Device().measure([files[0], wrong, files[1]], rounds=2, keep_failures=True)
    assert found.timings[1] is None
    assert found.timings[0] and found.timings[2]
    assert list(found.failures) == [1]
    assert np.isnan(found.samples_ms[:, 1]).all()
    np.savez(check, **saved)
    assert not Device().measure([wrong], rounds=2).failures


CRASHING = """
import os, signal
load_whole = load
def load(path, settings):
    if "crash" in path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    return load_whole(path, settings)
"""


def test_a_model_that_takes_the_runtime_down_is_named_and_the_others_are_measured(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = tmp_path / "crash.onnx"
    crash.write_bytes(files[0].read_bytes())
    whole = Path(str(runtime("onnxruntime").__file__)).read_text()
    (tmp_path / "crashing.py").write_text(whole + CRASHING)
    monkeypatch.setattr(runtime("onnxruntime"), "__file__", str(tmp_path / "crashing.py"))
    device = Device(python=sys.executable)
    found = device.measure([files[0], crash, files[1]], rounds=2, keep_failures=True)
    assert set(found.failures) == {1}
    assert "the runtime crashed (SIGSEGV" in found.failures[1]
    assert found.timings[0] and found.timings[2]
    with pytest.raises(InputError, match=r"crash\.onnx cannot be run by onnxruntime: the runtime"):
        device.measure([crash], rounds=2)


def test_devices_are_built_from_their_kind() -> None:
    local = device_from({"kind": "local", "name": "x", "cores": [0]})
    assert local == Device(name="x", cores=(0,))
    assert local.kind == "local"
    board = device_from({"kind": "ssh", "host": "board", "name": None, "threads": 4})
    assert (board.kind, board.name, board.threads) == ("ssh", "board", 4)
    with pytest.raises(InputError, match="Unknown device option 'host'"):
        device_from({"kind": "local", "host": "board"})
    with pytest.raises(InputError, match="device=ssh needs device.host="):
        device_from({"kind": "ssh", "host": ""})
    with pytest.raises(InputError, match=r"device.cores is \[-1\]; expected numbers of cores"):
        Device(cores=(-1,))
    with pytest.raises(InputError, match="Unknown kind of device 'shh'. Did you mean 'ssh'"):
        device_from({"kind": "shh"})


def test_cores_are_pinned_and_stated(files: list[Path]) -> None:
    device = Device(cores=(0,))
    assert device.fingerprint()["pinned_cores"] == "0"
    assert device.measure(files[:1], rounds=2).whole[0].latency_ms > 0
    with pytest.raises(InputError, match=r"cores \[4095\] cannot be used .*expected some of"):
        Device(cores=(4095,)).measure(files[:1], rounds=2)


def test_a_provider_that_is_not_here_is_refused_with_its_package(files: list[Path]) -> None:
    with pytest.raises(InputError, match="no provider CoreML .*to get it: "):
        Device(provider="CoreML").fingerprint()


def test_an_interpreter_that_is_none_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be started .*expected a python"):
        Device(python=str(tmp_path / "python")).measure(files)
    (tmp_path / "bare").symlink_to("/bin/true")
    with pytest.raises(InputError, match="cannot run the measuring script"):
        Device(python=str(tmp_path / "bare")).measure(files)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_module_is_compiled_into_a_folder_that_is_not_there_yet(
    precision: str, tmp_path: Path
) -> None:
    device = Device(precision=precision)
    path = tmp_path / "new" / "folder" / "block.onnx"
    module = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU()).eval()
    device.compile(module, (4, 6, 6), path)
    assert device.measure([path], rounds=2).whole[0].latency_ms > 0
