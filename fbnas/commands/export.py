"""fbnas export: a network as files that devices run, each checked, judged and timed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.commands.compress import form_of
from fbnas.commands.folder import OutFolder
from fbnas.commands.heads import export_joined
from fbnas.commands.parts import check_class_names, data_for, network_folder
from fbnas.compression import FORM_FILE, calibration_images, load_any
from fbnas.errors import InputError
from fbnas.export import (
    FORMATS,
    ExportReport,
    Format,
    ParityError,
    accuracy_of_file,
    check_precision,
    export_file,
    export_int8_onnx,
    format_of,
    write_example,
)
from fbnas.export.formats import ALL, PRECISIONS
from fbnas.latency.converting import lacking, needed
from fbnas.latency.devices import ROUNDS, Device
from fbnas.latency.lowering import OPSETS
from fbnas.latency.model_files import parts
from fbnas.latency.runtimes import runtime
from fbnas.latency.timing import Timing
from fbnas.space import NetworkCard, count
from fbnas.training.data import Data, Subset, batches
from fbnas.training.evaluation import evaluate

PARITY_IMAGES = 256  # of the validation images, drawn by the seed
ONE_IMAGE = (".tflite", ".pte", ".pt2")  # at a time; others take any batch
INT8_NEEDS = (
    "takes its ranges from training images; expected data=... as the network was trained on"
)


@dataclass(frozen=True)
class Made:
    """A file that was asked for: what came of it, or why there is none."""

    format: Format
    precision: str
    device: Device | None = None
    report: ExportReport | None = None
    accuracy: float | None = None
    timing: Timing | None = None
    noise_floor: float | None = None
    left_out: str | None = None
    disagrees: bool = False

    def fields(self) -> dict[str, Any]:
        """Return what result.json says of it."""
        found: dict[str, Any] = {
            "format": self.format.name,
            "precision": self.precision,
            "runtime": self.format.runtime,
            "left_out": self.left_out,
        }
        if self.report is not None:
            found |= {
                "file": self.report.path.name,
                "bytes": self.report.bytes,
                "parity_max_error": self.report.max_error,
                "parity_argmax_agreement": self.report.argmax_agreement,
                "accuracy_top1": self.accuracy,
                "latency_ms": self.timing and self.timing.as_dict(),
                "noise_floor": self.noise_floor,
            }
        return {key: value for key, value in found.items() if value is not None}


def main(config: dict[str, Any]) -> int:
    wanted = files_of(config)
    check_options(config)
    if config["heads"]:
        return export_joined(config)
    source = network_folder(_model(config))
    network, card = load_any(source)
    data = _data(config, card, wanted)
    out = OutFolder(config)
    job = Job(
        config,
        source,
        out.folder,
        wanted,
        network,
        card,
        data,
        images=None if data is None else parity_images(data, card, config["seed"]),
        calibration=[] if data is None else calibration_images(data, seed=config["seed"]),
    )
    found = [job.made(each, precision) for each, precision in wanted]
    _write_examples(found, card, out.folder)
    found = [job.judged(each) for each in found]
    if config["measure"]:
        found = timed(found, config)
    accuracy = None
    if data is not None:
        accuracy = evaluate(network, data.test, mean=card.mean, std=card.std)[1]
    print_files(found, accuracy)
    out.finish(**_result(config, network, card, found), accuracy_top1_network=accuracy)
    if any(each.disagrees for each in found):
        return 1
    missing = [each for each in found if each.left_out is not None]
    if missing and ALL not in _listed(config["format"]):
        raise InputError(f"{missing[0].format.name}, {missing[0].precision}: {missing[0].left_out}")
    return 0


def _model(config: dict[str, Any]) -> str:
    if config["model"] is None:
        raise InputError(
            "fbnas export needs model=...; the folder of a trained or pruned network, or of a run."
        )
    return str(config["model"])


def files_of(config: dict[str, Any]) -> list[tuple[Format, str]]:
    """Return the formats and precisions that are asked for; of `format=all` also impossible ones.

    Raises:
        InputError: an unknown one, or a precision that a format is not written in.
    """
    names, precisions = _listed(config["format"]), _listed(config["precision"])
    everything = ALL in names
    if not names or (everything and len(names) > 1):
        raise InputError(f"format={config['format']}; expected one, a list of them, or {ALL}.")
    formats = list(FORMATS.values()) if everything else [format_of(name) for name in names]
    precisions = precisions or list(PRECISIONS if everything else PRECISIONS[:1])
    wanted = [(each, precision) for each in formats for precision in precisions]
    for each, precision in wanted:
        if not everything or precision not in PRECISIONS:
            check_precision(each, precision)
    return list(dict.fromkeys(wanted))


def _listed(given: Any) -> list[str]:
    if given is None:
        return []
    return [str(name) for name in given] if isinstance(given, list) else [str(given)]


def check_options(config: dict[str, Any]) -> None:
    """Refuse values that no file can be written with.

    Raises:
        InputError: the opset or the agreement is out of range.
    """
    if config["opset"] not in OPSETS:
        raise InputError(f"opset={config['opset']}; expected {OPSETS[0]} to {OPSETS[-1]}.")
    if not 0 <= config["agreement"] <= 1:
        raise InputError(f"agreement={config['agreement']}; expected a fraction of images, 0 to 1.")


def _data(
    config: dict[str, Any], card: NetworkCard, wanted: Sequence[tuple[Format, str]]
) -> Data | None:
    """The data that the network was trained on; None where none is given.

    Raises:
        InputError: that of other classes, or none where nothing but int8 is asked for, of a network
            that was not trained for it.
    """
    if config.get("data"):
        data = data_for(config, card.space)
        check_class_names(data, card.class_names)
        return data
    source = network_folder(config["model"])
    if not (source / FORM_FILE).is_file() and all(x == "int8" for _, x in wanted):
        raise InputError(f"precision=int8 {INT8_NEEDS}")
    return None


@dataclass(frozen=True)
class Job:
    """What the files of one command are made of and checked by.

    source: folder of the network; folder: of the files.
    images: (n, c, h, w) float, normalised, of the validation images; None where no data is given.
    calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges; of training images.
    """

    config: dict[str, Any]
    source: Path
    folder: Path
    wanted: list[tuple[Format, str]]
    network: nn.Module
    card: NetworkCard
    data: Data | None
    images: Tensor | None
    calibration: Sequence[np.ndarray]

    @property
    def alone(self) -> bool:
        return len(self.wanted) == 1

    def path(self, each: Format, precision: str) -> Path:
        """Return the file's: model.onnx, or model_fp16.onnx among several precisions."""
        several = len({precision for _, precision in self.wanted}) > 1
        return self.folder / f"model{f'_{precision}' if several else ''}{each.suffix}"

    def made(self, each: Format, precision: str) -> Made:
        """Write a file and check it; one that cannot be made, or disagrees, is told of.

        Raises:
            InputError: it cannot be made, and it is the only one asked for.
        """
        found = Made(each, precision)
        try:
            if precision not in each.precisions:
                kept = " and ".join(each.precisions)
                raise InputError(f"its converter writes {kept} alone")
            device = device_for(each, precision, self.config, alone=self.alone)
            report = self._exported(self.path(each, precision), device, precision)
        except ParityError as error:
            print(error)
            return replace(found, left_out=f"deleted: {error}", disagrees=True)
        except InputError as error:
            words = str(error).replace("device.", "")  # options of ours, where a device has them
            if self.alone:
                raise InputError(words) from error
            return replace(found, left_out=words)
        batch = "one image at a time" if each.suffix in ONE_IMAGE else "batch size free"
        files = " and ".join(map(str, parts(report.path)))
        print(f"{files}: {report.bytes:,} bytes, {precision} for {each.runtime}, {batch}")
        print(_parity(report, each.runtime, self.images))
        return replace(found, device=device, report=report)

    def _exported(self, path: Path, device: Device, precision: str) -> ExportReport:
        form = form_of(self.source, device) if precision == "int8" else None
        if form is not None:
            return export_int8_onnx(self.network, form, path, card=self.card, images=self.images)
        if precision == "int8" and not self.calibration:
            raise InputError(f"int8 {INT8_NEEDS}")
        return export_file(
            self.network,
            path,
            device,
            card=self.card,
            images=self.images,
            calibration=self.calibration,
            precision=precision,
            opset=self.config["opset"],
            least_agreement=self.config["agreement"],
        )

    def judged(self, found: Made) -> Made:
        """Add the accuracy of the file itself, on the test images, where its runtime is."""
        if found.report is None or found.device is None or self.data is None:
            return found
        if found.report.max_error is None:
            return found
        accuracy = accuracy_of_file(
            found.report.path,
            self.data.test,
            mean=self.card.mean,
            std=self.card.std,
            device=found.device,
        )
        return replace(found, accuracy=accuracy)


def device_for(each: Format, precision: str, config: dict[str, Any], *, alone: bool) -> Device:
    """Return this machine with the format's runtime, in this interpreter or the one that has it.

    That is `python`, or the one which the variable FBNAS_LITERT_PYTHON (and so on) names, for a
    runtime or converter that is not installed here.
    """
    name, file = each.runtime, runtime(each.runtime)
    kept = "int8" if precision == "int8" else "fp32"  # a device has no fp16: see export_file
    python, converter = config["python"], config["converter"]
    here = file.available() and not lacking(needed(file, kept))
    if here and not alone:
        python = converter = None
    elif not here and python is None and converter is None:
        python = os.environ.get(f"FBNAS_{name.upper()}_PYTHON")
    return Device(
        runtime=name,
        precision=kept,
        provider="compiled" if (name, kept) == ("pytorch", "int8") else "",
        threads=config["threads"],
        python=python,
        converter=converter,
    )


def parity_images(data: Data, card: NetworkCard, seed: int) -> Tensor:
    """Return some of the validation images, (n, c, h, w) float, normalised."""
    order = torch.randperm(len(data.validation), generator=torch.Generator().manual_seed(seed))
    chosen = Subset(data.validation, order[:PARITY_IMAGES])
    images, _ = next(batches(chosen, PARITY_IMAGES, mean=card.mean, std=card.std))
    return images


def timed(found: Sequence[Made], config: dict[str, Any]) -> list[Made]:
    """Add latencies; files of one runtime and provider are timed against each other."""
    groups: dict[Device, list[int]] = {}
    for index, each in enumerate(found):
        checked = each.report is not None and each.report.max_error is not None
        if checked and each.device is not None:
            groups.setdefault(replace(each.device, precision="fp32"), []).append(index)
    done = list(found)
    for device, indices in groups.items():
        paths = [report.path for report in (found[i].report for i in indices) if report is not None]
        measured = device.measure_quietly(
            paths,
            f"Timing files of {device.runtime}",
            rounds=config["rounds"] or ROUNDS,
            seed=config["seed"],
        )
        for index, timing in zip(indices, measured.whole, strict=True):
            done[index] = replace(done[index], timing=timing, noise_floor=measured.noise_floor)
    return done


def _write_examples(found: Sequence[Made], card: NetworkCard, folder: Path) -> None:
    for each in FORMATS.values():
        of_format = [x for x in found if x.format is each and x.report is not None]
        models = [x.report.path.name for x in of_format if x.report is not None]
        if models:
            int8 = any(x.precision == "int8" for x in of_format)
            path = write_example(folder, each.name, models, card, int8=int8)
            print(f"{path}: classifies an image: cd {folder}; python {path.name} IMAGE")


def _result(
    config: dict[str, Any], network: nn.Module, card: NetworkCard, found: Sequence[Made]
) -> dict[str, Any]:
    counted = count(network, card.input_shape)
    fields = {
        "format": config["format"],
        "params": counted.params,
        "macs": counted.macs,
        "architecture": list(card.architecture.blocks),
        "files": [each.fields() for each in found],
    }
    if len(found) > 1 or found[0].report is None:
        return fields
    only, report = found[0], found[0].report
    return {
        **fields,
        "runtime": only.format.runtime,
        "precision": only.precision,
        "model": report.path.name,
        "model_bytes": report.bytes,
        "parity_max_error": report.max_error,
        "parity_argmax_agreement": report.argmax_agreement,
        "accuracy_top1": only.accuracy,
        "latency_ms": only.timing and only.timing.as_dict(),
    }


def _parity(report: ExportReport, runtime: str, images: Tensor | None) -> str:
    if report.max_error is None or report.argmax_agreement is None:
        return (
            f"parity with torch: not checked, {runtime} cannot be run here; give python=PATH of an "
            "interpreter that has it"
        )
    shown = "images, which are noise: data=... shows it real ones"
    if images is not None:
        shown = f"{len(images)} validation images"
    return (
        f"parity with torch: largest difference {report.max_error:.1e} of the largest score, same "
        f"class for {100 * report.argmax_agreement:.1f} % of {shown}"
    )


def print_files(found: Sequence[Made], accuracy: float | None) -> None:
    """Print a row per file, and a line for each that was left out or deleted."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file", no_wrap=True)
    table.add_column("runtime", no_wrap=True)
    for name in ("precision", "bytes", "max error", "same class", "accuracy", "ms", "from", "to"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        if each.report is None:
            continue
        report = each.report
        table.add_row(
            report.path.name,
            each.format.runtime,
            each.precision,
            f"{report.bytes:,}",
            _shown(report.max_error, ".1e"),
            _shown(report.argmax_agreement, ".1%"),
            _shown(each.accuracy, ".4f"),
            *_milliseconds(each.timing),
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    if accuracy is not None:
        print(f"the network itself (torch): accuracy {accuracy:.4f} on the test images")
    for each in found:
        if each.left_out is not None:
            print(f"left out: {each.format.name}, {each.precision}: {each.left_out}")


def _milliseconds(timing: Timing | None) -> tuple[str, str, str]:
    if timing is None:
        return "", "", ""
    return f"{timing.latency_ms:.4g}", f"{timing.low_ms:.4g}", f"{timing.high_ms:.4g}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
