"""fbnas profile: a latency table of this device."""

from pathlib import Path
from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import device_of, space_of
from fbnas.latency.profiling import ROUNDS, plan, profile


def main(config: dict[str, Any]) -> int:
    space, device = space_of(config), device_of(config)
    if config["plan"]:
        items = plan(space, config["classes"])
        for item in items:
            print(item)
        print(f"{len(items)} shapes, on {device.name} through {device.runtime}, {device.precision}")
        return 0
    table = profile(
        space,
        device,
        Path(config["table"]),
        classes=config["classes"],
        rounds=config["rounds"] or ROUNDS,
        seed=config["seed"],
    )
    out = OutFolder(config)  # only now, so that the same command continues after an interrupt
    noise = 100 * table.noise_floor
    print(
        f"{config['table']}: {len(table.entries)} rows, {device.precision}, noise floor "
        f"{noise:.1f} %"
    )
    out.finish(
        table=str(config["table"]), noise_floor=table.noise_floor, device=device.fingerprint()
    )
    return 0
