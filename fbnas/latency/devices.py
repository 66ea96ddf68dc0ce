"""Device: the machine that a network is meant for, and how models are measured on it."""

import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fbnas.errors import InputError, check_known, unknown
from fbnas.files import read_jsonl, write_json
from fbnas.latency.runtimes import available_runtime, runtime
from fbnas.latency.timing import Timing, noise_floor, summarize
from fbnas.progress import progress

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

RUNNER = Path(__file__).parent / "runner.py"
ROUNDS = 30
QUIET_NOISE_FLOOR = 0.05  # test against retest; above it the machine is busy with something else
QUIET_ATTEMPTS = 4
CALIBRATION_BATCHES = 2  # ranges only have to be alive: they do not change the speed


@dataclass(frozen=True)
class Measurement:
    """Timings in the order of the files, and what they were made from.

    `noise_floor`: a fraction. `samples_ms`: (rounds, files), nan where a file was not visited.
    """

    timings: tuple[Timing, ...]
    noise_floor: float
    samples_ms: np.ndarray


@dataclass(frozen=True)
class Device:
    """A machine, the runtime that executes networks on it, their precision, the number of threads.

    Raises:
        InputError: unknown runtime or precision, threads below 1.
    """

    name: str = "local"
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    threads: int = 1

    def __post_init__(self) -> None:
        precisions = runtime(self.runtime).PRECISIONS
        if self.precision not in precisions:
            raise unknown("precision", self.precision, precisions)
        if type(self.threads) is not int or self.threads < 1:
            raise InputError(f"device.threads is {self.threads!r}; expected a whole number from 1")
        if not self.name or not isinstance(self.name, str):
            raise InputError(f"device.name is {self.name!r}; expected a name")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Device":
        """Build a device from a config.

        Raises:
            InputError: unknown key (the closest is named), or a value that makes no device.
        """
        known = [field.name for field in fields(cls)]
        check_known("device option", values, known)
        return cls(**values)

    def fingerprint(self) -> dict[str, str]:
        """Return what a latency depends on, for a table's header."""
        return {
            "device": self.name,
            "machine": platform.machine(),
            "cpu": _cpu_model(),
            "cores": str(os.cpu_count()),
            "os": f"{platform.system()} {platform.release()}",
            "runtime": self.runtime,
            "runtime_version": available_runtime(self.runtime).version(),
            "precision": self.precision,
            "threads": str(self.threads),
        }

    def compile(
        self,
        module: "nn.Module",
        input_shape: tuple[int, int, int],
        path: Path,
        *,
        batch: int = 1,
        seed: int = 0,
    ) -> None:
        """Write the file that the device's runtime executes at the device's precision, to be timed.

        int8 takes its ranges from normal noise, which changes the answers but not the speed.

        Args:
            input_shape: (channels, height, width) of one image.
        """
        generator = np.random.default_rng(seed)
        shape = (batch, *input_shape)
        calibration = [
            generator.standard_normal(shape, dtype=np.float32) for _ in range(CALIBRATION_BATCHES)
        ]
        available_runtime(self.runtime).compile(
            module,
            input_shape,
            path,
            precision=self.precision,
            batch=batch,
            calibration=calibration,
        )

    def measure(
        self,
        files: Sequence[Path],
        *,
        rounds: int = ROUNDS,
        seed: int = 0,
        work: Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Measurement:
        """Time model files against each other, in a process of its own.

        Interleaved rounds in random order; a file's latency is the 10th percentile of its times.

        Args:
            rounds: how often each file is visited; half as often again where it is unstable.
            work: folder in which an interrupted measurement continues with the round it lost.
            progress: called with the number of rounds just finished.

        Raises:
            InputError: a file is missing or no model of the runtime, or `rounds` is below 2.
            RuntimeError: the measuring process ended early.
        """
        if rounds < 2:
            raise InputError(f"rounds is {rounds}; expected at least 2, to test against retest")
        if work is None:
            with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
                work = Path(folder)
                return self.measure(files, rounds=rounds, seed=seed, work=work, progress=progress)
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: no such model file")
        job = {
            "models": [str(file.resolve()) for file in files],
            "digests": [_digest(file) for file in files],
            "runtime": available_runtime(self.runtime).__file__,
            "fingerprint": self.fingerprint(),
            "threads": self.threads,
            "seed": seed,
            "rounds": rounds,
        }
        done = _prepare(work, job)
        advance = progress or (lambda steps: None)
        advance(min(done, rounds))
        _run(work, advance)
        lines = read_jsonl(work / "timings.jsonl")
        samples_ms = np.array([line["ms"] for line in lines], dtype=float)
        timings = tuple(summarize(column, seed=seed) for column in samples_ms.T)
        return Measurement(timings, noise_floor(samples_ms), samples_ms)

    def measure_quietly(
        self, files: Sequence[Path], description: str, *, rounds: int = ROUNDS, seed: int = 0
    ) -> Measurement:
        """Measure behind a progress display; while the machine is too busy to tell, measure again.

        Of four attempts at most the one with the lowest noise floor is kept.

        Raises:
            InputError: as `measure`.
        """
        best: Measurement | None = None
        for attempt in range(QUIET_ATTEMPTS):
            with progress(description, total=rounds) as advance:
                found = self.measure(files, rounds=rounds, seed=seed + attempt, progress=advance)
            if best is None or found.noise_floor < best.noise_floor:
                best = found
            if best.noise_floor <= QUIET_NOISE_FLOOR:
                break
            log.warning(
                "The machine is busy: test and retest differ by %.1f %%%s.",
                100 * found.noise_floor,
                "" if attempt + 1 == QUIET_ATTEMPTS else "; measuring again",
            )
        assert best is not None
        return best


def _prepare(work: Path, job: dict[str, Any]) -> int:
    """Write job.json and drop another job's rounds; return how many of this one are finished."""
    timings = work / "timings.jsonl"
    try:
        before = json.loads((work / "job.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        before = {}
    if {**before, "rounds": 0} != {**job, "rounds": 0}:
        timings.unlink(missing_ok=True)
    write_json(work / "job.json", job)
    return len(read_jsonl(timings)) if timings.exists() else 0


def _run(work: Path, advance: Callable[[int], None]) -> None:
    # -P keeps this folder's table.py, timing.py, ... from shadowing modules of the runtime. In a
    # session of its own the child does not see Ctrl-C: it is killed below; should this process be
    # killed itself, stdin closes and ends the child.
    command = [sys.executable, "-P", str(RUNNER), str(work.resolve()), "--with-parent"]
    errors = work / "stderr.txt"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                word, _, fraction = line.partition(" ")
                index, _, total = fraction.partition("/")
                if word == "round" and int(index) <= int(total):
                    advance(1)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    last = (errors.read_text().splitlines() or ["it said nothing"])[-1]
    if code == 2:
        raise InputError(f"{last}; expected a model file written by fbnas export or fbnas profile")
    if code != 0:
        raise RuntimeError(f"the measuring process ended early (exit code {code}): {last}")


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()
