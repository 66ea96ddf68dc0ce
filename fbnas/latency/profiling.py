"""Space x device -> latency table: a plan of what is to be measured, then its execution.

A block is measured in context: behind a 1x1 convolution, as every FBNet block ends with one, whose
own time is taken off. Alone a block would also pay for what a network does once: starting a run,
and bringing images and answers into the runtime's own layout. Of whole networks of space
fbnet_cifar a line through sums of blocks leaves 3.1 % of error so, and 11 % with blocks alone
(OpenVINO int8, 2-core x86); through ONNX Runtime at 224x224 both leave 1.3 % (scripts/additivity).
"""

import contextlib
import datetime
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fbnas
from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.latency.converting import ConversionError
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.graph_cost import module_cost
from fbnas.latency.roofline import Roofline
from fbnas.latency.table import CORRECTION, OVERHEAD, Entry, LatencyTable, Shape
from fbnas.latency.timing import Timing, difference
from fbnas.progress import progress
from fbnas.space import Architecture, SearchSpace, build_block, build_network, count
from fbnas.space.network import build_classifier, build_head, build_stem

log = logging.getLogger(__name__)

ROUNDS = 20  # of 111 blocks of space fbnet: about 3 s (2-core x86)
BATCH = 1
BUSY_LOAD = 0.2  # of the cores, by other processes
SAME_DEVICE = ("device", "cpu", "runtime", "runtime_version", "provider", "precision", "threads")
COMPILE_SECONDS = {  # a block, on one core
    "onnxruntime": 0.03,
    "openvino": 0.03,
    "litert": 2.0,
    "executorch": 2.0,
    "pytorch": 0.5,
    "roofline": 0.03,
}
LEAST_VISIT_MS, MACS_PER_MS = 0.8, 5e6
ADDED_LATER = {"provider": ("CPU",)}  # header keys that older tables lack, and what they stood for
PROTOCOL = "warm, interleaved rounds in random order, 10th percentile"
IN_CONTEXT = "each behind a 1x1 convolution whose own time is taken off"
ALONE = "each in a run of its own"
PLANNED = "computed from the numbers of a data sheet, not measured"
IDENTITY = Timing(0.0, 0.0, 0.0, 0)  # costs nothing and is not measured
AnyDevice = Device | Roofline


def plan(space: SearchSpace, classes: int = 1000, *, context: bool = True) -> list[Shape]:
    """Return every distinct shape of a space, in the order of the network: it can be printed.

    Args:
        context: blocks are measured in context; alone, what a run itself costs is measured too.
    """
    side, final = space.resolution, space.final_size
    items = [] if context else [OVERHEAD]
    stem = space.stem
    items.append(Shape(stem.block, space.input_channels, stem.channels, stem.stride, side, side))
    items += [
        Shape(
            block,
            layer.in_channels,
            layer.out_channels,
            layer.stride,
            layer.height,
            layer.width,
        )
        for layer in space.layers
        for block in layer.blocks
    ]
    items.append(Shape("head", space.final_channels, space.head, 1, final, final))
    items.append(Shape("classifier", space.head, classes, 1, final, final))
    return list(dict.fromkeys(items))


def build(item: Shape, space: SearchSpace) -> nn.Module:
    """Return the module to be measured."""
    if item == OVERHEAD:
        return nn.ReLU()
    if item.block == space.stem.block:
        return build_stem(space)
    if item.block == "head":
        return build_head(space)
    if item.block == "classifier":
        return build_classifier(space, item.out_channels)
    return build_block(item.block, item.in_channels, item.out_channels, item.stride)


def reference_of(item: Shape, space: SearchSpace) -> Shape | None:
    """Return what stands before a shape in a network and is measured to be taken off.

    A 1x1 convolution; before the classifier the head as well. Nothing before the stem, which so
    holds what a run itself costs.
    """
    if item.block in (space.stem.block, OVERHEAD.block):
        return None
    if item.block == "classifier":
        side = space.final_size
        return Shape("head", space.final_channels, space.head, 1, side, side)
    return Shape("before", item.in_channels, item.in_channels, 1, item.height, item.width)


def build_reference(reference: Shape, space: SearchSpace) -> nn.Module:
    """Return the module of `reference_of`."""
    channels = reference.in_channels
    before = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
    return nn.Sequential(before, build_head(space)) if reference.block == "head" else before


@dataclass(frozen=True)
class Compiled:
    """A shape and what stands for it in a measurement: `path` is None for an identity or a failure.

    `reference`: what its time is measured on top of. `failure`: the converter's own words.
    `energy_mj`: of one run, where the device computes it. `peak_mb`: of the activations alive at
    once, 1 MB = 1e6 bytes.
    """

    item: Shape
    path: Path | None
    reference: Path | None = None
    failure: str | None = None
    energy_mj: float | None = None
    peak_mb: float | None = None


def missing_items(
    space: SearchSpace,
    device: AnyDevice,
    table_path: Path,
    classes: int = 1000,
    *,
    context: bool = True,
) -> tuple[LatencyTable | None, list[Shape]]:
    """Return the table as it is, if there is one, and the shapes of the space that it lacks.

    A table that was begun with blocks alone goes on so, whatever `context` says.

    Raises:
        InputError: the table is another device's.
    """
    if not table_path.exists():
        return None, plan(space, classes, context=context)
    known = LatencyTable.load(table_path)
    require_same_device(known, device)
    items = plan(space, classes, context=OVERHEAD not in known)
    return known, [item for item in items if item not in known]


def profile(
    space: SearchSpace,
    device: AnyDevice,
    table_path: Path | str,
    *,
    classes: int = 1000,
    rounds: int = ROUNDS,
    seconds: float | None = None,
    seed: int = 0,
    context: bool = True,
) -> LatencyTable:
    """Measure the shapes of a space that the table does not hold yet, and write the table.

    The work lies in TABLE.partial/ until it is done: the same call after an interrupt continues it.
    Shapes that fail are left out and named in the table's header `failed`.

    Args:
        classes: outputs of the classifier.
        rounds: how often each shape is visited.
        seconds: time after which unstable shapes are no longer visited again.
        context: measure blocks as in a network; else each in a run of its own.

    Raises:
        InputError: the table is another device's or precision's, or cannot be written, or not one
            shape can be measured.
    """
    table_path = Path(table_path)
    work = work_folder(table_path)
    known, missing = missing_items(space, device, table_path, classes, context=context)
    context = OVERHEAD not in (missing if known is None else known)
    if known is not None and not missing:
        shutil.rmtree(work, ignore_errors=True)  # left by a kill between saving and clearing up
        log.info("%s holds every shape already: nothing is measured.", table_path)
        return known
    compiled = compile_items(space, device, missing, work, seed=seed, context=context)
    files = files_of(compiled)
    if not files and any(c.failure for c in compiled):
        first = next(c for c in compiled if c.failure)
        raise InputError(f"{first.item}: {first.failure}; expected at least one block that works")
    if files:
        with progress(f"Timing {len(files)} models, {device.precision}", total=rounds) as advance:
            measurement = device.measure(
                files,
                rounds=rounds,
                seed=seed,
                work=work,
                progress=advance,
                seconds=seconds,
                keep_failures=True,
            )
    else:
        measurement = Measurement((), 0.0, np.empty((0, 0)))
    entries, failures = _entries(compiled, files, measurement)
    header = {
        **device.fingerprint(),
        "batch": str(BATCH),
        "protocol": f"{IN_CONTEXT if context else ALONE}; "
        f"{PLANNED if device.kind == 'roofline' else PROTOCOL}",
        "rounds": str(rounds),
        **_circumstances(measurement),
        **(
            {"failed": "; ".join(f"{item}: {words}" for item, words in failures)}
            if failures
            else {}
        ),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "space": space.name,
        "fbnas": fbnas.__version__,
    }
    table = LatencyTable(header, entries) if known is None else _extended(known, header, entries)
    table.save(table_path)
    shutil.rmtree(work)
    return table


def work_folder(table_path: Path) -> Path:
    """Return the folder beside a table that holds the work under way."""
    return table_path.with_name(f"{table_path.name}.partial")


def estimated_seconds(
    items: Sequence[Shape], space: SearchSpace, device: AnyDevice, rounds: int
) -> tuple[float, float]:
    """Return about how long compiling and timing will take, from what was seen on 2-core x86.

    A visit runs a block twice, for at least 0.4 ms in all; slow processors need longer.
    """
    compiling = COMPILE_SECONDS.get(device.runtime, 1.0) * len(items)
    visits_ms = 0.0
    for item in items:
        module = build(item, space)
        if not isinstance(module, nn.Identity) and device.kind != "roofline":
            sizes = count(module, (item.in_channels, item.height, item.width))
            visits_ms += max(LEAST_VISIT_MS, 2 * sizes.macs / MACS_PER_MS)
    return compiling, rounds * visits_ms / 1e3


def require_same_device(table: LatencyTable, device: AnyDevice) -> None:
    """Check that `table` was measured as `device` would be.

    Raises:
        InputError: another device, processor, runtime, version, precision or number of threads.
    """
    for key, value in device.fingerprint().items():
        stated = table.header.get(key, "")
        if not stated and value in ADDED_LATER.get(key, ()):
            continue
        if key in SAME_DEVICE and stated != value:
            raise InputError(
                f"{table.name} was measured with {key} {stated or '(not stated)'}, here it is "
                f"{value}; expected one device at one precision in a table: give another table=FILE"
            )


def enliven_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give fresh batch normalisations random statistics, so that no range is dead; eval mode.

    With the statistics of a fresh layer signals would fade to denormal numbers, which are slow.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            assert part.running_var is not None
            with torch.no_grad():
                part.running_mean.normal_(0.0, 0.1, generator=generator)
                part.running_var.uniform_(0.5, 1.5, generator=generator)
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0.0, 0.5, generator=generator)
    return module.eval()


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread: on a busy machine threads that spin made exports 8 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prepare_folder(work: Path, stated: Mapping[str, object], way_out: str) -> None:
    """Make a folder for work that can be continued; work of another kind in it is dropped.

    Raises:
        InputError: it cannot be written.
    """
    plan_file = work / "plan.json"
    if not plan_file.is_file() or read_json(plan_file) != stated:
        shutil.rmtree(work, ignore_errors=True)
    try:
        (work / "models").mkdir(parents=True, exist_ok=True)
        write_json(plan_file, stated)
    except OSError as error:
        raise InputError(
            f"{work} cannot be written ({error.strerror}); expected a folder that you may write "
            f"to: give another {way_out}"
        ) from error


def compile_items(
    space: SearchSpace,
    device: AnyDevice,
    items: Sequence[Shape],
    work: Path,
    *,
    seed: int = 0,
    context: bool = True,
) -> list[Compiled]:
    """Write a model file per item and per reference into `work`; files of before are kept.

    Raises:
        InputError: the folder cannot be written, or there is no converter.
    """
    stated = {
        "items": [str(item) for item in items],
        "space": space.to_dict(),
        "device": device.fingerprint(),
        "seed": seed,
        "context": context,
        "fbnas": fbnas.__version__,
    }
    prepare_folder(work, stated, "table=FILE")
    compiler = _Compiler(space, device, work / "models", seed, context)
    name = f"Compiling {len(items)} blocks, {device.precision}"
    found = []
    with one_torch_thread(), progress(name, total=len(items)) as advance:
        for index, item in enumerate(items):
            found.append(compiler.item(item, f"{index:04d}"))
            advance(1)
    return found


@dataclass(frozen=True)
class _Compiler:
    space: SearchSpace
    device: AnyDevice
    folder: Path
    seed: int
    context: bool

    def item(self, item: Shape, name: str) -> Compiled:
        """Compile a shape, in context, and what stands before it."""
        torch.manual_seed(self.seed)
        module = build(item, self.space)
        if isinstance(module, nn.Identity):
            return Compiled(item, None)
        shape = (item.in_channels, item.height, item.width)
        before = reference_of(item, self.space) if self.context else None
        reference = None
        try:
            if before is not None:
                ends = "_".join(str(part) for part in before)
                first = build_reference(before, self.space)
                shape_before = (before.in_channels, before.height, before.width)
                reference = self._file(first, shape_before, f"before_{ends}")
                path = self._file(nn.Sequential(first, module), shape_before, name)
            else:
                path = self._file(module, shape, name)
            cost = module_cost(enliven_(module, self.seed), shape, self.device.precision)
        except ConversionError as error:
            return Compiled(item, None, failure=str(error))
        energy_mj = None if isinstance(self.device, Device) else self.device.energy_mj(cost)
        return Compiled(item, path, reference, energy_mj=energy_mj, peak_mb=cost.peak_bytes / 1e6)

    def _file(self, module: nn.Module, shape: tuple[int, int, int], name: str) -> Path:
        path = self.folder / f"{name}{self.device.suffix}"
        if not path.exists():
            self.device.compile(enliven_(module, self.seed), shape, path, batch=BATCH)
        return path


def files_of(compiled: Sequence[Compiled]) -> list[Path]:
    """Return every distinct file that is to be measured for the shapes."""
    files = [file for c in compiled for file in (c.path, c.reference) if file is not None]
    return list(dict.fromkeys(files))


def compile_networks(
    architectures: Sequence[Architecture],
    space: SearchSpace,
    device: AnyDevice,
    folder: Path,
    *,
    classes: int = 1000,
    seed: int = 0,
) -> list[Path]:
    """Write a model file per untrained network, 000, 001, ...; files that are there are kept.

    Raises:
        ConversionError: a network cannot be converted.
        InputError: the folder cannot be written, or there is no converter.
    """
    stated = {
        "architectures": [list(architecture.blocks) for architecture in architectures],
        "space": space.to_dict(),
        "device": device.fingerprint(),
        "classes": classes,
        "seed": seed,
        "fbnas": fbnas.__version__,
    }
    prepare_folder(folder, stated, "out=DIR or table=FILE")
    shape = (space.input_channels, space.resolution, space.resolution)
    files = []
    compiling = progress("Compiling whole networks", total=len(architectures))
    with one_torch_thread(), compiling as advance:
        for index, architecture in enumerate(architectures):
            files.append(folder / "models" / f"{index:03d}{device.suffix}")
            if not files[-1].exists():
                torch.manual_seed(seed)
                network = build_network(space, architecture, classes)
                device.compile(enliven_(network, seed), shape, files[-1])
            advance(1)
    return files


def _entries(
    compiled: Sequence[Compiled], files: Sequence[Path], measurement: Measurement
) -> tuple[list[Entry], list[tuple[Shape, str]]]:
    """Return a row per shape that works, zeros for an identity, and the others with the reason."""
    position = {file: index for index, file in enumerate(files)}
    entries, failures = [], []
    for c in compiled:
        used = [position[file] for file in (c.path, c.reference) if file is not None]
        failed = [measurement.failures[i] for i in used if i in measurement.failures]
        if c.failure is not None or failed:
            failures.append((c.item, c.failure or failed[0]))
            continue
        timings = [timing for i in used if (timing := measurement.timings[i]) is not None]
        timing = IDENTITY if not timings else timings[0]
        if len(timings) == 2:
            timing = difference(*timings)
        entries.append(
            Entry(
                c.item,
                round(timing.latency_ms, 6),
                round(timing.low_ms, 6),
                round(timing.high_ms, 6),
                timing.samples,
                energy_mj=_rounded(c.energy_mj),
                peak_mb=_rounded(c.peak_mb),
            )
        )
    return entries, failures


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _circumstances(measurement: Measurement) -> dict[str, str]:
    """Return the header's lines about how quiet the machine was."""
    busy = []
    if not measurement.quiet:
        busy.append(f"test and retest differ by {100 * measurement.noise_floor:.1f} %")
    if measurement.load is not None and measurement.load > BUSY_LOAD:
        busy.append(f"other processes used {100 * measurement.load:.0f} % of its cores")
    load = {} if measurement.load is None else {"load": f"{measurement.load:.3f}"}
    return {
        "noise_floor": f"{measurement.noise_floor:.4f}",
        "drift": f"{measurement.drift:.4f}",
        **load,
        "unstable": str(measurement.unstable),
        "quiet": f"no ({', '.join(busy)})" if busy else "yes",
    }


def _extended(
    known: LatencyTable, header: Mapping[str, str], entries: Sequence[Entry]
) -> LatencyTable:
    """Return the table with more rows; the worse circumstances hold for all of them."""
    spaces = [*known.header.get("space", "").split(), header["space"]]
    held = known.entries
    kept = {key: value for key, value in known.header.items() if key != "failed"}
    kept |= {key: header[key] for key in ("failed",) if key in header}
    for key in ("noise_floor", "drift", "load", "unstable"):
        if key in header:
            kept[key] = max(kept.get(key, "0"), header[key], key=float)
    if header["quiet"] != "yes":
        kept["quiet"] = header["quiet"]
    if header["space"] not in known.header.get("space", "").split():
        for key in CORRECTION:  # it was fitted on networks of another space
            kept.pop(key, None)
        held = tuple(replace(entry, corrected_ms=None) for entry in held)
    merged = {
        **kept,
        "space": " ".join(dict.fromkeys(spaces)),
    }
    return LatencyTable(merged, [*held, *entries])
