"""Does a search that is killed again and again end at the numbers of one that is left alone?

    python scripts/survival/kills.py OUT [--kills 20] [--modes one,two] [--epochs 30] [--seed 0]

The command `fbnas search` itself, on digits on the CPU. Per mode (`one` process; `two`, by
`fabric.devices=2`) it runs once undisturbed, then SIGKILL strikes at a random moment of the
duration that is left, and it is resumed; after four kills it runs to its end, is compared, and is
begun anew in an empty folder, until so many kills have struck. In mode `two` every second kill
strikes one process alone, chosen at random: the other must end by itself. Compared: theta.json,
supernet.safetensors and the architectures of `fbnas sample` byte by byte, result.json's choice,
metrics.jsonl but its seconds. Writes result_one.md and result_two.md; exit code 1 if anything
differs or a process is left. Linux: it reads /proc.
"""

import argparse
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from fbnas import __version__
from fbnas.files import load_checkpoint, read_json, read_jsonl

FBNAS = [sys.executable, "-m", "fbnas.commands"]
DEVICES = {"one": 1, "two": 2}
MOST_PER_RUN = 4  # kills: or all later ones would strike the start-up of a run that is nearly done
PATIENCE_S = 60.0  # for what one killed process leaves running to end by itself
SPACE = {
    "name": "tiny",
    "resolution": 8,
    "input_channels": 1,
    "stem": {"channels": 8, "stride": 1},
    "stages": [
        {"channels": 8, "layers": 1, "stride": 1},
        {"channels": 16, "layers": 2, "stride": 2},
    ],
    "head": 32,
    "blocks": ["k3_e1", "k3_e3", "k5_e1", "skip"],
}


@dataclass
class Kill:
    """One strike: when, in seconds of its process, at what, and how far the checkpoint was."""

    run: int
    moment_s: float
    struck: str
    reached: str
    rest_ended_s: float | None
    """Until nothing was left; None where something was left after `PATIENCE_S`."""
    equal: bool | None = None
    """Of the run that it struck, known when that ends."""


@dataclass
class Study:
    """A mode: its search, how long it takes undisturbed, and the kills so far."""

    folder: Path
    table: Path
    space: Path
    devices: int
    epochs: int
    whole_s: float = 0.0
    start_s: float = 0.0
    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        """Search in a process group of its own; resume where there is something to resume."""
        resume = (out / "config.yaml").is_file()
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [
                    *FBNAS,
                    "search",
                    f"space={self.space}",
                    f"table={self.table}",
                    "data=digits",
                    f"search.epochs={self.epochs}",
                    "search.batch_size=32",
                    "search.augment.crop_padding=1",
                    "search.device=cpu",
                    "search.checkpoint_every_s=0.1",
                    f"fabric.devices={self.devices}",
                    f"out={out}",
                    f"resume={str(resume).lower()}",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def left_s(self, out: Path) -> float:
        """How long a search in `out` will take: its start, and the steps that are not done."""
        done = position(out)[0] / self.epochs if (out / "checkpoint.pt").is_file() else 0.0
        return self.start_s + (self.whole_s - self.start_s) * (1 - done)


def position(out: Path) -> list[Any]:
    return load_checkpoint(out / "checkpoint.pt")["position"]


def reached(out: Path) -> str:
    """Where the checkpoint is, counted from 1."""
    if not (out / "checkpoint.pt").is_file():
        return "no checkpoint" if (out / "config.yaml").is_file() else "no folder"
    epoch, phase, step = position(out)
    if (out / "theta.json").is_file():
        return "result being written"
    return f"epoch {epoch + 1}, {phase}, step {step}"


def group(leader: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(pgrp) == leader and state not in "ZX":
            found.append(int(folder.name))
    return sorted(found)


def strike(process: subprocess.Popen[bytes], *, alone: bool, chance: random.Random) -> str:
    """Kill the whole group, or one process of it chosen at random."""
    members = group(process.pid)
    if not alone:
        os.killpg(process.pid, signal.SIGKILL)
        return "all" if len(members) > 1 else "the only process"
    victim = chance.choice(members)
    os.kill(victim, signal.SIGKILL)
    if len(members) == 1:
        return "the only process so far"
    return "the first" if victim == process.pid else "another"


def rest_ends(process: subprocess.Popen[bytes]) -> float | None:
    """Seconds until nothing is left of a group; what is left too long is killed: None."""
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE_S:
        process.poll()  # or it would stay a zombie
        if not group(process.pid):
            process.wait()
            return time.monotonic() - started
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def sample(out: Path) -> dict[str, bytes]:
    """The architectures that `fbnas sample` finds, once."""
    if not (out / "architectures").is_dir():
        subprocess.run([*FBNAS, "sample", f"run={out}", "count=5"], check=True, capture_output=True)
    return {file.name: file.read_bytes() for file in sorted((out / "architectures").iterdir())}


def differing(out: Path, whole: Path) -> list[str]:
    """Names of what differs between two finished searches."""
    found = [
        name
        for name in ("theta.json", "supernet.safetensors", "space.yaml")
        if (out / name).read_bytes() != (whole / name).read_bytes()
    ]
    results = [read_json(folder / "result.json") for folder in (out, whole)]
    if any(results[0][key] != results[1][key] for key in ("architecture", "targets")):
        found.append("result.json")
    rows = [
        [{**row, "seconds": 0} for row in read_jsonl(folder / "metrics.jsonl")]
        for folder in (out, whole)
    ]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    if sample(out) != sample(whole):
        found.append("architectures of fbnas sample")
    stray = [file.name for file in out.rglob(".*")]
    return found + [f"left behind: {name}" for name in stray]


def undisturbed(study: Study) -> None:
    started = time.monotonic()
    process = study.start(study.whole)
    if process.wait() != 0:
        sys.exit(f"The undisturbed search failed: see {study.folder / 'log.txt'}.")
    study.whole_s = time.monotonic() - started
    stepping = sum(row["seconds"] for row in read_jsonl(study.whole / "metrics.jsonl"))
    study.start_s = study.whole_s - stepping
    print(f"undisturbed: {study.whole_s:.1f} s, {study.start_s:.1f} s of them to start and end")


def run_struck(study: Study, number: int, *, kills: int, chance: random.Random) -> None:
    """One search from an empty folder to its end, struck on the way; compare it."""
    out = study.folder / f"run_{number}"
    shutil.rmtree(out, ignore_errors=True)
    while True:
        process = study.start(out)
        struck_here = sum(kill.run == number for kill in study.kills)
        if struck_here == MOST_PER_RUN or len(study.kills) >= kills:
            code: int | None = process.wait()
        else:
            moment = chance.uniform(0, study.left_s(out))
            try:
                code = process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                code = None
        if code is not None:
            break
        alone = study.devices > 1 and len(study.kills) % 2 == 0
        struck = strike(process, alone=alone, chance=chance)
        ended = rest_ends(process)
        study.kills.append(Kill(number, moment, struck, reached(out), ended))
        print(f"kill {len(study.kills)}: {study.kills[-1]}", flush=True)
    found = [f"exit code {code}"] if code != 0 else differing(out, study.whole)
    for kill in study.kills:
        if kill.run == number:
            kill.equal = not found
    study.differences += [f"run {number}: {name}" for name in found]
    print(f"run {number}: {', '.join(found) or 'equal'}", flush=True)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def page(study: Study, arguments: argparse.Namespace) -> str:
    never = sum(kill.rest_ended_s is None for kill in study.kills)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores of {machine()}, python {platform.python_version()}, torch "
        f"{torch.__version__}, fbnas {__version__}.",
        "",
        f"{study.devices} process(es) of 1 thread, {study.epochs} epochs of digits, seed "
        f"{arguments.seed}: {len(study.kills)} kills in {study.kills[-1].run} runs; undisturbed "
        f"{study.whole_s:.0f} s. Differences from the undisturbed run: "
        f"{'; '.join(study.differences) or 'none'}. Kills after which a process stayed for more "
        f"than {PATIENCE_S:.0f} s: {never}.",
        "",
        "| kill | run | at (s) | struck | checkpoint at | rest ended after (s) | equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, kill in enumerate(study.kills, start=1):
        ended = "never" if kill.rest_ended_s is None else f"{kill.rest_ended_s:.1f}"
        lines.append(
            f"| {number} | {kill.run} | {kill.moment_s:.1f} | {kill.struck} | {kill.reached} | "
            f"{ended} | {'yes' if kill.equal else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def stand(folder: Path) -> tuple[Path, Path]:
    """Write a small space and its table by formula."""
    space, table = folder / "tiny.yaml", folder / "table.csv"
    space.write_text(yaml.safe_dump(SPACE))
    profile = [f"space={space}", f"table={table}", "classes=10", "device=roofline"]
    subprocess.run([*FBNAS, "profile", *profile], check=True, capture_output=True)
    return space, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=20, help="of each mode")
    parser.add_argument("--modes", default="one,two")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="a folder for the runs; deleted without it")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wrong = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        space, table = stand(folder)
        for mode in arguments.modes.split(","):
            (folder / mode).mkdir()
            study = Study(folder / mode, table, space, DEVICES[mode], arguments.epochs)
            undisturbed(study)
            chance, number = random.Random(f"{arguments.seed} {mode}"), 0
            while len(study.kills) < arguments.kills:
                number += 1
                run_struck(study, number, kills=arguments.kills, chance=chance)
            report = page(study, arguments)
            (arguments.out / f"result_{mode}.md").write_text(report)
            print(report, flush=True)
            wrong |= bool(study.differences)
            wrong |= any(kill.rest_ended_s is None for kill in study.kills)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
