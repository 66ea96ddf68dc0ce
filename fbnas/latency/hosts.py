"""Where models run: a process of its own on this machine. Over SSH it is the same: see ssh.py."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from fbnas.errors import InputError

RUNNER = Path(__file__).parent / "runner.py"
CANNOT_WRITE = 4
# A runtime's own doing; SIGKILL is somebody else's.
CRASHES = ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE", "SIGBUS")

Advance = Callable[[str, int, int], None]


class RuntimeCrashError(RuntimeError):
    """The runtime took its process down while it loaded, checked or warmed up model `index`."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"the runtime crashed ({reason}) while loading or running it")
        self.index = index


class Host(Protocol):
    """A machine that executes runner.py."""

    def facts(self, runtime_file: Path) -> dict[str, Any]:
        """Return what `runner.py --facts` says of the machine and of the runtime on it.

        Raises:
            InputError: the machine or its python cannot be reached, or it has no numpy.
        """

    def run(self, work: Path, advance: Advance, *, scores: bool = False) -> None:
        """Execute the job `work/job.json`, whose paths are those of this machine, or continue it.

        Afterwards `work` holds loaded.json and timings.jsonl, or scores.npy.

        Args:
            work: folder of this machine; rounds in its timings.jsonl are finished already.
            advance: called with a word (loading, round, scored), how many are done, and of how
                many.
            scores: run one model on images instead of timing models.

        Raises:
            InputError: the job cannot be done there, or a file cannot be written.
            RuntimeCrashError: on one model; the others can go on without it.
            RuntimeError: the measuring process ended early.
        """


class LocalHost:
    """This machine, through a python interpreter that has the runtime."""

    def __init__(self, python: str | None = None) -> None:
        self.python = python or sys.executable

    def facts(self, runtime_file: Path) -> dict[str, Any]:
        command = [self.python, str(RUNNER), "--facts", str(runtime_file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise self._no_python(error) from error
        return read_facts(done.stdout, done.stderr, f"device.python={self.python}")

    def run(self, work: Path, advance: Advance, *, scores: bool = False) -> None:
        # In a session of its own the child does not see Ctrl-C: it is killed below; should this
        # process be killed itself, stdin closes and ends the child.
        command = [self.python, str(RUNNER), str(work.resolve()), "--with-parent"]
        errors = work / "stderr.txt"
        try:
            with (
                errors.open("w") as stderr,
                subprocess.Popen(
                    [*command, "--scores"] if scores else command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                    start_new_session=True,
                ) as child,
            ):
                try:
                    assert child.stdout is not None
                    follow(child.stdout, advance)
                    code = child.wait()
                except BaseException:
                    child.kill()
                    raise
        except OSError as error:
            raise self._no_python(error) from error
        judge_end(code, errors.read_text(errors="replace"), work / "loading.json")

    def _no_python(self, error: OSError) -> InputError:
        return InputError(
            f"device.python={self.python} cannot be started ({error.strerror}); expected a python "
            "interpreter that has numpy and the runtime"
        )


def follow(lines: Iterable[str], advance: Advance) -> None:
    """Tell `advance` of every `word i/n` line of the runner."""
    for line in lines:
        word, _, fraction = line.strip().partition(" ")
        done, slash, total = fraction.partition("/")
        if slash and done.isdigit() and total.isdigit():
            advance(word, int(done), int(total))


def judge_end(code: int, stderr: str, loading: Path) -> None:
    """Raise what the end of a runner means; nothing where it ended well.

    Args:
        code: its exit code, negative for a signal.
        loading: the file that it leaves behind where a model takes it down.

    Raises:
        InputError: codes 2 and 4, with the runner's own line.
        RuntimeCrashError: a signal while a model was loaded, checked or warmed up.
        RuntimeError: any other end.
    """
    if code == 0:
        return
    last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
    if code in (2, CANNOT_WRITE):
        raise InputError(last)
    name = signal.Signals(-code).name if code < 0 else ""
    if name in CRASHES and loading.is_file():
        raise RuntimeCrashError(json.loads(loading.read_text())["index"], f"{name}: {last}")
    raise RuntimeError(f"the measuring process ended early (exit code {code}): {last}")


def read_facts(stdout: str, stderr: str, where: str) -> dict[str, Any]:
    """Return the facts that a runner printed.

    Args:
        where: names the machine and its python in errors.

    Raises:
        InputError: it printed none, or its python has no numpy.
    """
    try:
        facts = json.loads(stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(
            f"{where} cannot run the measuring script: {last}; expected python 3.8 or later"
        ) from None
    if facts["numpy"] is None:
        raise InputError(f"{where} has no numpy; install it there: python3 -m pip install numpy")
    return facts
