"""fbnas profile: a latency table of this device."""

from pathlib import Path
from typing import Any

from torch import nn

from fbnas.commands.folder import OutFolder, refuse_table_inside
from fbnas.commands.parts import device_of, space_of
from fbnas.commands.targets import range_text
from fbnas.latency.profiling import (
    ROUNDS,
    AnyDevice,
    build,
    estimated_seconds,
    missing_items,
    plan,
    profile,
)
from fbnas.latency.trust import AGAIN, busy
from fbnas.space import SearchSpace


def main(config: dict[str, Any]) -> int:
    refuse_table_inside(config)
    space, device = space_of(config), device_of(config)
    rounds = config["rounds"] or ROUNDS
    if config["plan"]:
        _print_plan(config, space, device, rounds)
        return 0
    table = profile(
        space,
        device,
        Path(config["table"]),
        classes=config["classes"],
        rounds=rounds,
        seconds=config["seconds"],
        seed=config["seed"],
        context=config["context"],
    )
    out = OutFolder(config)  # only now, so that the same command continues after an interrupt
    quality = "planned, not measured"
    if device.kind != "roofline":
        noise = 100 * table.noise_floor
        disturbed = f", measured on {busy(table)}: {AGAIN}" if busy(table) else ""
        wide = int(table.header.get("unstable", 0))
        still = f"; {wide} rows still unstable" if wide else ""
        quality = f"noise floor {noise:.1f} %{still}{disturbed}"
    print(f"{config['table']}: {len(table.entries)} rows, {device.precision}, {quality}")
    failed = table.header.get("failed")
    out.finish(
        table=str(config["table"]),
        noise_floor=table.noise_floor,
        device=device.fingerprint(),
        failed=failed,
    )
    if failed:
        print(
            f"left out, because it failed on {device.name}: {failed}; take such blocks out of the "
            "space, or try another device.precision, device.runtime or device.provider"
        )
        return 2
    print(range_text(table, space, config["classes"]))
    return 0


def _print_plan(config: dict[str, Any], space: SearchSpace, device: AnyDevice, rounds: int) -> None:
    """Print every shape, whether it is to be measured, and about how long that takes."""
    table, context = Path(config["table"]), config["context"]
    known, missing = missing_items(space, device, table, config["classes"], context=context)
    held = [] if known is None else [entry.shape for entry in known.entries]
    items = [item for item in plan(space, config["classes"]) if item in held or item in missing]
    free = {item for item in items if isinstance(build(item, space), nn.Identity)}
    for item in items:
        word = "free" if item in free else "measure" if item in missing else "known"
        print(f"{word:7}  {item}")
    compiling, timing = estimated_seconds(missing, space, device, rounds)
    print(
        f"{len(items)} shapes, {len(set(missing) - free)} to measure on {device.name} through "
        f"{device.runtime}, {device.precision}: about {compiling:.0f} s to compile, "
        f"{timing:.0f} s to time in {rounds} rounds"
    )
