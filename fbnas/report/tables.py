"""A latency table as the report shows it: the CSV's header and rows, nothing looked up."""

import csv
from dataclasses import dataclass
from pathlib import Path

from fbnas.errors import InputError
from fbnas.report.shapes import Shape

COLUMNS = (
    "block",
    "in_channels",
    "out_channels",
    "stride",
    "height",
    "width",
    "latency_ms",
    "low_ms",
    "high_ms",
    "samples",
)
PSEUDO_BLOCKS = ("stem", "wavelet_stem", "head", "classifier", "overhead")


@dataclass(frozen=True)
class TableRow:
    """One block at one shape; `samples` is 0 where nothing was measured (an identity)."""

    block: str
    shape: Shape
    latency_ms: float
    low_ms: float
    high_ms: float
    samples: int


@dataclass(frozen=True)
class Table:
    """A latency table's header and rows; the rows hold uncorrected ms."""

    path: Path
    header: dict[str, str]
    rows: tuple[TableRow, ...]

    def find(self, block: str, shape: Shape) -> TableRow | None:
        """Return the row of a block at a shape, or None."""
        return next((r for r in self.rows if r.block == block and r.shape == shape), None)


def read_table(path: Path) -> Table:
    """Read a latency table.

    Raises:
        InputError: a line that is no row of a latency table; the line's number is named.
    """
    header: dict[str, str] = {}
    rows: list[TableRow] = []
    columns: tuple[str, ...] = ()
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; expected a latency table.") from None
    for number, line in enumerate(lines, start=1):
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            header[key.strip()] = value.strip()
        elif line.strip() and not columns:
            columns = tuple(next(csv.reader([line])))
            if set(COLUMNS) - set(columns):
                missing = ", ".join(c for c in COLUMNS if c not in columns)
                raise InputError(
                    f"{path}, line {number}: the columns {missing} are missing; expected "
                    f"{','.join(COLUMNS)}. Measure the table again: fbnas profile table={path}"
                )
        elif line.strip():
            rows.append(_row(columns, line, path, number))
    return Table(path, header, tuple(rows))


def _row(columns: tuple[str, ...], line: str, path: Path, number: int) -> TableRow:
    try:
        cells = dict(zip(columns, next(csv.reader([line])), strict=True))
        in_channels, out_channels, stride, height, width = (int(cells[c]) for c in COLUMNS[1:6])
        latency_ms, low_ms, high_ms = (float(cells[c]) for c in COLUMNS[6:9])
        shape = (in_channels, out_channels, stride, height, width)
        return TableRow(cells["block"], shape, latency_ms, low_ms, high_ms, int(cells["samples"]))
    except ValueError as error:
        raise InputError(
            f"{path}, line {number}: {error}; expected {','.join(COLUMNS)}. "
            f"Measure the table again: fbnas profile table={path}"
        ) from error
