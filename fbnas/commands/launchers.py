"""Where the jobs of a multirun go: this machine, submitit (SLURM), or Ray.

submitit is called directly. Hydra's launcher plugins for it and for Ray start a function of a
program under `@hydra.main`, with a folder and a logger of Hydra's making; a job of fbnas is a
command line, so that what ran can be run again by hand.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Protocol

from fbnas.commands import FAILED, INTERRUPTED
from fbnas.commands import jobs as processes
from fbnas.commands.jobs import Job, RemoteJob, exit_code, open_log, start_process
from fbnas.errors import InputError, unknown

Wake = queue.SimpleQueue[str]
STOP = "stop"


class Running(Protocol):
    """A job under way."""

    @property
    def id(self) -> str | None:
        """By which a later multirun finds it again."""

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""

    def stop(self) -> None:
        """Let it write its checkpoint and end; asked again, more firmly where it can be."""


class Launcher(Protocol):
    """Starts jobs; one dataclass per `kind`, whose fields are the options of its config."""

    @property
    def at_once(self) -> int | None:
        """How many jobs it takes at a time, None for all."""

    @property
    def poll_s(self) -> float | None:
        """How often to ask for ends, None where jobs report them."""

    def check(self) -> None:
        """Refuse what cannot work here; change nothing."""

    def start(self, jobs: Sequence[Job], root: Path, wake: Wake) -> list[Running]:
        """Start jobs; ends may be reported to `wake`."""

    def find(self, job: Job, root: Path, id: str) -> Running | None:
        """Return a job that an earlier multirun started and that is still under way."""

    def close(self) -> None:
        """Give back what starting took."""


def build_launcher(settings: Mapping[str, Any]) -> Launcher:
    """Return the launcher of a config of the group `launcher`.

    Raises:
        InputError: an unknown kind, an option it does not take, or a package is missing.
    """
    kind = settings.get("kind")
    if kind not in LAUNCHERS:
        raise unknown("launcher kind", kind, LAUNCHERS)
    launcher = LAUNCHERS[kind]
    known = [x.name for x in fields(launcher) if x.init]
    for key in settings:
        if key not in known:
            raise InputError(
                f"launcher.{key}: launcher {kind} has no such option; it has {', '.join(known)}."
            )
    built = launcher(**settings)
    built.check()
    return built


def run_all(
    jobs: Sequence[Job],
    launcher: Launcher,
    root: Path,
    *,
    ids: Mapping[str, str],
    started: Callable[[Job, str | None], None],
    ended: Callable[[Job, int], None],
) -> bool:
    """Run the jobs and return whether SIGINT or SIGTERM stopped them.

    Args:
        ids: of jobs that an earlier multirun started, by name: those still under way are awaited.
        started, ended: called for each job.
    """
    waiting, running, stops = deque(jobs), dict[Job, Running](), 0
    wake: Wake = queue.SimpleQueue()
    with _signals_to(wake):
        try:
            for job in [job for job in jobs if job.name in ids]:
                found = launcher.find(job, root, ids[job.name])
                if found is not None:
                    running[job] = found
                    waiting.remove(job)
                    started(job, found.id)
            while running or (waiting and not stops):
                free = (launcher.at_once or len(jobs)) - len(running)
                now = [waiting.popleft() for _ in range(0 if stops else min(free, len(waiting)))]
                if now:
                    running.update(zip(now, launcher.start(now, root, wake), strict=True))
                for job in now:
                    started(job, running[job].id)
                with contextlib.suppress(queue.Empty):
                    if wake.get(timeout=launcher.poll_s) == STOP:
                        stops += 1
                        for process in running.values():
                            process.stop()
                for job in list(running):
                    code = running[job].poll()
                    if code is not None:
                        del running[job]
                        ended(job, code)
        except BaseException:
            for process in running.values():
                process.stop()
            raise
        finally:
            launcher.close()
    return stops > 0


@contextlib.contextmanager
def _signals_to(wake: Wake) -> Iterator[None]:
    """Put SIGINT and SIGTERM into a queue: an exception might strike between start and note."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: wake.put(STOP)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Local:
    """Processes of this machine, whose lines are shown and kept."""

    kind: str = "local"
    jobs: int = 1

    poll_s = None

    @property
    def at_once(self) -> int:
        return self.jobs

    def check(self) -> None:
        pass

    def start(self, jobs: Sequence[Job], root: Path, wake: Wake) -> list[Running]:
        return [LocalProcess(job, wake, prefix=self.jobs > 1) for job in jobs]

    def find(self, job: Job, root: Path, id: str) -> Running | None:
        return None

    def close(self) -> None:
        pass


class LocalProcess:
    """A process and the thread that reads what it says."""

    id = None

    def __init__(self, job: Job, wake: Wake, *, prefix: bool) -> None:
        self.job = job
        self.code: int | None = None
        self.stops = 0
        self.prefix = f"[{job.name}] " if prefix else ""
        said = open_log(job)
        self.child = start_process(job, processes.COMMAND, stdout=subprocess.PIPE)
        threading.Thread(target=self._read, args=(said, wake), daemon=True).start()

    def _read(self, said: IO[bytes], wake: Wake) -> None:
        assert self.child.stdout is not None
        try:
            with said, self.child.stdout as lines:
                for line in lines:
                    said.write(line)
                    said.flush()
                    print(f"{self.prefix}{line.decode(errors='replace').rstrip()}", flush=True)
        finally:  # on a full disk too, where the closed pipe ends the job
            self.code = exit_code(self.child.wait())
            wake.put("ended")

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        """SIGINT twice, as from a terminal; from the third time on the process is killed."""
        self.stops += 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGINT if self.stops < 3 else signal.SIGKILL)


@dataclass(frozen=True)
class Submitit:
    """Jobs of submitit on this machine, to try what `slurm` does without a cluster."""

    kind: str = "submitit_local"
    jobs: int = 1
    gpus: int = 0
    time_min: int = 240
    requeues: int = 3

    cluster = "local"
    poll_s = 0.2

    @property
    def at_once(self) -> int | None:
        return self.jobs

    def check(self) -> None:
        _need("submitit", self.kind, "slurm")

    def start(self, jobs: Sequence[Job], root: Path, wake: Wake) -> list[Running]:
        executor, handles = self._executor(root), []
        try:
            with _deaf(), executor.batch():
                for job in jobs:
                    handles.append(executor.submit(RemoteJob(job, Path.cwd(), processes.COMMAND)))
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"launcher={self.kind}: submitting failed: {lines[-1]}; mend launcher.* and "
                "continue with resume=true."
            ) from error
        for job, handle in zip(jobs, handles, strict=True):
            print(f"{job.name}: {self.kind} job {handle.job_id}, log: {job.log}", flush=True)
        return [SubmititJob(j, h, self.cluster) for j, h in zip(jobs, handles, strict=True)]

    def _executor(self, root: Path) -> Any:
        submitit = import_submitit()
        folder = root / "submitit"
        requeues = {f"{self.cluster}_max_num_timeout": self.requeues}
        executor = submitit.AutoExecutor(folder, cluster=self.cluster, **requeues)
        executor.update_parameters(**self._parameters())
        return executor

    def _parameters(self) -> dict[str, Any]:
        return {"timeout_min": self.time_min, "gpus_per_node": self.gpus}

    def find(self, job: Job, root: Path, id: str) -> Running | None:
        return None

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Slurm(Submitit):
    """Jobs of a SLURM cluster, as one array."""

    kind: str = "slurm"
    jobs: int = 16
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    cpus: int = 4
    memory_gb: float = 16.0
    setup: list[str] = field(default_factory=list)
    sbatch: list[str] = field(default_factory=list)

    cluster = "slurm"
    poll_s = 2.0

    @property
    def at_once(self) -> int | None:
        return None  # the array itself keeps to `jobs`

    def check(self) -> None:
        super().check()
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise InputError(
                f"launcher={self.kind}: no sbatch and srun here; expected a machine of a SLURM "
                "cluster. launcher=submitit_local tries the same on this one."
            )

    def _parameters(self) -> dict[str, Any]:
        pairs = [option.lstrip("-").partition("=") for option in self.sbatch]
        more = {key: value if equals else True for key, equals, value in pairs}
        return {
            "name": "fbnas",
            "timeout_min": self.time_min,
            "mem_gb": self.memory_gb,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "slurm_partition": self.partition,
            "slurm_qos": self.qos,
            "slurm_account": self.account,
            "slurm_array_parallelism": self.jobs,
            "slurm_setup": self.setup or None,
            "slurm_additional_parameters": more or None,
        }

    def find(self, job: Job, root: Path, id: str) -> Running | None:
        submitit = import_submitit()
        handle = submitit.SlurmJob[int](folder=(root / "submitit").absolute(), job_id=id)
        if handle.done(force_check=True) or handle.state == "UNKNOWN":
            return None
        print(f"{job.name}: still under way as {self.kind} job {id}", flush=True)
        return SubmititJob(job, handle, self.cluster)


class SubmititJob:
    """A job that submitit watches."""

    def __init__(self, job: Job, handle: Any, cluster: str) -> None:
        self.job, self.handle, self.cluster = job, handle, cluster
        self.id = str(handle.job_id)
        self.stopped = False

    def poll(self) -> int | None:
        from submitit.core.utils import UncompletedJobError

        if not self.handle.done(force_check=self.stopped):
            return None
        try:
            return int(self.handle.result())
        except UncompletedJobError as error:
            with self.job.log.open("a") as said:
                said.write(f"{error}\n")
            return INTERRUPTED if self.stopped else FAILED

    def stop(self) -> None:
        self.stopped = True
        if self.cluster == "local":  # its cancel would kill the job a second later
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.id), signal.SIGTERM)
        else:
            self.handle.cancel(check=False)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: submitit's would kill the job a second later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class Ray:
    """Tasks of a Ray cluster, or of this machine where no address is given."""

    kind: str = "ray"
    jobs: int | None = None
    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    poll_s = 0.5

    @property
    def at_once(self) -> int | None:
        return self.jobs

    def check(self) -> None:
        _need("ray", self.kind, "ray")

    def start(self, jobs: Sequence[Job], root: Path, wake: Wake) -> list[Running]:
        import ray

        if not ray.is_initialized():
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.WARNING)
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_call)
        return [
            RayTask(job, task.remote(RemoteJob(job, Path.cwd(), processes.COMMAND))) for job in jobs
        ]

    def find(self, job: Job, root: Path, id: str) -> Running | None:
        return None

    def close(self) -> None:
        import ray

        ray.shutdown()


def _call(job: RemoteJob) -> int:
    return job()


class RayTask:
    """A task of Ray."""

    id = None

    def __init__(self, job: Job, reference: Any) -> None:
        self.job, self.reference = job, reference
        self.stops = 0

    def poll(self) -> int | None:
        import ray

        done, _ = ray.wait([self.reference], timeout=0)
        if not done:
            return None
        try:
            return int(ray.get(done[0]))
        except ray.exceptions.RayError as error:
            with self.job.log.open("a") as said:
                said.write(f"{error}\n")
            cancelled = isinstance(error, ray.exceptions.TaskCancelledError)
            return INTERRUPTED if cancelled else FAILED

    def stop(self) -> None:
        import ray

        self.stops += 1
        ray.cancel(self.reference, force=self.stops > 2)


def import_submitit() -> Any:
    """Import submitit without its set-up of logging, which closes the log handlers of others.

    One of them is absl's, of TensorBoard: it would close what was `sys.stderr` when it was made.
    Jobs, in processes of their own, log as submitit means them to.
    """
    name, given = "SUBMITIT_LOG_LEVEL", os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ[name] = "NOCONFIG"
    try:
        return importlib.import_module("submitit")
    finally:
        del os.environ[name]
        if given is not None:
            os.environ[name] = given


def _need(package: str, kind: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"launcher={kind}: {package} is not installed in {sys.executable}; expected it there: "
            f"pip install '.[{extra}]' in a checkout of fbnas"
        )


LAUNCHERS: dict[str, Any] = {
    "local": Local,
    "submitit_local": Submitit,
    "slurm": Slurm,
    "ray": Ray,
}
