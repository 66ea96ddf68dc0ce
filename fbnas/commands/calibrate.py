"""fbnas calibrate: a table against measured whole networks."""

from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import device_of, space_of
from fbnas.latency import calibration
from fbnas.latency.table import LatencyTable


def main(config: dict[str, Any]) -> int:
    space, device = space_of(config), device_of(config)
    table = LatencyTable.load(config["table"])
    out = OutFolder(config)
    found = calibration.calibrate(
        table,
        space,
        device,
        classes=config["classes"],
        networks=config["networks"],
        held_out=config["held_out"],
        seed=config["seed"],
    )
    print(describe(found))
    if found.helps:
        calibration.apply(table, found).save(config["table"])
        print(f"{config['table']}: the correction is in its header")
    else:
        print(
            f"{config['table']}: left as it was, the correction does not help on held-out networks"
        )
    out.finish(calibration=found.as_dict(), noise_floor=found.noise_floor, applied=found.helps)
    return 0


def describe(found: calibration.Calibration) -> str:
    """Say in lines how far the table can be trusted."""
    return (
        f"table against {len(found.networks)} whole networks: sum of blocks / measured "
        f"{found.bias_before:.3f}, Spearman {found.spearman:.3f}\n"
        f"held-out error {100 * found.error_before:.1f} % as it was, "
        f"{100 * found.error_after:.1f} % with measured = "
        f"{found.scale:.3f} * table {found.base_ms:+.4f} ms; "
        f"noise floor {100 * found.noise_floor:.1f} %"
    )
