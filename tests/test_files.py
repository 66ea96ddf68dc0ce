"""Files that flow between commands: whole or not there, and damage said in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
import torch

from fbnas.errors import InputError
from fbnas.files import (
    append_jsonl,
    atomic_write,
    is_part,
    load_checkpoint,
    read_json,
    read_jsonl,
    read_yaml,
    remove_parts,
    save_checkpoint,
    write_json,
    write_through,
    write_yaml,
)

ROOT = Path(__file__).parents[1]
FULL_DISK = """
import resource, sys, torch
from fbnas.files import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a disk that fills up
try:
    save_checkpoint(sys.argv[1], {"weights": torch.ones(1_000_000)})
except OSError as error:
    sys.exit(f"OSError: {error.strerror}")
"""


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint whose replacement did not fit, and what the writing process said."""
    path = tmp_path_factory.mktemp("full") / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.arange(3)})
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    return path, done.stderr


def test_what_a_killed_writer_left_is_taken_away(tmp_path: Path) -> None:
    atomic_write(tmp_path / "rung" / "a.json", "{}")
    kept = tmp_path / ".mine.part.json"
    kept.touch()
    killed = "import os, sys; from fbnas.files import write_through as w; "
    killed += "w(sys.argv[1], lambda file: os.kill(os.getpid(), 9))"
    for name in ("b.json", "rung/a.json"):
        subprocess.run([sys.executable, "-c", killed, str(tmp_path / name)], cwd=ROOT)
    parts = [path for path in tmp_path.rglob("*") if is_part(path)]
    assert len(parts) == 2
    remove_parts(tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {".mine.part.json", "rung", "rung/a.json"}


def test_a_full_disk_leaves_the_previous_checkpoint(full_disk: tuple[Path, str]) -> None:
    path, _ = full_disk
    assert load_checkpoint(path)["weights"].tolist() == [0, 1, 2]
    assert list(path.parent.iterdir()) == [path]  # and no half-written file beside it


def test_a_full_disk_is_an_os_error_which_commands_word(full_disk: tuple[Path, str]) -> None:
    assert full_disk[1] == "OSError: File too large\n"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_changes_nothing(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "file"
    atomic_write(path, "before")

    def write_half(file: IO[bytes]) -> None:
        file.write(b"aft")
        raise failure

    with pytest.raises(type(failure)):
        write_through(path, write_half)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_flush_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, "before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 1})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_reads_back_equal(tmp_path: Path) -> None:
    state = {
        "weights": torch.randn(3, 2),
        "position": [1, "theta", 2],
        "rng": torch.get_rng_state(),
    }
    save_checkpoint(tmp_path / "new" / "checkpoint.pt", state)
    found = load_checkpoint(tmp_path / "new" / "checkpoint.pt")
    assert found.keys() == state.keys()
    assert torch.equal(found["weights"], state["weights"])
    assert torch.equal(found["rng"], state["rng"])
    assert found["position"] == state["position"]


def damaged(kind: str, whole: bytes) -> bytes:
    flipped = bytearray(whole)
    flipped[whole.index(torch.full((8,), 7.0).numpy().tobytes())] ^= 1
    return {
        "half": whole[: len(whole) // 2],
        "a byte short": whole[:-1],
        "text": b"weights: 1\n",
        "zeros": bytes(100),
        "empty": b"",
        "a cut pickle": b"\x80\x02.",
        "a flipped bit": bytes(flipped),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "half",
        "a byte short",
        "text",
        "zeros",
        "empty",
        "a cut pickle",
        "a flipped bit",
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"weights": torch.full((1000,), 7.0)})
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(InputError, match="damaged") as refused:
        load_checkpoint(path)
    assert str(path) in one_line(refused)
    assert "overwrite=true" in str(refused.value)


@pytest.mark.parametrize("content", [{"version": 99, "state": {}}, {"state": {}}, [1, 2]])
def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    with pytest.raises(InputError, match="version") as refused:
        load_checkpoint(path)
    assert str(path) in one_line(refused)


def test_a_checkpoint_without_its_state_is_refused(tmp_path: Path) -> None:
    torch.save({"version": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"version": 1, "state": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt")


def test_json_lines_without_the_one_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for epoch in range(3):
        append_jsonl(path, {"epoch": epoch, "name": "größe"})
    rows = read_jsonl(path)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    whole = path.read_bytes()
    last = len(json.dumps(rows[-1])) + 1
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        assert read_jsonl(path) == (rows if cut == 1 else rows[:2])  # the first cuts the newline
    path.write_bytes(b'{"epoch": \n' + whole)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb: [1, 2\nc: 3\n", 3), ("a: 1\nb: c: d\n", 2), ("a: 1\n\tb: 2\n", 2)],
)
def test_bad_yaml_is_named_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        read_yaml(tmp_path / "space.yaml")
    assert f"{tmp_path / 'space.yaml'}, line {line}: " in one_line(refused)


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- 1\n", "list"), ("x\n", "str")])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(InputError, match=f"found {found}"):
        read_yaml(tmp_path / "space.yaml")


def test_bad_json_is_named_with_its_line(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"a": 1, "b": [1, 2]})
    text = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").write_text(text[:-4])
    with pytest.raises(InputError, match=r"result\.json, line 6: ") as refused:
        read_json(tmp_path / "result.json")
    assert "truncated" in one_line(refused)


def test_missing_folders_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        read_yaml(tmp_path / "binary.yaml")


def test_yaml_keeps_values_and_their_order(tmp_path: Path) -> None:
    content = {"z": 1.5e-4, "a": [1, "größe", None, True], "nested": {"on": "no"}}
    write_yaml(tmp_path / "config.yaml", content)
    assert read_yaml(tmp_path / "config.yaml") == content
    assert list(read_yaml(tmp_path / "config.yaml")) == ["z", "a", "nested"]
