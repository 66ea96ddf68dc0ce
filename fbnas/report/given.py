"""CSV files that a person brings to a report: other networks, and networks on other devices."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fbnas.errors import InputError
from fbnas.report.devices import Cell, Matrix

Read = TypeVar("Read")

BASELINE_COLUMNS = ("name", "latency_ms", "accuracy")
CROSS_COLUMNS = ("network", "device", "measured_ms")


@dataclass(frozen=True)
class Baseline:
    """A network of elsewhere: accuracy is 0 to 1, `architecture` may be empty."""

    name: str
    latency_ms: float
    accuracy: float
    architecture: str


@dataclass(frozen=True)
class Given:
    """What a person brings to the report beside runs."""

    baselines: tuple[Baseline, ...] = ()
    cross_device: Matrix | None = None


def read_given(baselines: Path | None, cross_device: Path | None) -> Given:
    """Read the files that were given; see `read_baselines` and `read_cross_device`."""
    return Given(
        () if baselines is None else read_baselines(baselines),
        None if cross_device is None else read_cross_device(cross_device),
    )


def read_baselines(path: Path) -> tuple[Baseline, ...]:
    """Read networks to compare with: columns name, latency_ms, accuracy (0 to 1), architecture.

    Raises:
        InputError: no such file, a column is missing (architecture may be), or a line is no row.
    """

    def read(row: dict[str, str]) -> Baseline:
        accuracy = float(row["accuracy"])
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy is {row['accuracy']}, not from 0 to 1")
        latency_ms = _time(row["latency_ms"])
        return Baseline(row["name"], latency_ms, accuracy, row.get("architecture") or "")

    return tuple(_rows(path, BASELINE_COLUMNS, "baselines", read))


def read_cross_device(path: Path) -> Matrix:
    """Read networks measured on several devices: columns network, device, measured_ms.

    A network that has a device's name is that device's own. Of a cell given twice the last counts.

    Raises:
        InputError: no such file, a column is missing, or a line is no row.
    """
    rows = _rows(
        path,
        CROSS_COLUMNS,
        "cross_device",
        lambda row: (row["network"], row["device"], _time(row["measured_ms"])),
    )
    networks = tuple(dict.fromkeys(network for network, *_ in rows))
    devices = tuple(dict.fromkeys(device for _, device, _ in rows))
    measured = {(network, device): ms for network, device, ms in rows}
    cells = {
        (networks.index(n), devices.index(d)): Cell(ms, measured.get((d, d)))
        for (n, d), ms in measured.items()
    }
    return Matrix("measured", networks, devices, cells, f"From {path.name}.")


def _rows(
    path: Path, columns: Sequence[str], option: str, read: Callable[[dict[str, str]], Read]
) -> list[Read]:
    expected = f"expected a CSV file with the columns {', '.join(columns)}"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{option}={path} cannot be read; {expected}.") from None
    reader = csv.DictReader(lines)
    missing = [c for c in columns if c not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{path}: the columns {', '.join(missing)} are missing; {expected}.")
    found = []
    for row in reader:
        try:
            found.append(read(row))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}, line {reader.line_num}: {error}; {expected}. Mend the line."
            ) from None
    if not found:
        raise InputError(f"{path}: holds no rows; {expected}.")
    return found


def _time(text: str) -> float:
    ms = float(text)
    if not 0 < ms < float("inf"):
        raise ValueError(f"a latency of {text} ms")
    return ms
