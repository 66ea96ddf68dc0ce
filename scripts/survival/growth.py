"""Does a long search grow? Memory and bytes written per epoch, over 200 short epochs.

    python scripts/survival/growth.py OUT [--epochs 200] [--fitted 150]

A search of digits (160 images, two targets, checkpoints in mid-epoch too) in one process. After
each epoch: resident memory, and the bytes of every file of the run folder. A straight line is
fitted to the last epochs: memory and checkpoint.pt shall be flat, and of the logs, which hold a row
per epoch, what an epoch adds. Writes result_growth.md; exit code 1 where something grows. Linux.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kills import machine, stand

from fbnas import __version__
from fbnas.latency.table import LatencyTable
from fbnas.search import SearchSettings, Target, search
from fbnas.space import SearchSpace
from fbnas.training.data import load_data

# What an epoch may add: 20 KB keep a week of one-minute epochs below 0.2 GB. A digit more or less
# in a row of the logs moves what an epoch adds by a few bytes, in no direction.
MOST_MEMORY_KB = 20.0
MOST_BYTES = 1.0


@dataclass(frozen=True)
class Line:
    """A straight line through values per epoch: what an epoch adds, and its standard error."""

    first: float
    last: float
    slope: float
    error: float

    def grows(self, most: float) -> bool:
        """Whether the slope is above `most`, and by more than chance (two standard errors)."""
        return self.slope - 2 * self.error > most


def line(values: list[float]) -> Line:
    """Fit by least squares; `first` and `last` are means of ten values, a spike is no trend."""
    epochs = np.arange(len(values), dtype=float)
    slope, start = np.polyfit(epochs, values, 1)
    rest = np.asarray(values) - (start + slope * epochs)
    spread = ((epochs - epochs.mean()) ** 2).sum()
    error = float(np.sqrt((rest**2).sum() / (len(values) - 2) / spread))
    return Line(float(np.mean(values[:10])), float(np.mean(values[-10:])), float(slope), error)


def resident_kb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e3


def sizes(out: Path) -> dict[str, int]:
    """Bytes of each file; those of TensorBoard's folder together."""
    found: dict[str, int] = {}
    for file in out.rglob("*"):
        if file.is_file():
            name = file.relative_to(out).parts[0]
            found[name] = found.get(name, 0) + file.stat().st_size
    return found


def watch(folder: Path, epochs: int) -> tuple[list[float], list[dict[str, int]]]:
    """Search; return resident memory (KB) and the files' bytes after each epoch."""
    space_file, table_file = stand(folder)
    space, table = SearchSpace.load(space_file), LatencyTable.load(table_file)
    costs, base_ms = table.tensor(space, classes=10)
    offered = costs.nan_to_num(0.0)
    budgets = [base_ms + share * float(offered.max(1).values.sum()) for share in (0.5, 0.7)]
    memory, files = [], []

    def note(row: dict[str, Any]) -> None:
        memory.append(resident_kb())
        files.append(sizes(folder / "run"))

    search(
        space,
        load_data(limit=160),
        [Target(table, budget, f"{budget:.3f} ms") for budget in budgets],
        settings=SearchSettings(
            epochs=epochs,
            warmup_epochs=epochs // 10,  # the fitted epochs are all of one kind
            batch_size=32,
            augment={"crop_padding": 1},
            device="cpu",
            checkpoint_every_s=0.0,
        ),
        out=folder / "run",
        on_epoch=note,
    )
    return memory, files


def page(memory: list[float], files: list[dict[str, int]], fitted: int) -> tuple[str, bool]:
    """Return the result, and whether anything grows."""
    held = line(memory[-fitted:])
    grows = held.grows(MOST_MEMORY_KB)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()}, {machine()}, "
        f"python {platform.python_version()}, torch {torch.__version__}, fbnas {__version__}; "
        f"{len(memory)} epochs, lines fitted to the last {fitted}.",
        "",
        "| what | first 10 of them | last 10 | slope per epoch (standard error) | flat |",
        "|---|---|---|---|---|",
        f"| resident memory (MB) | {held.first / 1e3:.2f} | {held.last / 1e3:.2f} | "
        f"{held.slope:+.2f} KB ({held.error:.2f}) | {'NO' if grows else 'yes'} |",
    ]
    for name in sorted(files[-1]):
        bytes_held = [float(found.get(name, 0)) for found in files]
        kept = name in ("checkpoint.pt", "space.yaml", "theta.json", "supernet.safetensors")
        values = bytes_held[-fitted:] if kept else np.diff(bytes_held)[-fitted:].tolist()
        found = line(values)
        wrong = found.grows(MOST_BYTES)
        grows |= wrong
        what = f"{name} ({'bytes' if kept else 'bytes that an epoch adds'})"
        lines.append(
            f"| {what} | {found.first:.0f} | {found.last:.0f} | {found.slope:+.3f} "
            f"({found.error:.3f}) | {'NO' if wrong else 'yes'} |"
        )
    return "\n".join(lines) + "\n", grows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--fitted", type=int, default=150, help="of the last epochs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        memory, files = watch(Path(folder), arguments.epochs)
    report, grows = page(memory, files, arguments.fitted)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result_growth.md").write_text(report)
    print(report)
    return int(grows)


if __name__ == "__main__":
    sys.exit(main())
