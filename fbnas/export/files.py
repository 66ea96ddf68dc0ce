"""A network as the file of any runtime, with what it takes to use it, checked against torch."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.errors import InputError, unknown
from fbnas.export.metadata import METADATA_PREFIX, metadata_of, sidecar
from fbnas.export.onnx import PARITY_IMAGES, ExportReport, compare, export_onnx
from fbnas.files import write_json
from fbnas.latency.converting import convert
from fbnas.latency.devices import Device
from fbnas.latency.lowering import quantize_onnx
from fbnas.latency.profiling import AnyDevice
from fbnas.latency.runtimes import RUNTIMES, runtime
from fbnas.space.network import NetworkCard

FORMATS = {"onnx": "onnxruntime", "tflite": "litert", "pte": "executorch", "pt2": "pytorch"}


def runtime_of_format(name: str) -> str:
    """Return the runtime whose files are meant: by its own name or by their suffix.

    Raises:
        InputError: unknown name.
    """
    wanted = name.removeprefix(".")
    if wanted in RUNTIMES:
        return wanted
    if wanted not in FORMATS:
        raise unknown("format", name, [*FORMATS, *RUNTIMES])
    return FORMATS[wanted]


def export_file(
    network: nn.Module,
    path: Path,
    device: AnyDevice,
    *,
    card: NetworkCard,
    images: Tensor | None = None,
    calibration: Sequence[np.ndarray] = (),
) -> ExportReport:
    """Write a network as the device's runtime executes it, at the device's precision.

    ONNX files take any batch and hold their metadata; others take one image at a time and have
    them in PATH.json. The file stays only if its scores agree with torch's, within the runtime's
    tolerance at fp32; an int8 file is judged by its accuracy.

    Args:
        images: (n, c, h, w) float, normalised, for the check; seeded noise where not given.
        calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges.

    Raises:
        InputError: int8 without calibration, or it cannot be converted or run here.
        RuntimeError: the file disagrees with torch; it is not kept.
    """
    if device.precision == "int8" and not calibration:
        raise InputError(
            "int8 takes its ranges from images; expected data=... with training images"
        )
    if images is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(PARITY_IMAGES, *card.input_shape, generator=generator)
    if device.suffix == ".onnx":
        return _export_onnx(network, path, device, card=card, images=images, shown=calibration)
    assert isinstance(device, Device)
    convert(
        device.runtime,
        network,
        card.input_shape,
        path,
        precision=device.precision,
        batch=1,
        calibration=calibration,
        converter=device.converter or (None if device.host else device.python),
    )
    try:
        report = _checked(network, path, device, images)
    except BaseException:
        path.unlink()
        raise
    stated = {"runtime": device.runtime, "precision": device.precision, "batch": 1}
    content = {key: json.loads(value) for key, value in metadata_of(card).items()}
    named = {key.removeprefix(METADATA_PREFIX): value for key, value in content.items()}
    write_json(sidecar(path), {**named, **stated})
    return report


def _export_onnx(
    network: nn.Module,
    path: Path,
    device: AnyDevice,
    *,
    card: NetworkCard,
    images: Tensor,
    shown: Sequence[np.ndarray],
) -> ExportReport:
    if device.precision == "fp32":
        return export_onnx(network, path, card=card, images=images)
    source = path.with_name(f".{path.name}.fp32")
    try:
        export_onnx(network, source, card=card, images=images)
        quantize_onnx(source, path, shown)
    finally:
        source.unlink(missing_ok=True)
    error, agreement = compare(_scores_of(network, images), device.scores(path, images.numpy()))
    return ExportReport(path, path.stat().st_size, error, agreement)


def _checked(network: nn.Module, path: Path, device: Device, images: Tensor) -> ExportReport:
    """Run the file where its runtime is; without one here the numbers stay unknown.

    Raises:
        RuntimeError: it disagrees with torch.
    """
    size = path.stat().st_size
    if not (device.host or device.python or runtime(device.runtime).available()):
        return ExportReport(path, size, None, None)
    expected, found = _scores_of(network, images), device.scores(path, images.numpy())
    error, agreement = compare(expected, found)
    difference = float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))
    tolerance = runtime(device.runtime).TOLERANCE[device.precision]
    if device.precision == "fp32" and not difference <= tolerance:  # a NaN is no agreement
        raise RuntimeError(
            f"{path} was not kept: its scores differ from torch's by {difference:.1e} (relative "
            f"RMS, tolerance {tolerance:.0e}) over {len(images)} images; an operation of the "
            f"network is converted wrongly for {device.runtime}."
        )
    return ExportReport(path, size, error, agreement)


def _scores_of(network: nn.Module, images: Tensor) -> np.ndarray:
    reference = copy.deepcopy(network).cpu().float().eval()
    with torch.no_grad():
        found: np.ndarray = reference(images.cpu().float()).numpy()
    return found


def check_suffix(model: Path, device: AnyDevice) -> None:
    """Refuse a file that is for another runtime.

    Raises:
        InputError: the runtimes that it is for are named.
    """
    if model.suffix == device.suffix:
        return
    fitting = [name for name in RUNTIMES if model.suffix == runtime(name).SUFFIX]
    if not fitting:
        known = ", ".join(sorted({runtime(name).SUFFIX for name in RUNTIMES}))
        raise InputError(
            f"{model}: no runtime is known for {model.suffix or 'it'}; expected {known}"
        )
    raise InputError(
        f"{model} is for {' or '.join(fitting)}, the device runs {device.runtime} "
        f"({device.suffix}); expected device.runtime={fitting[0]}, or a file for {device.runtime} "
        f"(fbnas export format={device.runtime})"
    )
