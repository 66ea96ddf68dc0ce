"""fbnas calibrate: a table against measured whole networks, or from nothing but their totals."""

from pathlib import Path
from typing import Any

from fbnas.commands import whole_networks
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import device_of, space_of
from fbnas.commands.targets import range_text
from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.latency import calibration
from fbnas.latency.table import LatencyTable
from fbnas.report.scatter import Point, write_scatter


def main(config: dict[str, Any]) -> int:
    if config["measurements"] or config["suggest"]:
        return whole_networks.main(config)
    if not config["table"]:
        raise InputError(
            "fbnas calibrate needs table=FILE to hold against whole networks, measurements=FILE to "
            "make one from totals, or suggest=N; see fbnas calibrate --help"
        )
    space, device = space_of(config), device_of(config)
    path = Path(config["table"])
    table = LatencyTable.load(path)
    found = calibration.calibrate(
        table,
        space,
        device,
        classes=config["classes"],
        networks=config["networks"],
        held_out=config["held_out"],
        seed=config["seed"],
        work=path.with_name(f"{path.name}.partial-networks"),
    )
    out = OutFolder(config)  # only now, so that the same command continues after an interrupt
    print(describe(found))
    if found.helps:
        table = calibration.apply(table, found, space, classes=config["classes"])
        table.save(path)
        print(f"{path}: the correction is in it")
    else:
        table = calibration.judged(calibration.uncorrected(table), found, space)
        table.save(path)
        print(f"{path}: left without a correction, which would not help on held-out networks")
    print(range_text(table, space, config["classes"]))
    pages = write_networks(path, found)
    print("networks: " + ", ".join(str(page) for page in pages))
    for failure in found.failures:
        print(f"left out, it failed on {device.name}: {failure}")
    out.finish(calibration=found.as_dict(), noise_floor=found.noise_floor, applied=found.helps)
    return 0


def describe(found: calibration.Calibration) -> str:
    """Say in lines how far the table can be trusted."""
    fitted = sum(not network.held_out for network in found.networks)
    rows = "; every row drawn towards the networks" if found.shapes is not None else ""
    return (
        f"table against {len(found.networks)} whole networks, {fitted} to fit a correction and "
        f"{found.after.networks} held out to judge it:\n"
        f"  as it was  {found.before}\n"
        f"  corrected  {found.after}\n"
        f"  noise floor {100 * found.noise_floor:.1f} % (test against retest of the networks); "
        f"measured = {found.scale:.3f} * table {found.base_ms:+.4f} ms{rows}"
    )


def write_networks(table: Path, found: calibration.Calibration) -> tuple[Path, Path]:
    """Write TABLE.calibration.csv, a row per network, and TABLE.calibration.html, the plot."""
    csv, page = table.with_suffix(".calibration.csv"), table.with_suffix(".calibration.html")
    lines = ["blocks,predicted_ms,corrected_ms,latency_ms,low_ms,high_ms,held_out"]
    before, after = [], []
    for network in found.networks:
        blocks, timing = " ".join(network.architecture.blocks), network.measured
        numbers = (
            network.predicted_ms,
            network.corrected_ms,
            timing.latency_ms,
            timing.low_ms,
            timing.high_ms,
        )
        lines.append(
            ",".join([blocks, *(f"{ms:.6g}" for ms in numbers), str(network.held_out).lower()])
        )
        if network.held_out:
            before.append(Point(blocks, network.predicted_ms, timing.latency_ms))
            after.append(Point(blocks, network.corrected_ms, timing.latency_ms))
    atomic_write(csv, "\n".join(lines) + "\n")
    write_scatter(
        page,
        {f"sum of blocks: {found.before}": before, f"corrected: {found.after}": after},
        title=f"{table.name}: {len(after)} held-out networks, measured against predicted",
        noise_floor=found.noise_floor,
    )
    return csv, page
