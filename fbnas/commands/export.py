"""fbnas export: a network as a file that a device runs."""

from typing import Any

import numpy as np

from fbnas.commands.compress import form_of
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import check_class_names, data_for, network_folder
from fbnas.compression import calibration_images
from fbnas.errors import InputError
from fbnas.export import ExportReport, export_file, export_int8_onnx, runtime_of_format
from fbnas.latency.devices import Device
from fbnas.space import NetworkCard, count, load_network


def main(config: dict[str, Any]) -> int:
    runtime = runtime_of_format(config["format"])
    device = Device(
        runtime=runtime,
        precision=config["precision"],
        provider="compiled" if (runtime, config["precision"]) == ("pytorch", "int8") else "",
        python=config["python"],
        converter=config["converter"],
    )
    folder = network_folder(config["model"])
    network, card = load_network(folder)
    form = form_of(folder, device) if device.precision == "int8" else None
    calibrated = device.precision == "int8" and form is None
    shown = _calibration(config, card) if calibrated else []
    out = OutFolder(config)
    path = out.folder / f"model{device.suffix}"
    if form is not None:
        report = export_int8_onnx(network, form, path, card=card)
    else:
        report = export_file(network, path, device, card=card, calibration=shown)
    found = count(network, card.input_shape)
    batch = "batch size free" if device.suffix == ".onnx" else "one image at a time"
    print(f"{report.path}: {report.bytes:,} bytes, {device.precision} for {runtime}, {batch}")
    print(_parity(report, runtime))
    out.finish(
        format=config["format"],
        runtime=runtime,
        precision=device.precision,
        model=path.name,
        model_bytes=report.bytes,
        parity_max_error=report.max_error,
        parity_argmax_agreement=report.argmax_agreement,
        params=found.params,
        macs=found.macs,
        architecture=list(card.architecture.blocks),
    )
    return 0


def _calibration(config: dict[str, Any], card: NetworkCard) -> list[np.ndarray]:
    """Training images, from which int8 takes its ranges.

    Raises:
        InputError: no data is given, or that of other classes.
    """
    if not config.get("data"):
        raise InputError(
            "precision=int8 takes its ranges from training images; expected data=... as the "
            "network was trained on"
        )
    data = data_for(config, card.space)
    check_class_names(data, card.class_names)
    return calibration_images(data, seed=config["seed"])


def _parity(report: ExportReport, runtime: str) -> str:
    if report.max_error is None or report.argmax_agreement is None:
        return (
            f"parity with torch: not checked, {runtime} cannot be run here; give python=PATH of an "
            "interpreter that has it"
        )
    return (
        f"parity with torch: largest difference {report.max_error:.1e} of the largest score, same "
        f"class for {100 * report.argmax_agreement:.1f} % of images"
    )
