"""fbnas COMMAND -m: one command for each of several values, and a table of what they came to."""

import contextlib
import logging
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fbnas import __version__
from fbnas.commands import DONE, FAILED, INTERRUPTED, MISSED, WRONG_INPUT
from fbnas.commands.folder import empty
from fbnas.commands.jobs import JOBS_FILE, Job
from fbnas.commands.launchers import build_launcher, run_all
from fbnas.commands.parts import check_parts
from fbnas.commands.sweep import Sweep, plan
from fbnas.files import read_json, write_json

log = logging.getLogger(__name__)

RESULTS = (
    "accuracy_top1",
    "latency_ms",
    "predicted_latency_ms",
    "target_ms",
    "params",
    "macs",
    "model_bytes",
)
MEASURING = ("run", "profile", "evaluate", "calibrate")  # what times models on this machine


def main(command: str, overrides: Sequence[str]) -> int:
    """Run a command once for each of several values and return the worst exit code.

    1 (failed, or ended by a signal) before 2 (wrong input) before 3 (target missed) before 0; 130
    where Ctrl-C stopped them.
    """
    sweep = plan(command, overrides)
    launcher = build_launcher(sweep.launcher)
    sweep.check()
    record = Record(sweep, shlex.join(["fbnas", command, "-m", *overrides]))
    todo = [job for job in sweep.jobs if not record.keep(job)]
    for job, config in zip(sweep.jobs, sweep.configs, strict=True):
        if job in todo:
            check_parts(config)
    sweep.root.mkdir(parents=True, exist_ok=True)
    for job in todo if sweep.overwrite and not sweep.resume else ():
        empty(job.folder)
    record.write()
    kept = len(sweep.jobs) - len(todo)
    print(f"{sweep.root}: {len(todo)} jobs{f', {kept} finished before' if kept else ''}")
    if command in MEASURING and launcher.at_once != 1 and sweep.launcher["kind"] != "slurm":
        log.warning("Jobs at the same time disturb each other's timings on one machine.")
    interrupted = run_all(
        todo, launcher, sweep.root, ids=record.ids, started=record.start, ended=record.end
    )
    code = INTERRUPTED if interrupted else worst(row["exit_code"] for row in record.rows)
    record.write(code)
    print_table(record.rows)
    for row in record.rows:
        if row.get("error"):
            print(f"{row['name']}: {row['error']} (log: {row['log']})")
    print(f"{sweep.root / JOBS_FILE}")
    if interrupted:
        again = [x for x in overrides if x.partition("=")[0] not in ("overwrite", "resume")]
        line = shlex.join(["fbnas", command, "-m", *again, "resume=true"])
        print(f"fbnas: interrupted. Continue with: {line}", file=sys.stderr)
    return code


def worst(codes: Iterable[int | None]) -> int:
    """Return the worst exit code: failed, then wrong input, then a missed target, then done."""
    found = set(codes)
    if found - {DONE, WRONG_INPUT, MISSED}:
        return FAILED
    return next((code for code in (WRONG_INPUT, MISSED) if code in found), DONE)


class Record:
    """multirun.json: a row per job, written anew whenever a job starts or ends."""

    def __init__(self, sweep: Sweep, command_line: str) -> None:
        self.sweep = sweep
        self.file = sweep.root / JOBS_FILE
        self.command_line = command_line
        self.started = time.monotonic()
        self.began: dict[str, float] = {}
        before = read_json(self.file)["jobs"] if self.file.is_file() and sweep.resume else []
        self.before = {row["name"]: row for row in before}
        self.ids = {
            row["name"]: row["id"] for row in before if row.get("id") and row["exit_code"] is None
        }
        self.rows: list[dict[str, Any]] = [self._row(job) for job in sweep.jobs]
        self.row = {row["name"]: row for row in self.rows}

    def _row(self, job: Job) -> dict[str, Any]:
        return {
            "name": job.name,
            "overrides": list(job.swept),
            "command_line": shlex.join(["fbnas", job.command, *job.overrides]),
            "out": str(job.folder),
            "log": str(job.log),
            "exit_code": None,
        }

    def keep(self, job: Job) -> bool:
        """Return whether a job is finished and stays so; note what it came to."""
        if not (self.sweep.resume and job.finished):
            return False
        before = self.before.get(job.name, {})
        result = read_json(job.folder / "result.json")
        code = before.get("exit_code")
        self.row[job.name]["exit_code"] = _code_of(result) if code is None else code
        self.row[job.name] |= {"seconds": before.get("seconds"), "result": _fields(result)}
        return True

    def start(self, job: Job, id: str | None) -> None:
        """Note that a job was started, under an id where its launcher gives one."""
        self.began[job.name] = time.monotonic()
        if id is not None:
            self.row[job.name]["id"] = id
            self.write()

    def end(self, job: Job, code: int) -> None:
        """Note how a job ended."""
        row = self.row[job.name]
        row["exit_code"] = code
        if job.name in self.began:
            row["seconds"] = round(time.monotonic() - self.began[job.name], 3)
        if job.finished:
            row["result"] = _fields(read_json(job.folder / "result.json"))
        if code not in (DONE, MISSED, INTERRUPTED):
            row["error"] = (
                _last_line(job.log).removeprefix("fbnas: ") or f"exit code {code}, without a word"
            )
        done = sum(x["exit_code"] is not None for x in self.rows)
        print(f"[{done}/{len(self.rows)}] {job.name}: {_ending(code)}", flush=True)
        self.write()

    def write(self, code: int | None = None) -> None:
        """Write multirun.json."""
        seconds = round(time.monotonic() - self.started, 3)
        head = {"command": self.sweep.command, "version": __version__, "seconds": seconds}
        head |= {"command_line": self.command_line, "exit_code": code}
        write_json(self.file, {**head, "launcher": self.sweep.launcher, "jobs": self.rows})


def _fields(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in RESULTS if result.get(key) is not None}


def _code_of(result: Mapping[str, Any]) -> int:
    """Return the exit code of a finished job that nobody was there to note."""
    if all(result.get(key) is not None for key in ("latency_ms", "target_ms", "noise_floor")):
        from fbnas.commands.evaluate import is_missed

        latency_ms = result["latency_ms"]["value"]
        return MISSED if is_missed(latency_ms, result["target_ms"], result["noise_floor"]) else DONE
    return DONE


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def _ending(code: int | None) -> str:
    """Word an exit code."""
    words = {
        None: "not run",
        DONE: "done",
        FAILED: "failed",
        WRONG_INPUT: "wrong input",
        MISSED: "over budget",
        INTERRUPTED: "interrupted",
    }
    if code in words:
        return words[code]
    try:
        return f"ended by {signal.Signals((code or 0) - 128).name}"
    except ValueError:
        return f"exit code {code}"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a row per job: what was swept, how it ended, and what any of them has as a result."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = [key for key in RESULTS if any(key in row.get("result", {}) for row in rows)]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("job", overflow="fold")
    for name in ("exit", "", "s", *names):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for row in rows:
        code, result = row["exit_code"], row.get("result", {})
        table.add_row(
            " ".join(row["overrides"]),
            "-" if code is None else str(code),
            _ending(code),
            _number(row.get("seconds")),
            *(_number(result.get(name)) for name in names),
        )
    Console(width=None if Console().is_terminal else 140).print(table)


def _number(value: Any) -> str:
    value = value.get("value") if isinstance(value, dict) else value
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
