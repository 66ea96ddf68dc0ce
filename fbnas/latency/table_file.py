"""The file of a latency table: `# key: value` lines, then CSV rows; damage is named by line."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fbnas.errors import InputError

FORMAT = "1"
PROFILE_AGAIN = "measure it again with fbnas profile"


class Shape(NamedTuple):
    """What a row is about; `height` and `width` are those of the block's input in pixels."""

    block: str
    in_channels: int
    out_channels: int
    stride: int
    height: int
    width: int

    def __str__(self) -> str:
        ends = f"{self.in_channels} -> {self.out_channels}"
        return f"{self.block} ({ends}, stride {self.stride}, {self.height}x{self.width})"


@dataclass(frozen=True)
class Entry:
    """One row: a shape's latency and the interval that encloses it, in ms; energy, peak memory.

    `samples` 0 says that there was nothing to measure: an identity. `energy_mj` is that of one run
    in millijoules, `peak_mb` the most memory that it holds at once in MB (1e6 bytes),
    `corrected_ms` what the row adds to a whole network by calibration; None where the table does
    not know.
    """

    shape: Shape
    latency_ms: float
    low_ms: float
    high_ms: float
    samples: int
    energy_mj: float | None = None
    peak_mb: float | None = None
    corrected_ms: float | None = None


MEASURED = ("latency_ms", "low_ms", "high_ms", "samples")
COLUMNS = (*Shape._fields, *MEASURED)
OPTIONAL = ("energy_mj", "peak_mb", "corrected_ms")  # after the others, in this order; any of them


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= 1


def _is_fraction(text: str) -> bool:
    return _number(text) is not None and float(text) >= 0


def _is_scale(text: str) -> bool:
    return _number(text) is not None and float(text) > 0


HEADER_CHECKS: dict[
    str, tuple[Callable[[str], bool], str, bool]
] = {  # check, expectation, required
    "device": (bool, "a name", True),
    "runtime": (bool, "a name", True),
    "precision": (bool, "fp32 or int8", True),
    "threads": (_is_count, "a whole number from 1", True),
    "batch": (_is_count, "a whole number from 1", True),
    "noise_floor": (_is_fraction, "a fraction from 0", True),
    "correction_scale": (_is_scale, "a number above 0", False),
    "correction_base_ms": (lambda text: _number(text) is not None, "a number of ms", False),
    "calibration_error": (_is_fraction, "a fraction from 0", False),
    "calibration_spearman": (lambda text: _number(text) is not None, "a number to 1", False),
    "calibration_noise_floor": (_is_fraction, "a fraction from 0", False),
}


def check_header(
    header: Mapping[str, str], name: str, lines: Mapping[str, int] | None = None
) -> None:
    for key, (check, expected, required) in HEADER_CHECKS.items():
        if key in header and not check(header[key]):
            line = f", line {lines[key]}" if lines else ""
            raise InputError(
                f"{name}{line}: header {key} is {header[key]!r}; expected {expected}; "
                f"mend the line or {PROFILE_AGAIN}"
            )
        if required and key not in header:
            line = ", line 1" if lines is not None else ""
            raise InputError(
                f"{name}{line}: the header has no `# {key}: ...` line; expected {expected}; "
                f"add the line or {PROFILE_AGAIN}"
            )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def render(header: Mapping[str, str], entries: Iterable[Entry]) -> str:
    """Return the text that `parse` reads back; an optional column only where a row has it."""
    held = list(entries)
    known = [name for name in OPTIONAL if any(getattr(e, name) is not None for e in held)]
    columns = (*COLUMNS, *known)
    rows = [(*e.shape, *(getattr(e, name) for name in (*MEASURED, *known))) for e in held]
    kept = {key: value for key, value in header.items() if key not in ("format", "rows")}
    lines = []
    for key, value in {"format": FORMAT, **kept, "rows": str(len(rows))}.items():
        if "\n" in value or "\r" in value or ":" in key:
            raise ValueError(f"header {key!r}: {value!r} does not fit on one `# key: value` line")
        lines.append(f"# {key}: {value}")
    lines.append(",".join(columns))
    lines += [",".join("" if value is None else str(value) for value in row) for row in rows]
    return "\n".join(lines) + "\n"


def read_text(path: Path) -> str:
    """Return the text of a table's file.

    Raises:
        InputError: no such file, or no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such latency table; write it with fbnas profile table={path}"
        ) from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        what = "a folder" if path.is_dir() else f"not text ({error})"
        raise InputError(f"{path} is {what}; expected a latency table of fbnas profile") from None


def parse(path: Path, text: str) -> tuple[dict[str, str], list[Entry]]:
    """Return header and rows.

    Raises:
        InputError: the first damage that a reader would find, with its line.
    """
    lines = text.splitlines()
    header, header_lines = _parse_header(path, lines)
    start = len(header_lines)
    columns = _parse_columns(path, start + 1, lines[start] if start < len(lines) else None)
    entries: list[Entry] = []
    seen: dict[Shape, int] = {}
    for number, line in enumerate(lines[start + 1 :], start=start + 2):
        if number == len(lines) and not text.endswith("\n"):
            _damaged(path, number, f"the file is cut off at {line!r}", "a whole last line")
        entry = _parse_row(path, number, line, columns)
        if entry.shape in seen:
            _damaged(
                path,
                number,
                f"{entry.shape} stands in line {seen[entry.shape]} too",
                "one row each",
            )
        seen[entry.shape] = number
        entries.append(entry)
    if header["rows"] != str(len(entries)):
        stated = f"the header says rows: {header['rows']}, the file holds {len(entries)}"
        _damaged(
            path,
            header_lines["rows"],
            stated,
            "as many as were measured (was it cut off or edited?)",
        )
    return header, entries


def _parse_header(path: Path, lines: list[str]) -> tuple[dict[str, str], dict[str, int]]:
    header: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.startswith("#"):
            break
        key, colon, value = (part.strip() for part in line[1:].partition(":"))
        if not colon or not key:
            _damaged(path, number, f"found {line!r}", "`# key: value`")
        if key in header:
            _damaged(path, number, f"header {key} stands in line {numbers[key]} too", "it once")
        header[key], numbers[key] = value, number
    if "format" not in header:
        _damaged(path, 1, "found no `# format: ...` line", f"`# format: {FORMAT}`")
    if header["format"] != FORMAT:
        raise InputError(
            f"{path}, line {numbers['format']}: table format {header['format']!r}; expected format "
            f"{FORMAT}; {PROFILE_AGAIN}, or install the fbnas that wrote it"
        )
    if "rows" not in header or not header["rows"].isdigit():
        _damaged(
            path,
            numbers.get("rows", 1),
            f"header rows is {header.get('rows')!r}",
            "the number of rows",
        )
    check_header(header, str(path), numbers)
    return header, numbers


def _parse_columns(path: Path, number: int, line: str | None) -> tuple[str, ...]:
    columns = tuple(line.split(",")) if line is not None else ()
    if columns != (*COLUMNS, *(name for name in OPTIONAL if name in columns)):
        found = "the end of the file" if line is None else repr(line)
        expected = f"the columns {','.join(COLUMNS)}, then any of {','.join(OPTIONAL)}"
        _damaged(path, number, f"found {found}", expected)
    return columns


def _parse_row(path: Path, number: int, line: str, columns: tuple[str, ...]) -> Entry:
    values = next(csv.reader([line]), [])
    if len(values) != len(columns):
        _damaged(path, number, f"found {len(values)} fields in {line!r}", f"{len(columns)} fields")
    row: dict[str, Any] = dict(zip(columns, values, strict=True))
    for column, text in row.items():
        good, expected = _judged(column, text)
        if not good:
            _damaged(path, number, f"{column} is {text!r}", expected)
        if column in OPTIONAL:
            row[column] = float(text) if text else None
        elif column != "block":
            row[column] = (float if column.endswith("_ms") else int)(text)
    measured = {column: row.pop(column) for column in columns[len(Shape._fields) :]}
    entry = Entry(Shape(**row), **measured)
    if not entry.low_ms <= entry.latency_ms <= entry.high_ms:
        between = f"a value from low_ms ({entry.low_ms}) to high_ms ({entry.high_ms})"
        _damaged(path, number, f"latency_ms is {entry.latency_ms}", between)
    return entry


def _judged(column: str, text: str) -> tuple[bool, str]:
    """Say whether a field is good, and what its column takes."""
    if column == "block":
        return bool(text.strip()), "a block's name"
    if column in OPTIONAL:
        unit = {"mj": "mJ", "mb": "MB", "ms": "ms"}[column[-2:]]
        return not text or _is_fraction(text), f"a number of {unit}, not negative, or nothing"
    if column.endswith("_ms"):
        return _is_fraction(text), "a number of ms, not negative"
    if column == "samples":
        return text.isascii() and text.isdigit(), "a whole number from 0"
    return _is_count(text), "a whole number from 1"


def _damaged(path: Path, line: int, found: str, expected: str) -> NoReturn:
    raise InputError(
        f"{path}, line {line}: {found}; expected {expected}; mend the line or {PROFILE_AGAIN}"
    )
