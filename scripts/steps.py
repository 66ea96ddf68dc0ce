"""Steps that several studies share; a study's script adds this folder to its path.

A table measured and mended by whole networks, files of networks, a search that is done once, rows
that survive an interrupt, and what a page must say of the machine.
"""

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

import fbnas
from fbnas.commands.calibrate import describe, write_networks
from fbnas.commands.parts import card_for
from fbnas.export import export_file
from fbnas.latency import Device, LatencyTable, calibration, profile
from fbnas.latency.profiling import enliven_, one_torch_thread
from fbnas.search import Learned, SearchSettings, Target, latency_range, search
from fbnas.search.logbook import read_result
from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import Data

ROOT = Path(__file__).parents[1]
Study = TypeVar("Study")


def calibrated_table(
    path: Path, space: SearchSpace, device: Device, *, classes: int, networks: int, held_out: int
) -> LatencyTable:
    """Profile `device` and hold the table against whole networks, unless `path` has it all."""
    table = profile(space, device, path, classes=classes)
    if "calibration" in table.header:
        return table
    found = calibration.calibrate(
        table,
        space,
        device,
        classes=classes,
        networks=networks,
        held_out=held_out,
        work=path.with_name(f"{path.name}.partial-networks"),
    )
    print(f"{path.name}: {describe(found)}", flush=True)
    if found.helps:
        table = calibration.apply(table, found, space, classes=classes)
    else:
        table = calibration.judged(table, found, space)
    write_networks(path, found)
    table.save(path)
    return table


def target_at(table: LatencyTable, space: SearchSpace, classes: int, fraction: float) -> Target:
    """A budget `fraction` of the way from the fastest to the slowest network of the table."""
    fastest_ms, slowest_ms = latency_range(*table.tensor(space, classes=classes))
    return Target(table, fastest_ms + fraction * (slowest_ms - fastest_ms), table.name)


def searched(
    folder: Path,
    space: SearchSpace,
    data: Data,
    targets: Sequence[Target],
    *,
    settings: SearchSettings,
    seed: int,
) -> list[Learned]:
    """Search into `folder`, go on there after an interrupt, or read what was learned before."""
    if not (folder / "theta.json").is_file():
        search(space, data, targets, settings=settings, seed=seed, out=folder, resume=True)
    return read_result(folder)[1]


def exported(
    architectures: Sequence[Architecture],
    space: SearchSpace,
    device: Device,
    folder: Path,
    data: Data,
) -> list[Path]:
    """Write each untrained network as `fbnas export` does, once: latency knows no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for architecture in architectures:
        path = folder / ("-".join(map(str, architecture.path(space))) + device.suffix)
        if not path.exists():
            torch.manual_seed(0)
            network = enliven_(build_network(space, architecture, data.classes))
            partial = folder / f"partial{device.suffix}"  # a kill leaves no half a file
            with one_torch_thread():
                export_file(network, partial, device, card=card_for(space, architecture, data))
            partial.replace(path)
        files.append(path)
    return files


def rows_of(path: Path) -> pd.DataFrame:
    """Rows that were written before, perhaps none."""
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def is_known(rows: pd.DataFrame, **keys: object) -> bool:
    """Whether a row has all these values."""
    if rows.empty:
        return False
    same = pd.Series(True, index=rows.index)
    for name, value in keys.items():
        same &= rows[name] == value
    return bool(same.any())


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows in one write each, so that several processes may share a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    try:
        with path.open("x") as file:
            file.write(",".join(frame.columns) + "\n")
    except FileExistsError:
        pass
    with path.open("a") as file:
        file.write(frame.to_csv(header=False, index=False, float_format="%.6g"))


def steps_asked(parser: argparse.ArgumentParser, given: str, actions: Collection[str]) -> list[str]:
    """Read --steps; an unknown one ends the script with a line that names all."""
    steps = given.split(",")
    for step in steps:
        if step not in actions:
            parser.error(f"--steps {step}; expected of {', '.join(actions)}")
    return steps


def take(
    steps: Sequence[str], actions: Mapping[str, Callable[[Study], None]], study: Study
) -> None:
    """Take the steps in turn, and print how long each took."""
    for step in steps:
        started = time.monotonic()
        actions[step](study)
        print(f"{step}: {time.monotonic() - started:.0f} s", flush=True)


def part_of(work: Sequence[Any], part: str) -> list[Any]:
    """Every n-th piece from the i-th on, of "i/n"."""
    index, parts = map(int, part.split("/"))
    return list(work[index::parts])


def circumstances(*devices: Device) -> str:
    """The machine, the versions, the commit and the command, as a page states them."""
    facts = [device.fingerprint() for device in devices]
    runtimes = ", ".join(
        f"{f['runtime']} {f['runtime_version']} {f['precision']} on {f['threads']} thread(s)"
        for f in facts
    )
    first = facts[0]
    command = shlex.join(["python", *sys.argv])
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {first['cpu']} ({first['cores']} cores, "
        f"{first['os']}), load {os.getloadavg()[0]:.1f} when this page was written; python "
        f"{platform.python_version()}, torch {torch.__version__}, {runtimes}; fbnas "
        f"{fbnas.__version__}, commit {commit()}.\n\n    {command}\n"
    )


def commit() -> str:
    """The commit of this checkout, marked where files of it were changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table_words(table: LatencyTable) -> str:
    """What a table's own header says of its quality."""
    return (
        f"{table.name}: {table.header['date']}, noise floor {100 * table.noise_floor:.1f} %, "
        f"quiet: {table.quiet}; {table.header.get('calibration', 'not calibrated')}"
    )


def spread(values: pd.Series) -> str:
    """`mean ± standard deviation (n)` of fractions, in %; of one value there is no deviation."""
    deviation = f" ± {100 * values.std():.2f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.2f}{deviation} ({len(values)})"
