"""What runs on the device: model files in, raw times out. Stdlib, numpy, one runtime; no fbnas.

    python runner.py JOB_DIR [--with-parent] [--stream]    measure
    python runner.py JOB_DIR --scores [--with-parent]      run one model on images
    python runner.py --facts RUNTIME_FILE                  one line of JSON about this machine

One file, for python 3.8 and later: it is shipped to boards. JOB_DIR/job.json holds
    models      paths, absolute or relative to JOB_DIR; PATH.check.npz beside a model is its check
    runtime     path of a file of runtimes/
    settings    what its `load` takes: {"threads": int, "provider": str}
    rounds, seed
    cores       optional: the cores that this process may use
    tolerance   optional: for checks that state none
    seconds     optional: unstable models are visited again until so much time has passed
    warm        optional: untimed runs of a model before it is measured
    failed      optional: {index: words}, models that are not to be loaded (they crashed before)
    images      for --scores: a .npy file (n, c, h, w) float32; scores.npy (n, ...) is written
    batch       optional, for --scores: images per run of a model that leaves the batch open

loading.json {"index": i} names the model that is being loaded, checked and warmed up: it is left
behind where the runtime takes the whole process down. loaded.json is a list with
{"error": words or null, "difference": relative RMS against the check or null, "repeats": int} per
model. Models with an error are left out and the others go on. Every finished round is one line of
timings.jsonl: {"round": i, "ms": [a time for each model, null where not visited], "probe_ms": time
of a fixed piece of work, "load": other processes' load per core since the start, or null}, so that
an interrupted job continues with the round it lost.

Prints `loading i/n`, `round i/n`, `scored i/n`. With --stream, `loaded n/n` and `round i/n` are
each followed by a line with the JSON that went into the file. Exit 2, with one line on stderr:
the job cannot be done here; 4: a file cannot be written (disk full). With --with-parent the process
ends when its stdin closes: it never outlives who started it.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Modules beside this file would shadow others; numpy's threads would disturb the measuring.
    sys.path[:] = [
        p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent
    ]
    for library in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM"):
        os.environ[library + "_NUM_THREADS"] = "1"

try:
    import numpy as np
except ImportError:
    np = None  # type: ignore[assignment]  # --facts says so

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

VISIT_MS = 0.4  # a visit of a shorter model repeats it this long: one call's jitter is some 10 us
MAX_REPEATS = 50
LOW_QUANTILE = 0.10  # disturbances only ever add time
RESAMPLES = 200
WIDE = 0.03  # a 95 % interval, or early against late rounds, that is wider is measured again
EXTRA_ROUNDS = 2  # times `rounds`, at most, for models that are wide
EXTRA_SECONDS = 600.0
LOAD_SECONDS = 0.5  # --facts watches the other processes so long
SCORES_BATCH = 32
CANNOT_WRITE = 4


class JobError(Exception):
    """The job cannot be done here; the line for stderr."""


class WriteError(Exception):
    """A file cannot be written; the line for stderr."""


def main(arguments: list[str]) -> int:
    options = {argument for argument in arguments if argument.startswith("--")}
    place = Path(next(argument for argument in arguments if not argument.startswith("--")))
    if "--with-parent" in options:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # runtimes chatter on stdout, from C++ too

    def say(*lines: str) -> None:
        out.write("".join(line + "\n" for line in lines))
        out.flush()

    try:
        if "--facts" in options:
            say(json.dumps(facts(place)))
        elif "--scores" in options:
            scores(place, say)
        else:
            run_job(place, say, "--stream" in options)
    except (JobError, WriteError) as error:
        print(error, file=sys.stderr)
        return CANNOT_WRITE if isinstance(error, WriteError) else 2
    return 0


def run_job(folder: Path, say: Callable[..., None], stream: bool) -> None:
    """Loads the models of the job and measures those that can be run."""
    watch = LoadWatch()
    loading = folder / "loading.json"
    if loading.exists():
        loading.unlink()  # of a run that was interrupted
    job, runtime = start(folder)
    loaded = Loaded(folder, say, stream)
    for i in range(len(job["models"])):
        loaded.add(i, job, runtime)
        say(f"loading {i + 1}/{len(job['models'])}")
    loaded.save()
    if loading.exists():
        loading.unlink()
    if not any(model is not None for model in loaded.models):
        return

    def finished(index: int, times: list[float | None], probe_ms: float) -> None:
        row = {"round": index, "ms": times, "probe_ms": probe_ms, "load": watch.load()}
        line = json.dumps(row)
        write(folder / "timings.jsonl", line + "\n", append=True)
        shown = f"round {index + 1}/{job['rounds']}"
        say(*([shown, line] if stream else [shown]))

    measure(runtime, loaded, job, finished_rounds(folder / "timings.jsonl", loaded), finished)


def start(folder: Path) -> tuple[dict[str, Any], ModuleType]:
    """Reads the job, pins the process to its cores and imports the runtime."""
    if np is None:
        raise JobError(
            f"numpy is not installed in {sys.executable}: install it (pip install numpy)"
        )
    try:
        job = json.loads((folder / "job.json").read_text())
    except (OSError, ValueError) as error:
        raise JobError(f"{folder / 'job.json'} cannot be read: {words(error)}") from error
    job.setdefault("settings", {"threads": job.get("threads", 1), "provider": ""})
    if job.get("cores") is not None:
        if not hasattr(os, "sched_setaffinity"):
            raise JobError(f"{platform.system()} cannot pin a process to cores: leave cores empty")
        try:
            os.sched_setaffinity(0, job["cores"])
        except OSError as error:
            raise JobError(
                f"cores {job['cores']} cannot be used ({words(error)}); expected some of "
                f"{sorted(os.sched_getaffinity(0))}"
            ) from error
    try:
        runtime = load_runtime(folder / job["runtime"])
        if not runtime.available():
            raise JobError(f"{runtime.NAME} is not installed here; install it: {runtime.INSTALL}")
    except (ImportError, OSError, SyntaxError) as error:
        raise JobError(f"{job['runtime']} cannot be used here: {words(error)}") from error
    return job, runtime


class Loaded:
    """The models of a job, None for those that are left out, and what loaded.json says of them."""

    def __init__(self, folder: Path, say: Callable[..., None], stream: bool) -> None:
        self.folder, self.say, self.stream = folder, say, stream
        self.models: list[Any] = []
        self.states: list[dict[str, Any]] = []

    def add(self, i: int, job: dict[str, Any], runtime: ModuleType) -> None:
        """Load, check and warm up the next model."""
        state: dict[str, Any] = {"error": None, "difference": None, "repeats": 1}
        self.models.append(None)
        self.states.append(state)
        if str(i) in (job.get("failed") or {}):
            state["error"] = job["failed"][str(i)]
            return
        write(self.folder / "loading.json", json.dumps({"index": i}))
        path = self.folder / job["models"][i]
        try:
            model = runtime.load(path, job["settings"])
            state["difference"], state["error"] = check(runtime, model, path, job.get("tolerance"))
            if state["error"] is None:
                state["repeats"] = warm_up(runtime, model, job.get("warm") or 3)
                self.models[i] = model
        except Exception as error:  # of any class that a runtime has
            state["error"] = words(error)

    def load_again(self, job: dict[str, Any], runtime: ModuleType) -> None:
        """Load every model anew, in another order, so that each lies elsewhere in memory.

        Where it lies is luck that lasts as long as it is loaded: two copies of a network differ by
        0.8 % on average (ONNX Runtime, 2-core x86). A retest without this would not see it.
        """
        there = [i for i, model in enumerate(self.models) if model is not None]
        self.models = [None] * len(self.models)
        gc.collect()
        for i in random.Random(job["seed"]).sample(there, len(there)):
            write(self.folder / "loading.json", json.dumps({"index": i}))
            try:
                model = runtime.load(self.folder / job["models"][i], job["settings"])
                shape = [max(size, 1) for size in runtime.input_shape(model)]
                runtime.feed(model, noise(0, shape))
                warm_up(runtime, model, job.get("warm") or 3)
                self.models[i] = model
            except Exception as error:  # of any class that a runtime has
                self.fail(i, error)
        (self.folder / "loading.json").unlink()

    def fail(self, i: int, error: Exception) -> None:
        self.models[i] = None
        self.states[i]["error"] = words(error)
        self.save()

    def save(self) -> None:
        text = json.dumps(self.states)
        write(self.folder / "loaded.json", text)
        if self.stream:
            self.say(f"loaded {len(self.states)}/{len(self.states)}", text)


def check(
    runtime: ModuleType, model: Any, path: Path, tolerance: float | None
) -> tuple[float | None, str | None]:
    """Runs the model once on the images of its check, or on noise; returns difference and error.

    The difference is the RMS of what was found less torch's answers, relative to their own RMS.
    """
    file = Path(str(path) + ".check.npz")
    if not file.exists():
        shape = [max(size, 1) for size in runtime.input_shape(model)]
        runtime.feed(model, noise(0, shape))
        runtime.run(model)
        return None, None
    with np.load(str(file)) as archive:
        saved = {name: archive[name] for name in archive.files}
    runtime.feed(model, noise(int(saved["seed"]), [int(size) for size in saved["shape"]]))
    runtime.run(model)
    found = np.asarray(runtime.result(model), dtype=np.float64)
    if found.size != int(saved["size"]):
        return None, f"its output has {found.size} values, torch's has {int(saved['size'])}"
    if not np.isfinite(found).all():
        return None, "its output holds NaN or infinite values, torch's does not"
    error = found.reshape(-1)[saved["positions"]] - saved["values"]
    difference = float(np.sqrt((error**2).mean()) / max(float(saved["rms"]), 1e-30))
    limit = float(saved["tolerance"]) if "tolerance" in saved else tolerance
    if limit is not None and difference > limit:
        return difference, (
            f"its output differs from torch's by {difference:.3g} "
            f"(relative RMS, tolerance {limit:g})"
        )
    return difference, None


def noise(seed: int, shape: list[int]) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def measure(
    runtime: ModuleType,
    loaded: Loaded,
    job: dict[str, Any],
    done: list[list[float | None]],
    finished: Callable[[int, list[float | None], float], None],
) -> None:
    """Adds the rounds that `done` does not hold yet; `finished` is told of each."""
    rounds, models, first = job["rounds"], loaded.models, len(done)
    seconds = job.get("seconds")
    until = time.monotonic() + (EXTRA_SECONDS if seconds is None else seconds)
    gc.collect()
    gc.disable()  # a collection in mid-visit would be billed to one model
    chosen = list(range(len(models)))
    for index in range(len(done), rounds + EXTRA_ROUNDS * rounds):
        if index == rounds // 2 and index > first:
            loaded.load_again(job, runtime)
            models = loaded.models
        chosen = [i for i in chosen if models[i] is not None]
        if index >= rounds:
            chosen = unstable(done, chosen, rounds)  # who is narrow stays so: it is not visited
        if not chosen or (index >= rounds and time.monotonic() > until):
            break
        order = random.Random(f"{job['seed']}/{index}").sample(chosen, len(chosen))
        probe_ms = probe()
        times: list[float | None] = [None] * len(models)
        for i in order:
            try:
                times[i] = visit(runtime, models[i], loaded.states[i]["repeats"])
            except Exception as error:  # of any class that a runtime has
                loaded.fail(i, error)
        done.append(times)
        finished(index, times, probe_ms)


def visit(runtime: ModuleType, model: Any, repeats: int) -> float:
    """Mean ms of one run over `repeats` runs, after one that is not timed.

    The models visited in between have emptied the caches. Without the first run a network's time
    would depend on what it is compared with: 15 % for space fbnet_cifar (2-core x86).
    """
    runtime.run(model)
    if hasattr(runtime, "run_timed"):
        return float(runtime.run_timed(model, repeats))
    start = time.perf_counter_ns()
    for _ in range(repeats):
        runtime.run(model)
    return (time.perf_counter_ns() - start) / repeats / 1e6


def warm_up(runtime: ModuleType, model: Any, runs: int) -> int:
    """Runs the model a few times; returns how many runs fill a visit."""
    fastest_ms = min(visit(runtime, model, 1) for _ in range(runs))
    return min(max(math.ceil(VISIT_MS / max(fastest_ms, 1e-6)), 1), MAX_REPEATS)


def probe() -> float:
    """Ms of a fixed piece of work, most of it in the caches, some in memory: 3 ms on x86,
    which is as long as a scheduler lets one process run while others wait."""
    small, large = _probe_arrays()
    start = time.perf_counter_ns()
    for _ in range(2000):
        np.multiply(small, 0.5, out=small)
        np.add(small, 0.5, out=small)
    for _ in range(4):
        np.multiply(large, 0.5, out=large)
        np.add(large, 0.5, out=large)
    return (time.perf_counter_ns() - start) / 1e6


@functools.lru_cache(maxsize=1)
def _probe_arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.ones(4096, np.float32), np.ones(1 << 20, np.float32)


def unstable(done: list[list[float | None]], among: list[int], rounds: int) -> list[int]:
    """Those `among` the models that have fewer than `rounds` times, or whose times are wide."""
    found = []
    for i in among:
        column = np.array([times[i] for times in done if times[i] is not None], dtype=float)
        if len(column) < rounds or is_wide(column):
            found.append(i)
    return found


def is_wide(times_ms: np.ndarray) -> bool:
    """Whether the interval of the 10th percentile, or its change over time, exceeds 3 % of it.

    Args:
        times_ms: (visits,) of one model, in the order of the visits.
    """
    if len(times_ms) < 2:
        return True
    half = (len(times_ms) + 1) // 2
    early, late = low_quantile(np.sort(times_ms[:half])), low_quantile(np.sort(times_ms[half:]))
    value, low, high = interval(times_ms)
    return bool(max(high - low, abs(early - late)) > WIDE * value)


def interval(times_ms: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The 10th percentile of the times and its bootstrapped 95 % interval.

    A resample's quantile lies between two of the sorted times: which two depends on their number
    alone, so they are drawn once per number.
    """
    ordered = np.sort(times_ms)
    below, above, weight = _resampled_ranks(len(ordered), seed)
    found = np.sort(ordered[below] * (1 - weight) + ordered[above] * weight)
    value = low_quantile(ordered)
    low, high = found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES) - 1]
    return value, min(float(low), value), max(float(high), value)


def low_quantile(ordered: np.ndarray) -> float:
    """The 10th percentile of sorted times; numpy's own needs ten times as long for so few."""
    below, above, weight = _ranks(len(ordered))
    return float(ordered[below] * (1 - weight) + ordered[above] * weight)


def _ranks(count: int) -> tuple[int, int, float]:
    """Between which of `count` sorted values the quantile lies, and how near the second."""
    position = LOW_QUANTILE * (count - 1)
    below = int(position)
    return below, min(below + 1, count - 1), position - below


@functools.lru_cache(maxsize=1000)
def _resampled_ranks(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    ranks = np.sort(np.random.RandomState(seed).randint(0, count, (RESAMPLES, count)), axis=1)
    below, above, weight = _ranks(count)
    return ranks[:, below], ranks[:, above], weight


def finished_rounds(path: Path, loaded: Loaded) -> list[list[float | None]]:
    """The times of the finished rounds; what follows the last whole line is cut off the file."""
    done: list[list[float | None]] = []
    if not path.exists():
        return done
    text, kept = path.read_bytes(), 0
    for line in text.splitlines(keepends=True):
        try:
            times = json.loads(line)["ms"]
        except (ValueError, KeyError, TypeError):
            break
        if len(times) != len(loaded.models) or not line.endswith(b"\n"):
            break
        done.append(times)
        kept += len(line)
    if kept != len(text):
        os.truncate(str(path), kept)
    return done


def scores(folder: Path, say: Callable[..., None]) -> None:
    """Writes what the job's model answers to the job's images, in pieces of the model's batch."""
    job, runtime = start(folder)
    try:
        model = runtime.load(folder / job["models"][0], job["settings"])
        images = np.load(str(folder / job["images"]), mmap_mode="r")
        batch = runtime.input_shape(model)[0]
        size = batch if batch > 0 else min(job.get("batch") or SCORES_BATCH, len(images))
        found = []
        for first in range(0, len(images), size):
            piece = np.array(images[first : first + size], dtype=np.float32)
            count = len(piece)
            if batch > 0 and count < batch:
                piece = np.concatenate([piece, np.repeat(piece[-1:], batch - count, axis=0)])
            runtime.feed(model, piece)
            runtime.run(model)
            found.append(np.array(runtime.result(model), dtype=np.float32)[:count])
            say(f"scored {first + count}/{len(images)}")
    except Exception as error:  # of any class that a runtime has
        raise JobError(
            f"{job['models'][0]} cannot be run by {runtime.NAME}: {words(error)}"
        ) from error
    write(folder / "scores.npy", np.concatenate(found))


def facts(runtime_file: Path) -> dict[str, Any]:
    """What a host has to know about this machine and the runtime on it."""
    watch = LoadWatch()
    time.sleep(LOAD_SECONDS)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "numpy": None if np is None else np.__version__,
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "os": f"{platform.system()} {platform.release()}",
        "available": False,
        "version": None,
        "providers": [],
        "error": None,
        "load": watch.load(),
        "free_bytes": shutil.disk_usage(".").free,
    }
    if np is None:
        return found
    try:
        runtime = load_runtime(runtime_file)
        found["available"] = bool(runtime.available())
        if found["available"]:
            found["version"] = runtime.version()
            found["providers"] = list(runtime.providers())
    except Exception as error:  # an installation that is broken in some way
        found["available"], found["error"] = False, words(error)
    return found


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    board = Path("/proc/device-tree/model")
    if board.exists():
        return board.read_text().strip("\0\n ")
    if sys.platform == "darwin":
        return os.popen("sysctl -n machdep.cpu.brand_string").read().strip()
    return platform.processor() or platform.machine()


class LoadWatch:
    """The load that other processes put on a core since the watch began: 0 idle, 1 all busy."""

    def __init__(self) -> None:
        self.before = self._seconds()

    def load(self) -> float | None:
        """Other processes' load per core; None where it cannot be known, or too early to tell."""
        if self.before is None:
            return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else None
        now = self._seconds()
        assert now is not None
        busy, total, own = (now[i] - self.before[i] for i in range(3))
        return round(min(max(busy - own, 0.0) / total, 1.0), 4) if total > 0 else None

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Busy and total seconds of all cores, and this process's own."""
        try:
            with open("/proc/stat") as file:
                ticks = [int(value) for value in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        per_second = os.sysconf("SC_CLK_TCK")
        idle = sum(ticks[3:5])  # idle, and waiting for a disk
        own = os.times()
        total = sum(ticks) / per_second
        return total - idle / per_second, total, own.user + own.system


def load_runtime(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"runtime_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"no runtime file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, content: str | np.ndarray, *, append: bool = False) -> None:
    """Appends a line, or replaces the file in one step.

    Raises:
        WriteError: the disk is full, or cannot be written.
    """
    target = path if append else Path(str(path) + ".part")
    try:
        with open(target, "ab" if append else "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                np.save(file, content)
        if not append:
            os.replace(target, path)
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {error.strerror}; make room there, then run the same "
            "command: finished rounds are kept"
        ) from error


def words(error: BaseException) -> str:
    return " ".join(str(error).split()) or repr(error)


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)  # the main thread may sit in native code, where no exception reaches it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
