"""What the end of a measuring process means, and a python that cannot be one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fbnas.errors import InputError
from fbnas.latency.hosts import LocalHost, RuntimeCrashError, follow, judge_end
from fbnas.latency.runtimes import runtime

RUNTIME = Path(str(runtime("onnxruntime").__file__))


def test_progress_is_told_and_chatter_is_not() -> None:
    told: list[tuple[str, int, int]] = []
    lines = ["loading 1/2\n", "Using 3/four threads\n", "\n", "round 7/30\n"]
    follow(lines, lambda *step: told.append(step))
    assert told == [("loading", 1, 2), ("round", 7, 30)]


@pytest.mark.parametrize(
    ("code", "loading", "kind", "words"),
    [
        (2, False, InputError, "cores [99] cannot be used"),
        (4, True, InputError, "cores [99] cannot be used"),
        (-11, True, RuntimeCrashError, "the runtime crashed (SIGSEGV: cores [99] cannot be used)"),
        (-11, False, RuntimeError, "exit code -11"),  # not while a model was loaded
        (-9, True, RuntimeError, "exit code -9"),  # somebody else's doing
        (1, True, RuntimeError, "exit code 1"),
    ],
)
def test_an_end_means(
    tmp_path: Path, code: int, loading: bool, kind: type[Exception], words: str
) -> None:
    path = tmp_path / "loading.json"
    if loading:
        path.write_text(json.dumps({"index": 3}))
    with pytest.raises(kind, match=re.escape(words)) as error:
        judge_end(code, "chatter\ncores [99] cannot be used\n", path)
    assert type(error.value) is kind
    assert getattr(error.value, "index", 3) == 3


def test_a_good_end_raises_nothing(tmp_path: Path) -> None:
    judge_end(0, "chatter", tmp_path / "loading.json")


def test_a_python_that_cannot_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device.python=/no/python cannot be started"):
        LocalHost("/no/python").facts(RUNTIME)
    with pytest.raises(InputError, match="device.python=/bin/false cannot run the measuring scr"):
        LocalHost("/bin/false").facts(RUNTIME)
    command = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")]
    subprocess.run(command, check=True)
    with pytest.raises(InputError, match="has no numpy; install it there"):
        LocalHost(str(tmp_path / "bare" / "bin" / "python")).facts(RUNTIME)
