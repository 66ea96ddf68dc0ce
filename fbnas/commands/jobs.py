"""A job of a multirun: one command with a folder of its own, in a process that can be stopped.

Imports no hydra and no torch: a job is also unpickled on the nodes of a cluster.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

JOBS_FILE = "multirun.json"
LOGS = "logs"
COMMAND = (sys.executable, "-P", "-m", "fbnas.commands")  # -P: not the fbnas of a checkout here


@dataclass(frozen=True)
class Job:
    """One command of a multirun.

    Attributes:
        overrides: all of its options, its own `out` among them.
        swept: those that tell it from the others, as the user wrote them.
        resumable: whether the command takes resume=true.
    """

    name: str
    command: str
    overrides: tuple[str, ...]
    swept: tuple[str, ...]
    folder: Path
    log: Path
    resumable: bool

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()

    @property
    def begun(self) -> bool:
        return (self.folder / "config.yaml").is_file()

    def arguments(self) -> list[str]:
        """The command line, which continues what the folder holds.

        Decided when the job starts, so that a job that a cluster stopped and starts again goes on.
        """
        again = "resume=true" if self.resumable else "overwrite=true"
        return [self.command, *self.overrides, *([again] if self.begun else [])]


def start_process(job: Job, command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start the command of a job in a session of its own, which Ctrl-C does not reach."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*command, *job.arguments()],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
        **options,
    )


def open_log(job: Job) -> IO[bytes]:
    """Open the log of a job before it starts: one that goes on adds to what it said before."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    return job.log.open("ab" if job.begun else "wb")


def exit_code(returncode: int) -> int:
    """Return an exit code as a shell gives it: 128 and its number for a signal."""
    return returncode if returncode >= 0 else 128 - returncode


class RemoteJob:
    """What a cluster calls: runs the job's command there, and stops it when it is told to.

    SIGINT and SIGTERM (scancel) let the command write its checkpoint and end. When the time of the
    job is up, submitit calls `checkpoint` and queues what it returns.
    """

    def __init__(self, job: Job, folder: Path, command: Sequence[str]) -> None:
        self.job = job
        self.folder = folder  # where the user stands: paths are relative to it
        self.command = tuple(command)
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteJob, (self.job, self.folder, self.command)

    def __call__(self) -> int:
        os.chdir(self.folder)
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in numbers}
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # for the child
            with open_log(self.job) as log:
                self.child = start_process(self.job, self.command, stdout=log)
                if self.stopped:  # told so before there was a child
                    self._interrupt(self.child)
                while True:  # Ray's cancel is only seen between two calls
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return exit_code(self.child.wait(timeout=0.5))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """Let the command write its checkpoint; a second signal would end it without one."""
        if not self.stopped and self.child is not None:
            self._interrupt(self.child)
        self.stopped = True

    @staticmethod
    def _interrupt(child: "subprocess.Popen[bytes]") -> None:
        os.kill(child.pid, signal.SIGINT)

    def checkpoint(self) -> Any:
        """Stop the command and return what is to be queued: the same job, which then resumes."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        if self.child is not None:
            # not child.wait(): this is a signal handler within that very call
            os.waitpid(self.child.pid, 0)
        return DelayedSubmission(RemoteJob(self.job, self.folder, self.command))
