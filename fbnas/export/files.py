"""A network as the file of any runtime, with what it takes to use it, checked against torch."""

import copy
import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.export.formats import FORMATS, THROUGH_ONNX, check_precision
from fbnas.export.ir import write_ir
from fbnas.export.metadata import METADATA_PREFIX, embed, metadata_of, sidecar
from fbnas.export.onnx import (
    PARITY_IMAGES,
    ExportReport,
    ParityError,
    compared,
    export_int8_onnx,
    export_onnx,
    halve_onnx,
)
from fbnas.files import atomic_write, write_json
from fbnas.latency import model_files
from fbnas.latency.converting import convert, in_float, layer_names
from fbnas.latency.devices import Device
from fbnas.latency.fake_quantization import QuantizedForm, as_deployed
from fbnas.latency.lowering import OPSET, Scheme, quantize_onnx
from fbnas.latency.profiling import AnyDevice
from fbnas.latency.runtimes import RUNTIMES, runtime, suffixes
from fbnas.latency.saturation import saturates
from fbnas.space.heads import Heads
from fbnas.space.network import NetworkCard
from fbnas.space.structure import rounds

FP16_TOLERANCE = 2e-2  # relative RMS: fp16 keeps 11 bits, and a network's errors add up


def export_file(
    network: nn.Module,
    path: Path,
    device: AnyDevice,
    *,
    card: NetworkCard,
    images: Tensor | None = None,
    calibration: Sequence[np.ndarray] = (),
    form: QuantizedForm | None = None,
    precision: str | None = None,
    opset: int = OPSET,
    least_agreement: float | None = None,
    float_layers: Collection[str] = (),
    reduce_range: bool | None = None,
) -> ExportReport:
    """Write a network as the device's runtime executes it, in the format of `path`'s suffix.

    ONNX files and OpenVINO's IR take any batch and hold their metadata; others take one image at a
    time and have them in PATH.json too. Of several heads an ONNX file has an output for each, other
    files one with the scores of all side by side. The file stays only if its scores agree with
    torch's: at fp32 within the runtime's tolerance, at fp16 within 2 % (relative RMS), at int8 by
    the share of images that get the same class, where `least_agreement` states one.

    Args:
        images: (n, c, h, w) float, normalised, for the check; seeded noise where not given.
        calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges.
        form: of a network that was trained for int8: an int8 ONNX file or IR has its grids, needs
            no calibration, and is compared with torch's imitation of int8, or with float_layers
            with the network itself.
        precision: fp32, fp16 or int8; the device's where not given.
        opset: version of ONNX's operators, 13 to 20.
        least_agreement: 0 to 1, of int8 files.
        float_layers: what computes in float in an int8 file: names of layers of the ONNX file for
            ONNX files and the IR, of modules for others.
        reduce_range: whether calibrated weights of ONNX files and the IR have 7 bits; None: where
            the device cuts sums of 8 bits off (`saturates`).

    Raises:
        InputError: int8 without calibration or form, a form of another network, for another
            precision or for a file that has no place for it; or it cannot be converted or run here.
        ParityError: the file disagrees with torch; it is not kept.
    """
    precision = precision or device.precision
    if form is not None and (precision != "int8" or path.suffix not in THROUGH_ONNX):
        raise InputError(
            f"{path.name} at {precision} has no place for the grids of form=; expected int8 as "
            f"{' or '.join(THROUGH_ONNX)}, or calibration= instead."
        )
    if precision == "int8" and form is None and not calibration:
        raise InputError(
            "int8 takes its ranges from images; expected data=... with training images"
        )
    if images is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(PARITY_IMAGES, *card.input_shape, generator=generator)
    shown = [] if precision == "fp32" else calibration
    if path.suffix == ".onnx" and precision == "fp32":
        return export_onnx(network, path, card=card, images=images, opset=opset)
    try:
        if path.suffix in THROUGH_ONNX:
            check_precision(FORMATS["onnx"], precision)
            _write_through_onnx(
                network,
                path,
                card,
                precision=precision,
                images=images,
                shown=shown,
                form=form,
                opset=opset,
                float_layers=float_layers,
                seven_bits=precision == "int8"
                and form is None
                and (saturates(device) if reduce_range is None else reduce_range),
            )
        else:
            assert isinstance(device, Device)
            _convert(network, path, device, card, shown=shown, float_layers=float_layers)
        return _checked(
            network if form is None or float_layers else as_deployed(network, form),
            path,
            device,
            images,
            heads=card.heads,
            precision=precision,
            least_agreement=least_agreement,
        )
    except BaseException:
        model_files.remove(path)
        sidecar(path).unlink(missing_ok=True)
        raise


def _write_through_onnx(
    network: nn.Module,
    path: Path,
    card: NetworkCard,
    *,
    precision: str,
    images: Tensor,
    shown: Sequence[np.ndarray],
    form: QuantizedForm | None,
    opset: int,
    float_layers: Collection[str],
    seven_bits: bool,
) -> None:
    """Write the fp32 ONNX file, and from it another precision, OpenVINO's IR, or both.

    int8 with the grids of a form is ONNX from the start.
    """
    written = card if path.suffix == ".onnx" else replace(card, heads={})  # the IR has one output
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        source = Path(folder) / "source.onnx"
        if form is not None:
            export_int8_onnx(
                network,
                form,
                source,
                card=written,
                images=images,
                opset=opset,
                float_layers=float_layers,
            )
        else:
            export_onnx(network, source, card=written, images=images, opset=opset)
            if precision == "int8":
                scheme = Scheme(reduce_range=seven_bits)
                quantize_onnx(source, source, shown, scheme=scheme, float_layers=float_layers)
        if path.suffix == ".xml":
            write_ir(source, path, _named(card), halve=precision == "fp16")
        elif precision == "fp16":
            halve_onnx(source, path)
        else:
            atomic_write(path, source.read_bytes())


def _convert(
    network: nn.Module,
    path: Path,
    device: Device,
    card: NetworkCard,
    *,
    shown: Sequence[np.ndarray],
    float_layers: Collection[str],
) -> None:
    """Write a file by the runtime's own converter, its metadata in it and beside it."""
    stated = {"runtime": device.runtime, "precision": device.precision, "batch": 1}
    content = {**{name: json.loads(value) for name, value in _named(card).items()}, **stated}
    convert(
        device.runtime,
        network,
        card.input_shape,
        path,
        precision=device.precision,
        batch=1,
        calibration=shown,
        converter=device.converting_python,
        text=json.dumps(content),
        float_layers=in_float(layer_names(network, card.input_shape), float_layers)
        if float_layers and device.precision == "int8"
        else (),
    )
    embed(path, content)
    write_json(sidecar(path), content)


def _named(card: NetworkCard) -> dict[str, str]:
    return {key.removeprefix(METADATA_PREFIX): text for key, text in metadata_of(card).items()}


def _checked(
    network: nn.Module,
    path: Path,
    device: AnyDevice,
    images: Tensor,
    *,
    heads: Heads,
    precision: str,
    least_agreement: float | None,
) -> ExportReport:
    """Run the file where its runtime is; without one here the numbers stay unknown.

    Raises:
        ParityError: it disagrees with torch.
    """
    if isinstance(device, Device) and not _can_run(device):
        return ExportReport(path, model_files.size_bytes(path), None, None)
    expected, found = _scores_of(network, images), device.scores(path, images.numpy())
    report = compared(path, expected, found, heads)
    difference = float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))
    if precision == "int8":
        agreement = report.argmax_agreement or 0.0
        if least_agreement is not None and agreement < least_agreement:
            raise ParityError(
                f"{path} was not kept: it gives torch's class for {100 * agreement:.1f} % of "
                f"{len(images)} images, at least {100 * least_agreement:g} % are expected."
            )
        return report
    tolerance = runtime(device.runtime).TOLERANCE["int8" if rounds(network) else "fp32"]
    if precision == "fp16":
        tolerance = max(tolerance, FP16_TOLERANCE)
    if not difference <= tolerance:  # a NaN is no agreement
        raise ParityError(
            f"{path} was not kept: its scores differ from torch's by {difference:.1e} (relative "
            f"RMS, tolerance {tolerance:.0e}) over {len(images)} images; an operation of the "
            f"network is converted wrongly for {device.runtime}."
        )
    return report


def _can_run(device: Device) -> bool:
    return bool(device.host or device.python or runtime(device.runtime).available())


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
    reads = suffixes(device.runtime) if isinstance(device, Device) else (device.suffix,)
    if model.suffix in reads:
        return
    fitting = [name for name in RUNTIMES if model.suffix in suffixes(name)]
    if not fitting:
        known = sorted({suffix for name in RUNTIMES for suffix in suffixes(name)})
        inside = sorted(model.iterdir()) if model.is_dir() else []
        files = [str(path) for path in inside if path.suffix in known]
        raise InputError(
            f"{model}: no runtime is known for {model.suffix or 'it'}; expected "
            f"{' or '.join(files) or ', '.join(known)}"
        )
    raise InputError(
        f"{model} is for {' or '.join(fitting)}, the device runs {device.runtime} "
        f"({', '.join(reads)}); expected device.runtime={fitting[0]}, or a file for "
        f"{device.runtime} (fbnas export format={device.runtime})"
    )
