"""LatencyTable: what every block costs on one device, as a CSV file that a person can read.

A row per block and shape; `stem`, `head`, `classifier` and `overhead` (what a run costs that does
nothing) are rows too. The header says where the numbers come from. Torch is imported only
where tensors are made, so that the report reads tables without it.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.latency.table_file import Entry, Shape, check_header, parse, read_text, render
from fbnas.shipped import shipped_names

if TYPE_CHECKING:
    from torch import Tensor

    from fbnas.space import SearchSpace

CORRECTION = (  # header keys
    "correction_scale",
    "correction_base_ms",
    "calibration",
    "calibration_error",
    "calibration_spearman",
    "calibration_noise_floor",
)
OVERHEAD = Shape("overhead", 1, 1, 1, 1, 1)


class LatencyTable:
    """Latencies of blocks on one device, at one precision, number of threads and batch size."""

    def __init__(
        self, header: Mapping[str, str], entries: Iterable[Entry], *, path: Path | None = None
    ) -> None:
        """Hold rows and where they come from.

        Args:
            header: at least device, runtime, precision, threads, batch and noise_floor.

        Raises:
            InputError: a header value that is missing or wrong, a row that comes twice.
        """
        self.header = {key: str(value) for key, value in header.items()}
        self.entries = tuple(entries)
        self.path = path
        check_header(self.header, self.name)
        self._by_shape: dict[Shape, Entry] = {}
        for entry in self.entries:
            if entry.shape in self._by_shape:
                raise InputError(f"{self.name}: {entry.shape} comes twice; keep one of the rows")
            self._by_shape[entry.shape] = entry

    @classmethod
    def load(cls, path: Path | str) -> "LatencyTable":
        """Read a table.

        Raises:
            InputError: anything that is wrong in it, with file and line.
        """
        path = Path(path)
        header, entries = parse(path, read_text(path))
        return cls(header, entries, path=path)

    def save(self, path: Path | str) -> None:
        """Write the table in one step and remember the path; `load` returns an equal table."""
        atomic_write(path, render(self.header, self.entries))
        self.path = Path(path)

    @property
    def name(self) -> str:
        return self.path.name if self.path else f"the table of {self.header.get('device', '?')}"

    @property
    def device(self) -> str:
        return self.header["device"]

    @property
    def runtime(self) -> str:
        return self.header["runtime"]

    @property
    def precision(self) -> str:
        return self.header["precision"]

    @property
    def threads(self) -> int:
        return int(self.header["threads"])

    @property
    def batch(self) -> int:
        return int(self.header["batch"])

    @property
    def noise_floor(self) -> float:
        """How much a latency differs when measured again, typically: a fraction."""
        return float(self.header["noise_floor"])

    @property
    def quiet(self) -> str:
        """`yes`, or `no` and why, where the machine was busy; tables of old say nothing: yes."""
        return self.header.get("quiet", "yes")

    @property
    def correction(self) -> tuple[float, float]:
        """(scale, base in ms) that `tensor` applies; (1, 0) for a table that was not calibrated."""
        scale = float(self.header.get("correction_scale", 1.0))
        return scale, float(self.header.get("correction_base_ms", 0.0))

    def __contains__(self, shape: object) -> bool:
        return shape in self._by_shape

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LatencyTable):
            return NotImplemented
        mine, theirs = ({**table.header, "format": "", "rows": ""} for table in (self, other))
        return mine == theirs and self.entries == other.entries

    __hash__ = None  # type: ignore[assignment]

    def lookup(  # noqa: PLR0917  the columns of a row, in their order
        self,
        block: str,
        in_channels: int,
        out_channels: int,
        stride: int,
        height: int,
        width: int,
        *,
        space: str = "NAME",
    ) -> Entry:
        """Return the row of a block at a shape, as measured; `space` names one that needs it.

        Raises:
            InputError: the table does not hold it; the line holds the command that measures it.
        """
        shape = Shape(block, in_channels, out_channels, stride, height, width)
        if shape not in self._by_shape:
            self._refuse(shape, space)
        return self._by_shape[shape]

    def _refuse(
        self, missing: Shape, space: str, *, classes: int | None = None, of: Iterable[int] = ()
    ) -> NoReturn:
        """Refuse a shape; `classes` are those of its classifier, `of` those that have one here."""
        command = f"fbnas profile space={space} device=local"
        command += f" device.name={self.device}" if self.device != "local" else ""
        command += f" device.runtime={self.runtime}" if self.runtime != "onnxruntime" else ""
        command += f" device.precision={self.precision}" if self.precision != "fp32" else ""
        command += f" device.threads={self.threads}" if self.threads != 1 else ""
        command += f" classes={classes}" if classes is not None else ""
        held = f"{len(self.entries)} rows for space {self.header.get('space', '?')}"
        held += "".join(f", a classifier of {n} classes among them (classes={n})" for n in of)
        raise InputError(
            f"No latency for {missing} in {self.name}, which holds {held}. "
            f"Measure it: {command} table={self.path or 'FILE'}"
        )

    def tensor(self, space: "SearchSpace", *, classes: int | None = None) -> tuple["Tensor", float]:
        """Return what the search needs: LAT(a) = base + sum over layers of latency[layer, block].

        Every row was measured in a run of its own, a network is one run: the overhead of a run is
        taken from each row and added once to the base. Without that, networks of 0.03 to 0.3 ms are
        predicted 27 % too slow, with it 5 % (space quickstart, 2-core x86). A calibrated table's
        correction is then applied: every row times scale, or its own corrected_ms where it has
        one; correction_base_ms is added to the base.

        Args:
            classes: which classifier; None takes the only one that fits, or that of 1000 classes.

        Returns:
            Latency in ms, (layers, blocks) float64, nan where a block is not offered; base in ms:
            stem, head, classifier and overhead.

        Raises:
            InputError: a shape that the table does not hold.
        """
        latency_ms = self._filled(space, self._corrected_ms)
        fixed_ms = sum(self._corrected_ms(entry) for entry in self._fixed(space, classes))
        scale, correction_base_ms = self.correction
        return latency_ms, self.overhead_ms * scale + fixed_ms + correction_base_ms

    def energy(self, space: "SearchSpace", *, classes: int | None = None) -> tuple["Tensor", float]:
        """Return what E(a) = base + sum over layers of energy[layer, block] needs, like `tensor`.

        The energy of the overhead row plays no part: a block's own energy holds no run's share.

        Returns:
            Energy of one run in mJ, (layers, blocks) float64, nan where a block is not offered;
            base in mJ: stem, head and classifier.

        Raises:
            InputError: a shape, or the energy of one, that the table does not hold.
        """
        energy_mj = self._filled(space, self._energy_mj)
        return energy_mj, sum(self._energy_mj(entry) for entry in self._fixed(space, classes))

    def peak(self, space: "SearchSpace", *, classes: int | None = None) -> tuple["Tensor", float]:
        """Return what the peak memory of a network, max(base, peak[layer, block] ...), needs.

        Returns:
            Peak memory in MB (1e6 bytes), (layers, blocks) float64, nan where a block is not
            offered; base in MB: the most of stem, head and classifier.

        Raises:
            InputError: a shape, or the peak memory of one, that the table does not hold.
        """
        peak_mb = self._filled(space, self._peak_mb)
        return peak_mb, max(self._peak_mb(entry) for entry in self._fixed(space, classes))

    def holds(self, column: str) -> bool:
        """Whether any row has a value in `column`: energy_mj or peak_mb."""
        return any(getattr(entry, column) is not None for entry in self.entries)

    def _filled(self, space: "SearchSpace", cost: Callable[[Entry], float]) -> "Tensor":
        """(layers, blocks) float64 of what `cost` says of each row, nan where not offered."""
        import torch

        values = torch.full((len(space.layers), len(space.blocks)), torch.nan).double()
        for layer in space.layers:
            shape = (layer.in_channels, layer.out_channels, layer.stride, layer.height, layer.width)
            for block in layer.blocks:
                entry = self.lookup(block, *shape, space=_option(space))
                values[layer.index, space.blocks.index(block)] = cost(entry)
        return values

    def _fixed(self, space: "SearchSpace", classes: int | None) -> tuple[Entry, ...]:
        """The rows that every network has."""
        return self._stem(space), self._head(space), self._classifier(space, classes)

    def _energy_mj(self, entry: Entry) -> float:
        return self._known(entry, "energy_mj", "profile with device=roofline, which computes it")

    def _peak_mb(self, entry: Entry) -> float:
        return self._known(entry, "peak_mb", "profile again with this fbnas, which computes it")

    def _known(self, entry: Entry, column: str, way_out: str) -> float:
        value: float | None = getattr(entry, column)
        if value is None and entry.samples == 0:  # an identity does nothing and holds nothing
            return 0.0
        if value is None:
            what = f"{column} of {entry.shape}" if self.holds(column) else f"column {column}"
            raise InputError(
                f"{self.name} has no {what}; expected it for the budget that was asked for: "
                f"{way_out}."
            )
        return value

    @property
    def overhead_ms(self) -> float:
        """What a run costs that does nothing; 0 where it was not measured."""
        overhead = self._by_shape.get(OVERHEAD)
        return overhead.latency_ms if overhead else 0.0

    def _added_ms(self, entry: Entry) -> float:
        """What a row adds to a network."""
        return max(entry.latency_ms - self.overhead_ms, 0.0)

    def _corrected_ms(self, entry: Entry) -> float:
        """What a row adds to a network by the calibration, if there is one."""
        if entry.corrected_ms is not None:
            return entry.corrected_ms
        return self._added_ms(entry) * self.correction[0]

    def _stem(self, space: "SearchSpace") -> Entry:
        side = space.resolution
        ends = (space.input_channels, space.stem.channels, space.stem.stride)
        return self.lookup(space.stem.block, *ends, side, side, space=_option(space))

    def _head(self, space: "SearchSpace") -> Entry:
        side = space.final_size
        return self.lookup(
            "head", space.final_channels, space.head, 1, side, side, space=_option(space)
        )

    def _classifier(self, space: "SearchSpace", classes: int | None) -> Entry:
        side = space.final_size
        fitting = {
            entry.shape.out_channels: entry
            for entry in self.entries
            if entry.shape
            == Shape("classifier", space.head, entry.shape.out_channels, 1, side, side)
        }
        if classes is None and len(fitting) == 1:
            return next(iter(fitting.values()))
        if classes is None and len(fitting) > 1 and 1000 not in fitting:
            raise InputError(
                f"{self.name} holds classifiers of {sorted(fitting)} classes; expected one, or one "
                "of 1000: say which with classes=N"
            )
        wanted = 1000 if classes is None else classes
        if wanted not in fitting:
            missing = Shape("classifier", space.head, wanted, 1, side, side)
            self._refuse(missing, _option(space), classes=wanted, of=sorted(fitting))
        return fitting[wanted]


def _option(space: "SearchSpace") -> str:
    """Write what `space=` takes to profile a space at its resolution: a file if not shipped."""
    own = "" if space.name in shipped_names("space") else ".yaml"
    return f"{space.name}{own} space.resolution={space.resolution}"
