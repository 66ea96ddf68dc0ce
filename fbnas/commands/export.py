"""fbnas export: a network as a file that a device runs."""

from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import network_folder
from fbnas.errors import unknown
from fbnas.export import export_onnx
from fbnas.space import count, load_network

FORMATS = ("onnx",)


def main(config: dict[str, Any]) -> int:
    if config["format"] not in FORMATS:
        raise unknown("format", config["format"], FORMATS)
    network, card = load_network(network_folder(config["model"]))
    out = OutFolder(config)
    report = export_onnx(network, out.folder / "model.onnx", card=card)
    found = count(network, card.input_shape)
    print(
        f"{report.path}: {report.bytes:,} bytes, batch size free, input 'images', output 'scores'"
    )
    print(
        f"parity with torch: largest difference {report.max_error:.1e} of the largest score, same "
        f"class for {100 * report.argmax_agreement:.1f} % of images"
    )
    out.finish(
        format=config["format"],
        model_bytes=report.bytes,
        parity_max_error=report.max_error,
        parity_argmax_agreement=report.argmax_agreement,
        params=found.params,
        macs=found.macs,
        architecture=list(card.architecture.blocks),
    )
    return 0
