"""The half of fbnas calibrate that has no table: one from totals alone, and what to measure next."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fbnas
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import device_of, space_of
from fbnas.errors import InputError
from fbnas.latency.effects import Entries, Prior, entries_of, prior_order
from fbnas.latency.measurements import (
    Measurements,
    read_measurements,
    read_networks,
    write_networks,
)
from fbnas.latency.profiling import compile_networks
from fbnas.latency.scatter import Point, write_scatter
from fbnas.latency.statistics import Agreement, agreement
from fbnas.latency.suggestion import suggest
from fbnas.latency.table import LatencyTable
from fbnas.latency.totals import Estimate, estimate, table_of
from fbnas.space import Architecture

SOURCE = "whole networks"  # header `runtime` of a table that was never profiled
SUGGESTED = "suggested.csv"


def main(config: dict[str, Any]) -> int:
    space, prior = space_of(config), _prior(config["prior"])
    if config["suggest"] and not config["out"]:
        raise InputError("suggest=N writes networks; expected out=DIR to write them to")
    if config["measurements"] and not config["table"] and not config["suggest"]:
        raise InputError("measurements=FILE makes a table; expected table=FILE.csv to write it to")
    entries = entries_of(space)
    measured = None
    if config["measurements"]:
        measured = read_measurements(config["measurements"], space, config["column"])
    _check_table(config["table"] if measured else None)
    among = read_networks(config["among"], space) if config["among"] else None
    known = None
    if measured is not None:
        known = estimate(entries, measured.paths, measured.latency_ms, prior=prior)
    out = OutFolder(config)
    result: dict[str, Any] = {}
    if measured is not None and known is not None:
        result |= _report(config, measured, known, prior)
    if config["suggest"]:
        result |= _suggested(config, out, entries, among, measured, known, prior)
    out.finish(**result)
    return 0


def _prior(name: str) -> Prior:
    if name == "macs" or name == "none":
        return name
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
    page = write_scatter(
        Path(config["table"]).with_suffix(".calibration.html"),
        [
            Point(" ".join(names[i] for i in path), float(left_out), float(ms))
            for path, left_out, ms in zip(
                measured.paths, known.left_out_ms, measured.latency_ms, strict=True
            )
        ],
        title=f"{measured.column}: each network predicted from all others",
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
        "calibration": f"{len(measured)} networks, each predicted from all others: {found}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "space": config["space"]["name"],
        "fbnas": fbnas.__version__,
    }


def _suggested(
    config: Mapping[str, Any],
    out: OutFolder,
    entries: Entries,
    among: np.ndarray | None,
    measured: Measurements | None,
    known: Estimate | None,
    prior: Prior,
) -> dict[str, Any]:
    """Write the networks worth measuring next, and their model files where asked for."""
    if among is not None and measured is not None:
        done = {tuple(path) for path in measured.paths.tolist()}
        among = np.array([path for path in among.tolist() if tuple(path) not in done], dtype=int)
    chosen = suggest(
        entries, config["suggest"], among=among, known=known, prior=prior, seed=config["seed"]
    )
    file = out.folder / SUGGESTED
    write_networks(file, entries.space, chosen, config["column"])
    print(f"{file}: {len(chosen)} networks, the most telling first; fill in {config['column']}")
    if config["models"]:
        architectures = [Architecture.from_path(entries.space, path) for path in chosen.tolist()]
        torch.manual_seed(config["seed"])
        files = compile_networks(
            architectures,
            entries.space,
            device_of(config),
            out.folder / "models",
            classes=config["classes"],
        )
        print(f"{out.folder / 'models'}: {len(files)} untrained networks, in the same order")
    return {"suggested": str(file), "count": len(chosen)}
