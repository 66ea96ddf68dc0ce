"""Measuring through ssh and scp against a real OpenSSH server: cut, killed, refused, continued."""

import ast
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sshd import WHY_NOT, Server, comm, descendants, free_port, runners, runs, wait_for
from torch import nn

from fbnas.errors import InputError
from fbnas.files import write_json
from fbnas.latency import ssh
from fbnas.latency.devices import Device, device_from
from fbnas.latency.hosts import LocalHost, RuntimeCrashError
from fbnas.latency.runtimes import runtime
from fbnas.latency.ssh import FAR_SIDE, SSHHost

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

ROOT = Path(__file__).parents[2]
LONG_JOB = """
import sys; from pathlib import Path
from fbnas.latency import ssh; from fbnas.latency.devices import Device
ssh.WAITS_S = (0.1,) * int(sys.argv[4])
Device(name="board", host="board", ssh_config=sys.argv[1], python=sys.executable).measure(
    sorted(Path(sys.argv[2]).glob("*.onnx")), rounds=200000, work=Path(sys.argv[3]))
"""
TOY_RUNTIME = """
import os, signal
NAME, INSTALL = "toy", "pip install toy"
def available(): return True
def load(path, settings):
    text = path.read_bytes()
    if text == b"crash": os.kill(os.getpid(), signal.SIGSEGV)
    if text == b"refuse": raise ValueError("toy cannot read this")
    return text
def input_shape(model): return (1, 1)
def feed(model, images): pass
def run(model): pass
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("sshd"))
    yield server
    server.kill()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    if running.process is None:
        running.start()
    yield running
    for pid in runners(running.temporary):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(running.temporary)
    running.temporary.mkdir()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for width in (1, 4, 8):
        torch.manual_seed(width)
        paths.append(folder / f"{width}.onnx")
        Device().compile(nn.Conv2d(3, width, 3), (3, 8, 8), paths[-1])
    return paths


def board(server: Server, **changes: Any) -> Device:
    options = {"ssh_config": server.config, "python": sys.executable, **changes}
    return Device(name="board", host="board", **options)


def to(server: Server, **changes: Any) -> SSHHost:
    return SSHHost("board", **{"python": sys.executable, "ssh_config": server.config, **changes})


def toy_job(folder: Path, *models: bytes, rounds: int = 2) -> Path:
    """Write a job of toy models into a folder of its own; returns that."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    (folder / "toy.py").write_text(TOY_RUNTIME)
    for index, text in enumerate(models):
        (folder / f"{index}.toy").write_bytes(text)
    job = {
        "models": [str(folder / f"{index}.toy") for index in range(len(models))],
        "digests": [ssh._digest(folder / f"{index}.toy") for index in range(len(models))],
        "runtime": str(folder / "toy.py"),
        "settings": {"threads": 1, "provider": ""},
        "seed": 0,
        "rounds": rounds,
        "seconds": 0,
        "failed": {},
    }
    write_json(work / "job.json", job)
    return work


def nothing(word: str, done: int, total: int) -> None:
    """Progress that nobody wants to see."""


def rounds_in(work: Path) -> bytes:
    path = work / "timings.jsonl"
    text = path.read_bytes() if path.exists() else b""
    return text[: text.rfind(b"\n") + 1]


def start(
    server: Server, files: list[Path], work: Path, *, attempts: int = 600
) -> subprocess.Popen[str]:
    """Start a command that measures for hours, and wait for its first rounds."""
    arguments = [server.config, str(files[0].parent), str(work), str(attempts)]
    command = [sys.executable, "-c", LONG_JOB, *arguments]
    work.mkdir(exist_ok=True)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: rounds_in(work).count(b"\n") >= 3 or process.poll() is not None)
    assert process.poll() is None, process.stderr
    return process


def finish(server: Server, files: list[Path], work: Path, kept: bytes) -> None:
    """The same command, which now wants few more rounds, continues and leaves nothing behind."""
    rounds = kept.count(b"\n") + 2
    found = board(server).measure(files, rounds=rounds, seconds=0, work=work)
    after = rounds_in(work)
    assert after.startswith(kept)
    assert after.count(b"\n") == len(found.samples_ms) >= rounds
    assert [json.loads(line)["round"] for line in after.splitlines()] == list(range(rounds))
    assert server.left() == []
    assert not (work / "remote.json").exists()


def test_models_are_measured_there_as_here(
    server: Server, files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    steps: list[int] = []
    options = {"python": sys.executable, "ssh_config": server.config}
    device = device_from({"kind": "ssh", "host": "board", "keep": True, **options})
    assert isinstance(device, Device)
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    found = device.measure(files, rounds=3, seconds=0, work=there, progress=steps.append)
    Device().measure(files, rounds=3, seconds=0, work=here)
    assert all(timing.samples == 3 for timing in found.whole)
    assert sum(steps) == 3
    states = [json.loads((work / "loaded.json").read_text()) for work in (there, here)]
    assert [state["difference"] for state in states[0]] == [
        state["difference"] for state in states[1]
    ]
    (kept,) = server.temporary.iterdir()
    for name in ("timings.jsonl", "loaded.json"):
        assert json_lines(kept / name) == json_lines(there / name)
    assert f"board:{kept}" in caplog.text
    assert device.fingerprint()["device"] == "board"
    finish(server, files, there, rounds_in(there))


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_model_of_two_files_arrives_whole(
    server: Server, files: list[Path], tmp_path: Path
) -> None:
    if not runtime("openvino").available():
        pytest.skip("openvino is not installed here")
    import openvino

    path = tmp_path / "model.xml"
    openvino.save_model(openvino.Core().read_model(files[0]), path, compress_to_fp16=False)
    found = board(server, runtime="openvino").measure([path], rounds=2)
    assert found.whole[0].latency_ms > 0


def test_files_that_are_there_are_not_sent_again(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    work, host = toy_job(tmp_path, b"a", b"b", b"b"), to(server, keep=True)
    host.run(work, nothing)
    assert (
        "Copying files to board: 5 " in caplog.text
    )  # job, runner, runtime and two different models
    (folder,) = server.temporary.iterdir()
    (damaged,) = (path for path in folder.glob("*.toy") if path.read_bytes() == b"a")
    damaged.write_bytes(b"")  # a copy that was cut off
    caplog.clear()
    host.run(work, nothing)
    assert "Copying files to board: 1 " in caplog.text
    assert damaged.read_bytes() == b"a"


def test_a_folder_of_the_user_keeps_what_is_in_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(server.folder)
    folder = server.temporary / "mine"
    folder.mkdir()
    (folder / "runner.py").write_text("mine")
    work = toy_job(tmp_path, b"a")
    seen: list[Path] = []
    host = to(server, folder=str(folder), ssh_config="ssh_config")
    host.run(work, lambda *step: seen.extend(folder.iterdir()))
    assert set(seen) > {folder / "runner.py"}
    assert [path.name for path in folder.iterdir()] == ["runner.py"]
    assert (folder / "runner.py").read_text() == "mine"


def test_a_restarted_server_is_found_again(
    server: Server, files: list[Path], tmp_path: Path
) -> None:
    process = start(server, files, tmp_path)
    (runner,) = runners_of(server)
    server.kill()
    wait_for(lambda: not runs(runner))
    before = rounds_in(tmp_path)
    server.start()
    wait_for(lambda: rounds_in(tmp_path).count(b"\n") >= before.count(b"\n") + 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "The link to board is lost" in said
    kept = rounds_in(tmp_path)
    assert kept.startswith(before)
    assert server.left() == []  # Ctrl-C clears up, too
    finish(server, files, tmp_path, kept)


def runners_of(server: Server) -> list[int]:
    """The measuring processes there, without those that only wait for one."""
    return [pid for pid in runners(server.temporary) if not list(descendants(pid))]


def test_a_runner_that_outlived_its_link_is_ended(
    server: Server, files: list[Path], tmp_path: Path
) -> None:
    process = start(server, files, tmp_path)
    (runner,) = runners_of(server)
    hung = server.sessions()
    try:
        for pid in hung:
            os.kill(pid, signal.SIGSTOP)  # the far side does not notice that the link is lost
        (client,) = (pid for pid in descendants(process.pid) if comm(pid) == "ssh\n")
        os.kill(client, signal.SIGKILL)
        wait_for(lambda: not runs(runner))
        before = rounds_in(tmp_path).count(b"\n")
        wait_for(lambda: rounds_in(tmp_path).count(b"\n") >= before + 2)
        (second,) = runners_of(server)
        assert second != runner
    finally:
        for pid in hung:
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate(timeout=60)
    numbers = [json.loads(line)["round"] for line in rounds_in(tmp_path).splitlines()]
    assert numbers == list(range(len(numbers)))


def test_a_killed_command_ends_the_runner_and_can_be_continued(
    server: Server, files: list[Path], tmp_path: Path
) -> None:
    process = start(server, files, tmp_path)
    assert runners_of(server)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not runners(server.temporary))
    kept = rounds_in(tmp_path)
    with (tmp_path / "timings.jsonl").open("ab") as timings:
        timings.write(b'{"round": 99, "ms": [0.')  # what a kill in mid-line leaves
    assert server.left() == [json.loads((tmp_path / "remote.json").read_text())["name"]]
    finish(server, files, tmp_path, kept)


def test_a_server_that_does_not_come_back_is_named_and_the_rounds_are_kept(
    server: Server, files: list[Path], tmp_path: Path
) -> None:
    process = start(server, files, tmp_path, attempts=2)
    server.kill()
    _, said = process.communicate(timeout=60)
    kept = rounds_in(tmp_path)
    last = said.splitlines()[-1]
    assert "board cannot be reached any more" in last
    assert "Connection refused" in last
    assert f"{kept.count(bytes([10]))} rounds are kept: run the same command again" in last
    server.start()
    shutil.rmtree(server.temporary)  # it was started anew, and forgot its temporary files
    server.temporary.mkdir()
    finish(server, files, tmp_path, kept)


def test_with_every_round_that_arrives_the_waiting_starts_anew(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "WAITS_S", (0,))
    lost = []

    def shut_down(word: str, done: int, total: int) -> None:
        if word == "round" and done > len(lost) < 3:
            lost.append(done)
            for pid in runners_of(server):
                os.kill(pid, signal.SIGTERM)

    work = toy_job(tmp_path, b"a", b"b", rounds=300)
    to(server).run(work, shut_down)
    assert len(lost) == 3
    rounds = [json.loads(line)["round"] for line in rounds_in(work).splitlines()]
    assert rounds == list(range(300))
    assert server.left() == []


def test_a_folder_that_is_not_ours_is_left_alone(server: Server, tmp_path: Path) -> None:
    work, elsewhere = toy_job(tmp_path, b"a"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    write_json(work / "remote.json", {"host": "board", "folder": None, "name": "fbnas-guessed"})
    (server.temporary / "fbnas-guessed").symlink_to(elsewhere)
    with pytest.raises(InputError, match="board cannot make a folder.*belongs to somebody else"):
        to(server).run(work, nothing)
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]


def test_a_model_that_fails_is_named_and_the_others_are_measured(
    server: Server, files: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    found = board(server).measure([files[0], broken, files[1]], rounds=2, keep_failures=True)
    assert [timing is None for timing in found.timings] == [False, True, False]
    assert "INVALID_PROTOBUF" in found.failures[1]
    assert server.left() == []


def test_a_model_that_crashes_the_runtime_is_left_out(server: Server, tmp_path: Path) -> None:
    work = toy_job(tmp_path, b"a", b"crash", b"b")
    with pytest.raises(RuntimeCrashError, match="SIGSEGV") as crash:
        to(server).run(work, nothing)
    assert crash.value.index == 1
    job = json.loads((work / "job.json").read_text())
    write_json(work / "job.json", {**job, "failed": {"1": "it crashed"}})
    to(server).run(work, nothing)
    assert [row["error"] for row in json.loads((work / "loaded.json").read_text())] == [
        None,
        "it crashed",
        None,
    ]
    assert server.left() == []


@pytest.mark.parametrize("sftp", [True, False])
def test_scores_are_those_of_this_machine(
    server: Server, files: list[Path], tmp_path: Path, sftp: bool
) -> None:
    other = server if sftp else Server(tmp_path, sftp=False)
    if not sftp:
        other.start()
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)
    found = []
    try:
        for name, host in (("there", to(other)), ("here", LocalHost())):
            work = tmp_path / name
            work.mkdir()
            np.save(work / "images.npy", images)
            job = {**Device()._job(files[2:]), "images": str(work / "images.npy"), "batch": 2}
            write_json(work / "job.json", job)
            host.run(work, nothing, scores=True)
            found.append(np.load(work / "scores.npy"))
    finally:
        if not sftp:
            other.kill()
    assert found[0].shape == (5, 8, 6, 6)
    np.testing.assert_array_equal(*found)
    assert other.left() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"IdentityFile": "other_key"}, r"Permission denied.*password: ssh-copy-id board"),
        ({"HostName": "no..such.host"}, r"expected device.host="),
        ({"UserKnownHostsFile": "/dev/null"}, r"connect once by hand: ssh -F .* board"),
        ({"UserKnownHostsFile": "changed"}, r"another than before.*ssh-keygen -R board"),
        ({"Port": "closed"}, r"Connection refused.*expected an SSH server there"),
        ({"Port": "silent"}, r"timed out.*is it switched on"),
        ({"NoSuchOption": "yes"}, r"bad configuration option.*must work; try it by hand"),
    ],
)
def test_a_refused_connection_says_what_to_do(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    words: str,
) -> None:
    other = (server.folder / "other_key.pub").read_text()
    (server.folder / "changed").write_text(f"[127.0.0.1]:{server.port} {other}")
    shorter = tuple(option.replace("Timeout=10", "Timeout=1") for option in ssh.OPTIONS)
    monkeypatch.setattr(ssh, "OPTIONS", shorter)
    work = toy_job(tmp_path, b"a")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        places = {"closed": str(free_port()), "silent": str(silent.getsockname()[1])}
        for name in ("other_key", "changed"):
            places[name] = str(server.folder / name)
        resolved = {key: places.get(value, value) for key, value in changes.items()}
        host = to(server, ssh_config=server.write_config("refused", **resolved))
        for asked in (lambda: host.facts(tmp_path / "toy.py"), lambda: host.run(work, nothing)):
            with pytest.raises(InputError, match=rf"board cannot be reached \(.*{words}") as error:
                asked()
            assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter without packages, under a name that a shell would take apart."""
    folder = tmp_path_factory.mktemp("python") / "it's $HOME bare"
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    return folder / "bin" / "python"


def test_a_python_that_lacks_something_is_refused(server: Server, bare_python: Path) -> None:
    words = r"board cannot start /no/python \(.*\); expected device.python="
    with pytest.raises(InputError, match=words):
        board(server, python="/no/python").fingerprint()
    with pytest.raises(InputError, match=r"board \(device.python=.*\) has no numpy; install it"):
        board(server, python=str(bare_python)).fingerprint()
    with pytest.raises(InputError, match="cannot run the measuring script.*python 3.8 or later"):
        board(server, python="/bin/false").fingerprint()
    (packages,) = bare_python.parents[1].glob("lib/python*/site-packages")
    for name in ("numpy", "numpy.libs"):
        if (Path(np.__file__).parents[1] / name).exists():
            (packages / name).symlink_to(Path(np.__file__).parents[1] / name)
    with pytest.raises(InputError, match="runtime openvino is not installed on board.*pip install"):
        board(server, python=str(bare_python), runtime="openvino").fingerprint()
    assert server.left() == []


def test_a_host_that_ssh_would_take_for_something_else_is_refused() -> None:
    for host in ("-oProxyCommand=true", "ssh://board:22", "two words", ""):
        with pytest.raises(InputError, match="expected a name of your ssh config, or user@addr"):
            SSHHost(host)
    assert SSHHost("root@::1")._target == "root@[::1]"  # scp takes a colon for the host's end
    assert SSHHost("root@board")._target == "root@board"
    assert ssh._quoted("~/it is/python") == "~/'it is/python'"


def test_a_machine_without_ssh_is_told_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="ssh is not installed here.*openssh-client"):
        SSHHost("board").facts(Path(str(runtime("onnxruntime").__file__)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "full").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


def test_a_disk_that_fills_up_is_named_and_the_rounds_are_kept(
    server: Server, small_disk: Path, tmp_path: Path
) -> None:
    def fill_it(word: str, done: int, total: int) -> None:
        if (word, done) == ("round", 2):
            fill(small_disk)

    work = toy_job(tmp_path, b"a", b"b", rounds=20000)
    host = to(server, folder=str(small_disk))
    with pytest.raises(InputError, match=r"board: .* cannot be written: No space left on device"):
        host.run(work, fill_it)
    kept = rounds_in(work)
    (small_disk / "full").unlink()
    assert list(small_disk.iterdir()) == []
    toy_job(tmp_path, b"a", b"b", rounds=kept.count(b"\n") + 1)
    host.run(work, nothing)
    assert rounds_in(work).startswith(kept)
    assert rounds_in(work).count(b"\n") == kept.count(b"\n") + 1


def test_models_that_do_not_fit_are_refused(
    server: Server, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = toy_job(tmp_path, random.Random(0).randbytes(300_000))
    host = to(server, folder=str(small_disk))
    with pytest.raises(InputError, match=r"has 0\.2 MB free, .* need 0\.3 MB; .*device.folder="):
        host.run(work, nothing)
    prepare = host._prepare
    monkeypatch.setattr(host, "_prepare", lambda *given: {**prepare(*given), "free": 1 << 40})
    with pytest.raises(InputError, match=r"copied .* board: .*; make room .*device.folder="):
        host.run(work, nothing)
    assert list(small_disk.iterdir()) == []


def test_what_goes_along_with_every_command_suits_any_shell_and_needs_nothing_of_ours() -> None:
    text = FAR_SIDE.read_text()
    assert "\\" not in text
    names = {
        name
        for node in ast.walk(ast.parse(text, feature_version=(3, 8)))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)
