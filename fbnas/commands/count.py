"""fbnas count: parameters and multiply-adds."""

from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import space_for
from fbnas.space import Architecture, build_network, count


def main(config: dict[str, Any]) -> int:
    architecture = Architecture.load(config["architecture"])
    space = space_for(config, architecture)
    network = build_network(space, architecture, classes=config["classes"])
    out = OutFolder(config)
    side = space.resolution
    found = count(network, (space.input_channels, side, side))
    print(f"{config['architecture']}: {architecture}")
    print(f"space {space.name}, {side}x{side}, {config['classes']} classes")
    print(f"{found.params:,} parameters ({found.params / 1e6:.3f} M)")
    print(f"{found.macs:,} multiply-adds ({found.macs / 1e6:.2f} M)")
    out.finish(params=found.params, macs=found.macs, architecture=list(architecture.blocks))
    return 0
