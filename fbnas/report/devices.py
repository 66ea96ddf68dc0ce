"""The cross-device matrix: networks that were made for one device, on every device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fbnas.report.figures import Figure, base_layout
from fbnas.report.markup import details, number, table
from fbnas.report.run import Run
from fbnas.report.words import DASH, THIN, ms, signed

DIVERGING = [[0, "var(--cool)"], [0.5, "var(--even)"], [1, "var(--warm)"]]
NARROW = 12  # characters that fit beside the matrix in a line
FULL_COLOUR = 40.0  # percent slower or faster than the device's own network


@dataclass(frozen=True)
class Cell:
    """A network's latency on a device, and that of the device's own network, in ms."""

    latency_ms: float
    own_ms: float | None

    @property
    def off(self) -> float | None:
        """Percent slower than the device's own network."""
        return None if self.own_ms is None else 100 * (self.latency_ms / self.own_ms - 1)


@dataclass(frozen=True)
class Matrix:
    """Networks (rows) by devices (columns); `how` is predicted or measured."""

    how: str
    networks: tuple[str, ...]
    devices: tuple[str, ...]
    cells: Mapping[tuple[int, int], Cell]
    source: str

    @property
    def tells(self) -> bool:
        """Whether some network was seen on more than one device."""
        return len({network for network, _ in self.cells}) < len(self.cells)


def predicted_matrix(run: Run) -> Matrix | None:
    """What the tables say of each target's network, where a search had several tables."""
    search, targets = run.search, run.result.get("targets") or []
    if search is None or len(targets) != len(search.targets):
        return None
    names = [target.table for target in search.targets]
    first = search.first_of_table  # a target with the device's costs
    devices = tuple(first)
    sides = {target.get("resolution") for target in targets}
    if len(devices) < 2 or len(sides) > 1:  # what a table says holds for one resolution
        return None
    nth = [names[:i].count(name) for i, name in enumerate(names)]  # among those of its table
    ms_of = {
        (i, j): search.predicted_ms(target["architecture"], first[device])
        for i, target in enumerate(targets)
        for j, device in enumerate(devices)
    }
    own = {(names[i], n): i for i, n in enumerate(nth)}
    cells = {}
    for (i, j), latency_ms in ms_of.items():
        mine = own.get((devices[j], nth[i]))
        cells[i, j] = Cell(latency_ms, None if mine is None else ms_of[mine, j])
    networks = tuple(f"{_short(t.table)}, {ms(t.budget_ms)}" for t in search.targets)
    source = "By the tables, as the search read them."
    return Matrix("predicted", networks, tuple(map(_short, devices)), cells, source)


def measured_matrix(runs: Sequence[Run]) -> Matrix | None:
    """Files measured by `fbnas run` and `fbnas evaluate`, a row per architecture.

    A device's own network is that of a `fbnas run` on it.
    """
    seen = [run for run in runs if run.result.get("latency_ms") and run.result.get("architecture")]
    architectures = list(dict.fromkeys(tuple(run.result["architecture"]) for run in seen))
    devices = list(dict.fromkeys(device_name(run) for run in seen))
    names: dict[int, str] = {}
    measured: dict[tuple[int, int], float] = {}
    own: dict[int, float] = {}
    for run in seen:
        i = architectures.index(tuple(run.result["architecture"]))
        j = devices.index(device_name(run))
        value = run.result["latency_ms"]["value"]
        whole = run.result.get("command") == "run"
        if whole:
            names[i] = f"{names[i]}, {run.name}" if i in names else run.name
        measured.setdefault((i, j), value)
        if whole:
            own[j] = measured[i, j] = value
    cells = {place: Cell(value, own.get(place[1])) for place, value in measured.items()}
    networks = tuple(names.get(i, f"network {i}") for i in range(len(architectures)))
    source = "The folders' files as measured: a file may be pruned or quantized besides."
    matrix = Matrix("measured", networks, tuple(devices), cells, source)
    return matrix if len(devices) > 1 and matrix.tells else None


def device_name(run: Run) -> str:
    """Name the device that a run measured on: runtime and precision, and which machine."""
    device = run.result.get("device") or {}
    parts = [str(device[key]) for key in ("runtime", "precision") if device.get(key)]
    name = device.get("name") or device.get("device") or "this device"
    return " ".join(parts if name == "local" and parts else [*parts, f"on {name}"])


def matrix_figure(matrix: Matrix, number: int) -> Figure:
    """Return the matrix as a heatmap: colour is percent against the device's own network."""
    rows, columns = range(len(matrix.networks)), range(len(matrix.devices))
    found = [[matrix.cells.get((i, j)) for j in columns] for i in rows]
    z = [[None if cell is None else cell.off or 0.0 for cell in line] for line in found]
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": z,
        "x": [_broken(device) for device in matrix.devices],
        "y": [_broken(network) for network in matrix.networks],
        "text": [[_text(cell) for cell in line] for line in found],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y} on %{x}<br>%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": DIVERGING,
        "zmin": -FULL_COLOUR,
        "zmax": FULL_COLOUR,
        "xgap": 2,
        "ygap": 2,
        "colorbar": {
            "title": {"text": "%"},
            "thickness": 12,
            "outlinewidth": 0,
        },
    }
    layout = base_layout(
        "measured on" if matrix.how == "measured" else "by the table of",
        "network of",
        height=150 + 54 * len(matrix.networks),
    )
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout["yaxis"] |= {"type": "category", "showgrid": False, "autorange": "reversed"}
    caption = (
        f"Latency of every network on every device, {matrix.how}; in percent, and as colour, how "
        f"much slower than the device's own network. {matrix.source}"
    )
    label = (
        f"Matrix of {len(matrix.networks)} networks on {len(matrix.devices)} devices, {matrix.how}"
    )
    return Figure(f"devices-{number}", label, caption, [trace], layout)


def matrix_table(matrix: Matrix, which: int) -> str:
    """Return the matrix as a folded table."""
    rows = []
    for i, network in enumerate(matrix.networks):
        cells = [matrix.cells.get((i, j)) for j in range(len(matrix.devices))]
        texts = "".join(number(DASH if cell is None else _text(cell)) for cell in cells)
        rows.append(f"<tr><th scope=row>{escape(network)}</th>{texts}</tr>")
    columns = ("Network of", *map(escape, matrix.devices))
    caption = f"Latency, {matrix.how}, and against the device's own network."
    content = table(f"devices-table-{which}", caption, columns, rows)
    return details(f"The {matrix.how} matrix as a table", content)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    off = "" if cell.off is None else f"<br>{signed(cell.off)}{THIN}%"
    return f"{ms(cell.latency_ms)}{off if cell.latency_ms != cell.own_ms else '<br>its own'}"


def _short(table_name: str) -> str:
    return table_name.rpartition("/")[2].removesuffix(".csv")


def _broken(name: str) -> str:
    words = name if len(name) <= NARROW else name.replace("_", " ")
    return "<br>".join(words.split())
