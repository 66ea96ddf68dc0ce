"""What runs on the device: model files in, raw times out. Stdlib, numpy, one runtime; no fbnas.

    python runner.py JOB_DIR [--with-parent]

JOB_DIR/job.json: `models` (paths, relative to JOB_DIR or absolute), `runtime` (path of a file of
runtimes/), `threads`, `rounds`, `seed`. Every finished round is one line of JOB_DIR/timings.jsonl:
{"round": i, "ms": [a time for each model, null where not visited]}, so that an interrupted job
continues with the round it lost. After the rounds come up to half as many again, for the models
whose early and late rounds disagree.

Prints `loading i/n` and `round i/n`. Exit 2, with one line on stderr, where a model cannot be
loaded or run. With --with-parent the process ends when its stdin closes: it never outlives who
started it.
"""

import gc
import importlib.util
import json
import math
import os
import random
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

WARM_UP_RUNS = 3
VISIT_MS = 0.4  # a visit of a shorter model repeats it this long: one call's jitter is some 10 us
MAX_REPEATS = 50
UNSTABLE = 0.05  # early and late rounds that differ by more are measured again


def main(arguments: list[str]) -> int:
    if "--with-parent" in arguments:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    job_dir = Path(arguments[0])
    job = json.loads((job_dir / "job.json").read_text())
    runtime = load_runtime(Path(job["runtime"]))
    models, repeats = [], []
    for i, name in enumerate(job["models"]):
        try:
            model = runtime.load(job_dir / name, {"threads": job["threads"], "provider": ""})
            shape = [max(size, 1) for size in runtime.input_shape(model)]
            runtime.feed(model, np.random.RandomState(0).standard_normal(shape))
            repeats.append(warm_up(runtime, model))
        except ValueError as error:
            reason = " ".join(str(error).split())
            print(f"{name} cannot be run by {runtime.NAME}: {reason}", file=sys.stderr)
            return 2
        models.append(model)
        print(f"loading {i + 1}/{len(job['models'])}", flush=True)
    measure(runtime, models, repeats, job, job_dir / "timings.jsonl")
    return 0


def measure(
    runtime: ModuleType, models: list[Any], repeats: list[int], job: dict[str, Any], path: Path
) -> None:
    """Adds the rounds that `path` does not hold yet, a line each."""
    rounds: int = job["rounds"]
    done = finished_rounds(path)
    gc.collect()
    gc.disable()  # a collection in mid-visit would be billed to one model
    for index in range(len(done), rounds + rounds // 2):
        chosen = list(range(len(models))) if index < rounds else unstable(done)
        if not chosen:
            break
        random.Random(f"{job['seed']}/{index}").shuffle(chosen)
        times: list[float | None] = [None] * len(models)
        for i in chosen:
            times[i] = visit(runtime, models[i], repeats[i])
        done.append(times)
        with path.open("a") as file:
            file.write(json.dumps({"round": index, "ms": times}) + "\n")
        print(f"round {index + 1}/{rounds}", flush=True)


def visit(runtime: ModuleType, model: Any, repeats: int) -> float:
    """Mean ms of one run over `repeats` runs, after one that is not timed.

    The models visited in between have emptied the caches. Without the first run a network's time
    would depend on what it is compared with: 15 % for space fbnet_cifar (2-core x86).
    """
    runtime.run(model)
    start = time.perf_counter_ns()
    for _ in range(repeats):
        runtime.run(model)
    return (time.perf_counter_ns() - start) / repeats / 1e6


def warm_up(runtime: ModuleType, model: Any) -> int:
    """Runs the model a few times; returns how many runs fill a visit."""
    fastest_ms = min(visit(runtime, model, 1) for _ in range(WARM_UP_RUNS))
    return min(max(math.ceil(VISIT_MS / fastest_ms), 1), MAX_REPEATS)


def unstable(done: list[list[float | None]]) -> list[int]:
    """Models whose 10th percentile differs by more than 5 % between early and late rounds."""
    times = np.array(done, dtype=float)
    chosen = []
    for i, column in enumerate(times.T):
        early, late = np.array_split(column[~np.isnan(column)], 2)
        a, b = np.quantile(early, 0.1), np.quantile(late, 0.1)
        if abs(a - b) > UNSTABLE * (a + b) / 2:
            chosen.append(i)
    return chosen


def finished_rounds(path: Path) -> list[list[float | None]]:
    """The times of the finished rounds; a line cut off by a kill is removed from the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    return [json.loads(line)["ms"] for line in whole.splitlines()]


def load_runtime(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"runtime_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"no runtime file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)  # the main thread may sit in native code, where no exception reaches it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
