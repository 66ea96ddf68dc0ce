"""A file of measured whole networks: a CSV with a column `blocks` and a column of milliseconds.

`blocks` holds a network's block names, separated by spaces, one per layer. Every other column is
some device's latency, of which one is read; .csv and .csv.gz. Damage is named by line.
"""

import csv
import gzip
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from fbnas.errors import InputError, closest
from fbnas.space import Architecture, SearchSpace

BLOCKS = "blocks"
SAME = 0.2  # two measurements of one network that differ by more do not belong together


@dataclass(frozen=True)
class Measurements:
    """Distinct networks and their totals: paths (networks, layers), latency_ms (networks,)."""

    path: Path
    column: str
    paths: np.ndarray
    latency_ms: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


def read_measurements(path: Path | str, space: SearchSpace, column: str) -> Measurements:
    """Read the totals of a device; a network that was measured several times counts by its mean.

    Raises:
        InputError: no such file or column, unknown blocks, a wrong number of them, a latency that
            is missing, not a number or not positive, or two of one network that differ by more
            than 20 %; file and line are named.
    """
    path = Path(path)
    found: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for line, row in _rows(path, (BLOCKS, column)):
        network = _network(path, line, row[BLOCKS], space)
        latency_ms = _milliseconds(path, line, row[column], column)
        for earlier, other_ms in found.setdefault(network, []):
            if abs(latency_ms - other_ms) > SAME * min(latency_ms, other_ms):
                _damaged(
                    path,
                    line,
                    f"the network of line {earlier} again, with {latency_ms:g} ms instead of "
                    f"{other_ms:g} ms",
                    f"measurements of one network to agree within {100 * SAME:.0f} %: measure it "
                    "again, or keep the right line",
                )
        found[network].append((line, latency_ms))
    totals = [float(np.mean([ms for _, ms in times])) for times in found.values()]
    paths = np.array(list(found), dtype=int).reshape(-1, len(space.layers))
    return Measurements(path, column, paths, np.array(totals))


def read_networks(path: Path | str, space: SearchSpace) -> np.ndarray:
    """Read the networks of a file, whatever else it holds: (networks, layers) block indices.

    Raises:
        InputError: as `read_measurements`, but for latencies.
    """
    path = Path(path)
    rows = _rows(path, (BLOCKS,))
    networks = [_network(path, line, row[BLOCKS], space) for line, row in rows]
    if not networks:
        raise InputError(f"{path} holds no networks; expected a line with `blocks` for each")
    return np.array(list(dict.fromkeys(networks)), dtype=int)


def write_networks(path: Path | str, space: SearchSpace, paths: np.ndarray, column: str) -> None:
    """Write networks with an empty column of latencies, to be filled in."""
    from fbnas.files import atomic_write

    lines = [f"{BLOCKS},{column}"]
    lines += [" ".join(space.blocks[i] for i in network) + "," for network in paths]
    atomic_write(path, "\n".join(lines) + "\n")


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and row as a mapping; the header must hold `columns`."""
    try:
        open_ = gzip.open if path.suffix == ".gz" else open
        with open_(path, "rt", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            for column in columns:
                if column not in names:
                    guess = closest(column, names)
                    hint = f"; did you mean {guess}? (column={guess})" if guess else ""
                    listed = ", ".join(names) or "nothing"
                    _damaged(path, 1, f"the columns are {listed}", f"{column} among them{hint}")
            for row in reader:
                if row[columns[0]] is None or None in row or None in row.values():
                    _damaged(path, reader.line_num, "another number of fields", f"{len(names)}")
                yield reader.line_num, row
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; expected a CSV with the columns {' and '.join(columns)}"
        ) from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read ({error}); expected a CSV, plain or .gz, with the columns "
            f"{' and '.join(columns)}"
        ) from error


def _network(path: Path, line: int, text: str, space: SearchSpace) -> tuple[int, ...]:
    try:
        return tuple(Architecture(tuple(text.split()), space.name).path(space))
    except InputError as error:
        raise InputError(f"{path}, line {line}: {error}") from None


def _milliseconds(path: Path, line: int, text: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        what = f"{column} is {text!r}" if text.strip() else f"{column} is missing"
        _damaged(path, line, what, "a positive number of ms: measure it, or take the line out")
    return value


def _damaged(path: Path, line: int, found: str, expected: str) -> NoReturn:
    raise InputError(f"{path}, line {line}: {found}; expected {expected}")
