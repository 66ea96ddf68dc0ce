"""Device: the machine that a network is meant for, and how models are measured on it."""

import functools
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fbnas.errors import InputError, check_known, unknown
from fbnas.files import read_json, read_jsonl, write_json
from fbnas.latency import model_files, timing
from fbnas.latency.hosts import Host, LocalHost, RuntimeCrashError
from fbnas.latency.runner import cpu_model
from fbnas.latency.runtimes import available_runtime, provider_name, runtime
from fbnas.latency.timing import Timing
from fbnas.progress import plain_lines, progress

if TYPE_CHECKING:
    from torch import nn

    from fbnas.latency.roofline import Roofline

log = logging.getLogger(__name__)

ROUNDS = 30
QUIET_NOISE_FLOOR = 0.05  # test against retest; above it the machine is busy with something else
LEAST_ALLOWED = 0.01
QUIET_ATTEMPTS = 4
CALIBRATION_BATCHES = 2  # ranges only have to be alive: they do not change the speed
KINDS = ("local", "ssh", "roofline")


def allowed_ratio(noise_floor: float) -> float:
    """Return how many times as slow as another a file may measure and still count as no slower.

    One percent in any case, which two copies of a file may differ by: each is loaded to another
    place. A busy machine's noise floor excuses no more than `QUIET_NOISE_FLOOR`.
    """
    return 1 + min(max(noise_floor, LEAST_ALLOWED), QUIET_NOISE_FLOOR)


@dataclass(frozen=True)
class Measurement:
    """Timings in the order of the files, and what they were made from.

    `timings`: None for a model that failed; `failures` then has the runtime's own words by index.
    `noise_floor`: a fraction. `samples_ms`: (rounds, files), nan where a file was not visited.
    `drift`: how far the machine's own speed moved, a fraction. `load`: of other processes, per
    core, 0 to 1; None where it cannot be known. `unstable`: how many timings are still wide.
    """

    timings: tuple[Timing | None, ...]
    noise_floor: float
    samples_ms: np.ndarray
    failures: dict[int, str] = field(default_factory=dict)
    drift: float = 0.0
    load: float | None = None
    unstable: int = 0

    @property
    def quiet(self) -> bool:
        """Whether the machine was quiet enough to tell latencies apart."""
        return self.noise_floor <= QUIET_NOISE_FLOOR

    @property
    def whole(self) -> tuple[Timing, ...]:
        """The timings where none failed, which is what `measure` returns unless told otherwise."""
        assert not self.failures
        return tuple(found for found in self.timings if found is not None)


@dataclass(frozen=True)
class Device:
    """A machine, the runtime that executes networks on it, their precision, the number of threads.

    Args:
        name: stated in tables, which hold for one device only.
        provider: what executes within the runtime; empty for the runtime's default.
        cores: those that the measuring process is pinned to; empty for all.
        python: interpreter on the device that has the runtime; None: this one, `python3` over SSH.
        converter: interpreter on this machine that has the runtime's converter; None: this one,
            or `python` where the device is this machine.
        host: to reach by `ssh`; empty for this machine.
        ssh_config: a file for `ssh -F` instead of the user's own.
        folder: on the host, to work in; None for one in its folder of temporary files.
        keep: leave the files there.

    Raises:
        InputError: unknown runtime, provider or precision, threads below 1, no such core.
    """

    name: str = "local"
    runtime: str = "onnxruntime"
    provider: str = ""
    precision: str = "fp32"
    threads: int = 1
    cores: tuple[int, ...] = ()
    python: str | None = None
    converter: str | None = None
    host: str = ""
    ssh_config: str | None = None
    folder: str | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        precisions = runtime(self.runtime).PRECISIONS
        if self.precision not in precisions:
            raise unknown("precision", self.precision, precisions)
        object.__setattr__(self, "provider", provider_name(self.runtime, self.provider or ""))
        if type(self.threads) is not int or self.threads < 1:
            raise InputError(f"device.threads is {self.threads!r}; expected a whole number from 1")
        if not self.name or not isinstance(self.name, str):
            raise InputError(f"device.name is {self.name!r}; expected a name")
        cores = tuple(self.cores or ())
        if any(type(core) is not int or core < 0 for core in cores):
            raise InputError(
                f"device.cores is {list(cores)}; expected numbers of cores counted from 0, as in "
                "[0, 1], or [] for all"
            )
        object.__setattr__(self, "cores", cores)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Device":
        """Build a device from a config of `kind` local or ssh.

        Raises:
            InputError: unknown key (the closest is named), or a value that makes no device.
        """
        given = dict(values)
        kind = given.pop("kind", "ssh" if given.get("host") else "local")
        if kind not in ("local", "ssh"):
            raise unknown("kind of device", kind, KINDS)
        remote = ("host", "ssh_config", "folder", "keep")
        known = [f.name for f in fields(cls) if kind == "ssh" or f.name not in remote]
        check_known("device option", given, known)
        if kind == "ssh":
            if not given.get("host"):
                raise InputError("device=ssh needs device.host=...; expected a name that ssh knows")
            given["name"] = given.get("name") or given["host"]
        return cls(**given)

    @property
    def kind(self) -> str:
        return "ssh" if self.host else "local"

    @property
    def suffix(self) -> str:
        """Of the model files that its runtime loads."""
        suffix: str = runtime(self.runtime).SUFFIX
        return suffix

    @property
    def converting_python(self) -> str | None:
        """The interpreter on this machine that writes its files; None for this one."""
        return self.converter or (None if self.host else self.python)

    def fingerprint(self) -> dict[str, str]:
        """Return what a latency depends on, for a table's header.

        Raises:
            InputError: the device cannot be reached, or it lacks the runtime or the provider.
        """
        facts = _facts(self.host, self.python, self.ssh_config, self.runtime)
        if self.provider not in facts["providers"]:
            found = [name.partition(".")[0] for name in facts["providers"]]
            if self.provider not in found:
                raise InputError(
                    f"{self.runtime} has no provider {self.provider} on {self.name}, only "
                    f"{', '.join(facts['providers'])}; to get it: "
                    f"{runtime(self.runtime).PROVIDERS[self.provider]}"
                )
        pinned = {"pinned_cores": " ".join(map(str, self.cores))} if self.cores else {}
        return {
            "device": self.name,
            "machine": facts["machine"],
            "cpu": facts["cpu"],
            "cores": str(facts["cores"]),
            "os": facts["os"],
            "runtime": self.runtime,
            "runtime_version": facts["version"],
            "provider": self.provider,
            "precision": self.precision,
            "threads": str(self.threads),
            **pinned,
        }

    def compile(
        self,
        module: "nn.Module",
        input_shape: tuple[int, int, int],
        path: Path,
        *,
        batch: int = 1,
        seed: int = 0,
        calibration: Sequence[np.ndarray] | None = None,
    ) -> None:
        """Write the file that the device's runtime executes, and beside it what torch answers.

        Without `calibration` int8 takes its ranges from normal noise, which changes the answers
        but not the speed.

        Args:
            input_shape: (channels, height, width) of one image.
            calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges.

        Raises:
            ConversionError: this module cannot be converted; in the converter's own words.
            InputError: there is no converter.
        """
        from fbnas.latency.checks import write_check
        from fbnas.latency.converting import convert
        from fbnas.space.structure import rounds

        shown = noise((batch, *input_shape), seed) if calibration is None else calibration
        convert(
            self.runtime,
            module,
            input_shape,
            path,
            precision=self.precision,
            batch=batch,
            calibration=shown,
            converter=self.converting_python,
        )
        tolerance = runtime(self.runtime).TOLERANCE["int8" if rounds(module) else self.precision]
        write_check(module, input_shape, path, batch=batch, seed=seed, tolerance=tolerance)

    def measure(
        self,
        files: Sequence[Path],
        *,
        rounds: int = ROUNDS,
        seed: int = 0,
        work: Path | None = None,
        progress: Callable[[int], None] | None = None,
        seconds: float | None = None,
        keep_failures: bool = False,
    ) -> Measurement:
        """Time model files against each other, in a process of its own.

        Interleaved rounds in random order; a file's latency is the 10th percentile of its times.

        Args:
            rounds: how often each file is visited; unstable ones up to three times as often.
            work: folder in which an interrupted measurement continues with the round it lost.
            progress: called with the number of rounds just finished.
            seconds: time after which unstable files are no longer visited again.
            keep_failures: go on without files that fail, unless all do.

        Raises:
            InputError: a file is missing, is no model of the runtime or answers otherwise than
                torch, `rounds` is below 2, or the device cannot be reached.
            RuntimeError: the measuring process ended early.
        """
        if rounds < 2:
            raise InputError(f"rounds is {rounds}; expected at least 2, to test against retest")
        if work is None:
            with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
                return self.measure(
                    files,
                    rounds=rounds,
                    seed=seed,
                    work=Path(folder),
                    progress=progress,
                    seconds=seconds,
                    keep_failures=keep_failures,
                )
        job = {**self._job(files), "seed": seed, "rounds": rounds, "seconds": seconds}
        done = _prepare(work, job)
        advance = progress or (lambda steps: None)
        advance(min(done, rounds))
        _run_without_crashes(self._host(), work, _shown(advance, len(files)))
        found = _measurement(work, seed=seed)
        if found.failures and not (keep_failures and len(found.failures) < len(files)):
            index, words = next(iter(found.failures.items()))
            raise InputError(
                f"{files[index]} cannot be run by {self.runtime}: {words}; expected a model file "
                f"({self.suffix}) written by fbnas export or fbnas profile for this runtime"
            )
        return found

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
            if best.quiet:
                break
            log.warning(
                "The machine is busy: test and retest differ by %.1f %%%s.",
                100 * found.noise_floor,
                "" if attempt + 1 == QUIET_ATTEMPTS else "; measuring again",
            )
        assert best is not None
        return best

    def scores(
        self, path: Path, images: np.ndarray, *, batch: int = 32, there: bool = False
    ) -> np.ndarray:
        """Return what a model file answers, as the runtime computes it.

        Computed on this machine where the runtime is here too, else on the device.

        Args:
            images: (n, c, h, w) float32.
            batch: images per run, where the file leaves it open.
            there: on the device in any case.

        Returns:
            (n, classes) float32.

        Raises:
            InputError: as `measure`, or images of another shape.
        """
        here = bool(self.host) and not there and runtime(self.runtime).available()
        host: Host = LocalHost() if here else self._host()
        with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
            work = Path(folder)
            np.save(work / "images.npy", np.ascontiguousarray(images, dtype=np.float32))
            job = {**self._job([path]), "images": str(work / "images.npy"), "batch": batch}
            if here:
                job |= {"settings": {"threads": os.cpu_count() or 1, "provider": ""}, "cores": None}
            write_json(work / "job.json", job)
            host.run(work, lambda word, done, total: None, scores=True)
            found: np.ndarray = np.load(work / "scores.npy")
        return found

    def _job(self, files: Sequence[Path]) -> dict[str, Any]:
        for path in (part for file in files for part in model_files.parts(file)):
            if not path.is_file():
                raise InputError(f"{path}: no such model file")
        file = runtime(self.runtime)
        return {
            "models": [str(path.resolve()) for path in files],
            "digests": [model_files.digest(path) for path in files],
            "runtime": str(file.__file__),
            "fingerprint": self.fingerprint(),
            "settings": {"threads": self.threads, "provider": self.provider},
            "cores": list(self.cores) or None,
            "tolerance": file.TOLERANCE[self.precision],
            "failed": {},
        }

    def _host(self) -> Host:
        if not self.host:
            return LocalHost(self.python)
        from fbnas.latency.ssh import SSHHost

        return SSHHost(
            self.host,
            python=self.python or "python3",
            ssh_config=self.ssh_config,
            folder=self.folder,
            keep=self.keep,
        )


def device_from(values: Mapping[str, Any]) -> "Device | Roofline":
    """Build the device of a config by its `kind`: local, ssh or roofline.

    Raises:
        InputError: unknown kind or key, or a value that makes no device.
    """
    if values.get("kind") == "roofline":
        from fbnas.latency.roofline import Roofline

        return Roofline.from_dict(values)
    return Device.from_dict(values)


@functools.cache
def _facts(
    host: str, python: str | None, ssh_config: str | None, runtime_name: str
) -> dict[str, Any]:
    """What is known of the machine and the runtime on it, asked once per process.

    Raises:
        InputError: it cannot be reached, or has not that runtime.
    """
    if not host and python is None:
        file = available_runtime(runtime_name)
        return {
            "machine": platform.machine(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "os": f"{platform.system()} {platform.release()}",
            "version": file.version(),
            "providers": file.providers(),
        }
    device = Device(runtime=runtime_name, host=host, python=python, ssh_config=ssh_config)
    file = runtime(runtime_name)
    facts = device._host().facts(Path(str(file.__file__)))
    if not facts["available"]:
        reason = f" ({facts['error']})" if facts.get("error") else ""
        where = f"on {host}" if host else f"in {python}"
        raise InputError(
            f"runtime {runtime_name} is not installed {where}{reason}; install it there: "
            f"{file.INSTALL}"
        )
    return facts


def noise(shape: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Return batches of normal noise, from which int8 takes ranges where no images are given."""
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape, dtype=np.float32) for _ in range(CALIBRATION_BATCHES)]


def _prepare(work: Path, job: dict[str, Any]) -> int:
    """Write job.json and drop another job's rounds; return how many of this one are finished."""
    timings = work / "timings.jsonl"
    try:
        before = json.loads((work / "job.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        before = {}
    may_differ = {"rounds": 0, "seconds": 0, "failed": {}}
    if {**before, **may_differ} == {**job, **may_differ}:
        job = {**job, "failed": before.get("failed", {})}  # crashes that are known
    else:
        timings.unlink(missing_ok=True)
    write_json(work / "job.json", job)
    return len(read_jsonl(timings)) if timings.exists() else 0


def _run_without_crashes(host: Host, work: Path, advance: Callable[[str, int, int], None]) -> None:
    """Run the job; a model on which the runtime crashes is left out and the others go on."""
    while True:
        try:
            return host.run(work, advance)
        except RuntimeCrashError as crash:
            job = read_json(work / "job.json")
            if str(crash.index) in job["failed"]:
                raise
            log.warning("Model %d of %d: %s.", crash.index + 1, len(job["models"]), crash)
            job["failed"][str(crash.index)] = str(crash)
            write_json(work / "job.json", job)


def _shown(advance: Callable[[int], None], models: int) -> Callable[[str, int, int], None]:
    """Rounds move the caller's display; slow loading says how far it is."""
    load = plain_lines("Loading models", models)
    reached = 0

    def show(word: str, done: int, total: int) -> None:
        nonlocal reached
        if word == "round" and done <= total:
            advance(1)
        elif word == "loading" and done > reached:
            load(done - reached)
            reached = done

    return show


def _measurement(work: Path, *, seed: int) -> Measurement:
    states = read_json(work / "loaded.json")
    failures = {i: state["error"] for i, state in enumerate(states) if state["error"] is not None}
    path = work / "timings.jsonl"
    lines = read_jsonl(path) if path.exists() else []
    if not lines or len(failures) == len(states):
        return Measurement((None,) * len(states), 0.0, np.empty((0, len(states))), failures)
    samples_ms = np.array([line["ms"] for line in lines], dtype=float)
    samples_ms[:, list(failures)] = np.nan
    timings = tuple(
        None if i in failures else timing.summarize(column, seed=seed)
        for i, column in enumerate(samples_ms.T)
    )
    return Measurement(
        timings,
        timing.noise_floor(samples_ms),
        samples_ms,
        failures,
        drift=timing.drift([line["probe_ms"] for line in lines]),
        load=lines[-1].get("load"),
        unstable=timing.unstable(samples_ms),
    )
