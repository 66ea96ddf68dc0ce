"""fbnas calibrate without a table: one from totals alone, and which networks to measure next."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import fbnas
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import device_of, space_of
from fbnas.errors import InputError
from fbnas.latency.agreement import Agreement, agreement
from fbnas.latency.effects import Entries, Prior, entries_of, prior_order
from fbnas.latency.measurements import (
    Measurements,
    read_measurements,
    read_networks,
    write_networks,
)
from fbnas.latency.profiling import compile_networks
from fbnas.latency.suggestion import suggest
from fbnas.latency.table import LatencyTable
from fbnas.latency.totals import Estimate, estimate, table_of
from fbnas.report.scatter import Point, write_scatter
from fbnas.space import Architecture

SOURCE = "whole networks"  # header `runtime` of a table that was never profiled
SUGGESTED = "suggested.csv"


@dataclass(frozen=True)
class Known:
    """What is known of a device; `measured` and `estimate` are both there or neither."""

    entries: Entries
    prior: Prior
    measured: Measurements | None = None
    estimate: Estimate | None = None


def main(config: dict[str, Any]) -> int:
    space, prior = space_of(config), _prior(config["prior"])
    if config["suggest"] and not config["out"]:
        raise InputError("suggest=N writes networks; expected out=DIR to write them to")
    if config["table"] and not config["measurements"]:
        raise InputError(
            "suggest=N alone reads no table; expected prior=FILE for what another table knows, or "
            "measurements=FILE to make table=FILE from"
        )
    if config["measurements"] and not config["table"] and not config["suggest"]:
        raise InputError("measurements=FILE makes a table; expected table=FILE.csv to write it to")
    known = Known(entries_of(space), prior)
    if config["measurements"]:
        measured = read_measurements(config["measurements"], space, config["column"])
        _check_table(config["table"])
        found = estimate(known.entries, measured.paths, measured.latency_ms, prior=prior)
        known = replace(known, measured=measured, estimate=found)
    among = read_networks(config["among"], space) if config["among"] else None
    out = OutFolder(config)
    result: dict[str, Any] = {}
    if known.measured is not None and known.estimate is not None:
        result |= _report(config, known.measured, known.estimate, prior)
    if config["suggest"]:
        result |= _suggested(config, out, known, among)
    out.finish(**result)
    return 0


def _prior(name: str) -> Prior:
    if name == "macs":
        return "macs"
    if name == "none":
        return "none"
    if Path(name).is_file():
        return LatencyTable.load(name)
    raise InputError(
        f"prior={name}; expected macs (multiply-adds and other sizes), none, or the latency table "
        "of another device"
    )


def _check_table(table: str | None) -> None:
    """Refuse to overwrite a table that was profiled."""
    if table and Path(table).exists() and LatencyTable.load(table).runtime != SOURCE:
        raise InputError(
            f"{table} holds a profiled table; expected another file: the totals of whole networks "
            "make a table of their own"
        )


def _report(
    config: Mapping[str, Any], measured: Measurements, known: Estimate, prior: Prior
) -> dict[str, Any]:
    """Print how well each network is predicted from all others; write the table and the plot."""
    found = agreement(known.left_out_ms, measured.latency_ms)
    noise = known.noise_ms / float(np.median(measured.latency_ms))
    print(
        f"{len(measured)} networks of space {config['space']['name']}, {measured.column} "
        f"{measured.latency_ms.min():.4g} to {measured.latency_ms.max():.4g} ms; "
        f"each predicted from all others:"
    )
    print(f"  {found}")
    print(f"  a single total scatters by {100 * noise:.1f} % (noise, and what does not add up)")
    told = prior_order(known.entries, prior)
    if told is not None:
        alone = agreement(known.entries.counts(measured.paths) @ told, measured.latency_ms)
        print(f"  the prior alone: Spearman {alone.spearman:.3f}, Kendall {alone.kendall:.3f}")
    result = {"agreement": found.as_dict(), "noise_floor": noise, "networks": len(measured)}
    if not config["table"]:
        return result
    table = table_of(known, _header(config, measured, found, noise), classes=config["classes"])
    table.save(config["table"])
    names = known.entries.space.blocks
    rows = zip(measured.paths, known.left_out_ms, measured.latency_ms, strict=True)
    points = [
        Point(" ".join(names[i] for i in path), float(left_out), float(ms))
        for path, left_out, ms in rows
    ]
    page = write_scatter(
        Path(config["table"]).with_suffix(".calibration.html"),
        {f"each network predicted from all others: {found}": points},
        title=f"{config['table']}: measured against predicted",
        noise_floor=noise,
    )
    print(f"{config['table']}: {len(table.entries)} rows; {page}")
    return {**result, "table": str(config["table"])}


def _header(
    config: Mapping[str, Any], measured: Measurements, found: Agreement, noise: float
) -> dict[str, str]:
    device = device_of(config)
    name = measured.path.name.removesuffix(".gz").removesuffix(".csv")
    return {
        "device": device.name if device.name != "local" else f"{name} {measured.column}",
        "runtime": SOURCE,
        "precision": device.precision,
        "threads": str(device.threads),
        "batch": "1",
        "protocol": (
            f"estimated from the totals of {len(measured)} whole networks, entries tied by shape, "
            f"prior {config['prior']}; the stem's row holds stem, head and classifier"
        ),
        "noise_floor": f"{noise:.4f}",
        "calibration": f"{len(measured)} networks, each predicted from all others; {found}",
        **found.header(),
        "calibration_noise_floor": f"{noise:.4f}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "space": config["space"]["name"],
        "fbnas": fbnas.__version__,
    }


def _suggested(
    config: Mapping[str, Any], out: OutFolder, known: Known, among: np.ndarray | None
) -> dict[str, Any]:
    """Write the networks worth measuring next, and their model files where asked for."""
    entries = known.entries
    if among is not None and known.measured is not None:
        done = {tuple(path) for path in known.measured.paths.tolist()}
        left = [path for path in among.tolist() if tuple(path) not in done]
        if not left:
            raise InputError(
                f"all networks of {config['among']} are measured already; expected others to "
                "suggest from: give another among=FILE, or none"
            )
        among = np.array(left, dtype=int)
    chosen = suggest(
        entries,
        config["suggest"],
        among=among,
        known=known.estimate,
        prior=known.prior,
        seed=config["seed"],
    )
    file = out.folder / SUGGESTED
    write_networks(file, entries.space, chosen, config["column"])
    print(f"{file}: {len(chosen)} networks, the most telling first; fill in {config['column']}")
    if config["models"]:
        architectures = [Architecture.from_path(entries.space, path) for path in chosen.tolist()]
        files = compile_networks(
            architectures,
            entries.space,
            device_of(config),
            out.folder,
            classes=config["classes"],
            seed=config["seed"],
        )
        print(f"{out.folder / 'models'}: {len(files)} untrained networks, in the same order")
    return {"suggested": str(file), "count": len(chosen)}
