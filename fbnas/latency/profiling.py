"""Space x device -> latency table: a plan of what is to be measured, then its execution."""

import contextlib
import datetime
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import fbnas
from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.table import CORRECTION, OVERHEAD, Entry, LatencyTable, Shape
from fbnas.latency.timing import Timing
from fbnas.progress import progress
from fbnas.space import SearchSpace, build_block
from fbnas.space.network import build_classifier, build_head, build_stem

ROUNDS = 20  # of 111 blocks of space fbnet: about 3 s (2-core x86)
BATCH = 1
SAME_DEVICE = ("device", "cpu", "runtime", "runtime_version", "precision", "threads")
IDENTITY = Timing(0.0, 0.0, 0.0, 0)  # costs nothing and is not measured


def plan(space: SearchSpace, classes: int = 1000) -> list[Shape]:
    """Return every distinct shape of a space, in the order of the network: it can be printed."""
    side, final = space.resolution, space.final_size
    items = [
        OVERHEAD,
        Shape("stem", space.input_channels, space.stem.channels, space.stem.stride, side, side),
    ]
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
    if item.block == "stem":
        return build_stem(space)
    if item.block == "head":
        return build_head(space)
    if item.block == "classifier":
        return build_classifier(space, item.out_channels)
    return build_block(item.block, item.in_channels, item.out_channels, item.stride)


def profile(
    space: SearchSpace,
    device: Device,
    table_path: Path | str,
    *,
    classes: int = 1000,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> LatencyTable:
    """Measure the shapes of a space that the table does not hold yet, and write the table.

    The work lies in TABLE.partial/ until it is done: the same call after an interrupt continues it.

    Args:
        classes: outputs of the classifier.
        rounds: how often each shape is visited.

    Raises:
        InputError: the table is another device's or precision's, or cannot be written.
    """
    table_path = Path(table_path)
    work = table_path.with_name(f"{table_path.name}.partial")
    known = LatencyTable.load(table_path) if table_path.exists() else None
    if known is not None:
        require_same_device(known, device)
    missing = [item for item in plan(space, classes) if known is None or item not in known]
    if known is not None and not missing:
        shutil.rmtree(work, ignore_errors=True)  # left by a kill between saving and clearing up
        return known
    files = _compile(space, device, missing, work, seed=seed)
    with progress(f"Timing {len(files)} blocks, {device.precision}", total=rounds) as advance:
        measurement = device.measure(
            [file for file in files if file is not None],
            rounds=rounds,
            seed=seed,
            work=work,
            progress=advance,
        )
    entries = _entries(missing, files, measurement)
    header = {
        **device.fingerprint(),
        "batch": str(BATCH),
        "protocol": "each alone, warm, interleaved rounds in random order, 10th percentile",
        "rounds": str(rounds),
        "noise_floor": f"{measurement.noise_floor:.4f}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "space": space.name,
        "fbnas": fbnas.__version__,
    }
    table = LatencyTable(header, entries) if known is None else _extended(known, header, entries)
    table.save(table_path)
    shutil.rmtree(work)
    return table


def require_same_device(table: LatencyTable, device: Device) -> None:
    """Check that `table` was measured as `device` would be.

    Raises:
        InputError: another device, processor, runtime, version, precision or number of threads.
    """
    for key, value in device.fingerprint().items():
        stated = table.header.get(key, "")
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


def _compile(
    space: SearchSpace, device: Device, items: Sequence[Shape], work: Path, *, seed: int
) -> list[Path | None]:
    """Return a model file per item, None for identities; those of an interrupted plan are kept."""
    stated = {
        "items": [str(item) for item in items],
        "space": space.to_dict(),
        "device": device.fingerprint(),
        "seed": seed,
        "fbnas": fbnas.__version__,
    }
    plan_file = work / "plan.json"
    if not plan_file.is_file() or read_json(plan_file) != stated:
        shutil.rmtree(work, ignore_errors=True)
    try:
        (work / "models").mkdir(parents=True, exist_ok=True)
        write_json(plan_file, stated)
    except OSError as error:
        raise InputError(
            f"{work} cannot be written ({error.strerror}); expected a folder that you may write "
            "to: give another table=FILE"
        ) from error
    files: list[Path | None] = []
    name = f"Compiling {len(items)} blocks, {device.precision}"
    with one_torch_thread(), progress(name, total=len(items)) as advance:
        for index, item in enumerate(items):
            torch.manual_seed(seed)
            module = build(item, space)
            path = work / "models" / f"{index:04d}.onnx"
            if isinstance(module, nn.Identity):
                files.append(None)
            else:
                if not path.exists():
                    device.compile(
                        enliven_(module, seed),
                        (item.in_channels, item.height, item.width),
                        path,
                        batch=BATCH,
                    )
                files.append(path)
            advance(1)
    return files


def _entries(
    items: Sequence[Shape], files: Sequence[Path | None], measurement: Measurement
) -> list[Entry]:
    """Return a row per item: the next timing where it has a file, zeros for an identity."""
    timings = iter(measurement.timings)
    entries = []
    for item, file in zip(items, files, strict=True):
        timing = IDENTITY if file is None else next(timings)
        value, low, high = (
            round(ms, 6) for ms in (timing.latency_ms, timing.low_ms, timing.high_ms)
        )
        entries.append(Entry(item, value, low, high, timing.samples))
    return entries


def _extended(
    known: LatencyTable, header: Mapping[str, str], entries: Sequence[Entry]
) -> LatencyTable:
    """Return the table with more rows; of two noise floors the larger one holds for all rows."""
    spaces = [*known.header.get("space", "").split(), header["space"]]
    noise_floor = max(known.noise_floor, float(header["noise_floor"]))
    kept = dict(known.header)
    if header["space"] not in known.header.get("space", "").split():
        for key in CORRECTION:  # it was fitted on networks of another space
            kept.pop(key, None)
    merged = {
        **kept,
        "space": " ".join(dict.fromkeys(spaces)),
        "noise_floor": f"{noise_floor:.4f}",
    }
    return LatencyTable(merged, [*known.entries, *entries])
