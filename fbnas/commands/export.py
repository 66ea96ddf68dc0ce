"""fbnas export: a network as files that devices run, each checked, judged and timed."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.commands.compress import SEVEN_BITS, form_of, warn_of_bits
from fbnas.commands.folder import OutFolder
from fbnas.commands.heads import data_of_network, joined, with_data
from fbnas.commands.int8 import RECORD, KnownLayers, record_of
from fbnas.commands.parts import network_folder
from fbnas.compression import FORM_FILE, calibration_images, load_any
from fbnas.errors import InputError
from fbnas.export import (
    FORMATS,
    ExportReport,
    Format,
    ParityError,
    check_precision,
    export_file,
    format_of,
    judge_file,
    write_example,
)
from fbnas.export.formats import ALL, PRECISIONS, THROUGH_ONNX
from fbnas.latency.converting import lacking, needed
from fbnas.latency.devices import ROUNDS, Device
from fbnas.latency.fake_quantization import QuantizedForm
from fbnas.latency.lowering import OPSETS
from fbnas.latency.model_files import parts
from fbnas.latency.runtimes import runtime
from fbnas.latency.saturation import saturates
from fbnas.latency.timing import Timing
from fbnas.space import Network, NetworkCard, count
from fbnas.space.heads import only_head
from fbnas.training.data import Data, Subset, batches
from fbnas.training.heads import Accuracy, judge_network

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
    accuracy: Accuracy | None = None
    separate: tuple[Path, ...] = ()  # a file for each of several heads
    timing: Timing | None = None
    separate_ms: float | None = None  # of these, one after the other
    noise_floor: float | None = None
    left_out: str | None = None
    disagrees: bool = False

    @property
    def accuracy_top1(self) -> float | None:
        """Of all test images."""
        return None if self.accuracy is None else self.accuracy.all

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
                "accuracy_top1": self.accuracy_top1,
                "latency_ms": self.timing and self.timing.as_dict(),
                "noise_floor": self.noise_floor,
                "separate_latency_ms": self.separate_ms,
                **self._of_heads(),
            }
        return {key: value for key, value in found.items() if value is not None}

    def _of_heads(self) -> dict[str, Any]:
        if self.report is None or not self.report.heads:
            return {}
        errors, agreements = (
            {name: found[place] for name, found in self.report.heads.items()} for place in (0, 1)
        )
        return {
            "accuracy_by_head": self.accuracy and self.accuracy.heads,
            "parity_max_error_by_head": errors,
            "parity_argmax_agreement_by_head": agreements,
        }

    def lines_of_heads(self) -> list[str]:
        """Say of each of several heads how good the file is, and what it saves."""
        lines = []
        file = "" if self.report is None else self.report.path.name
        for name, (error, agreement) in ({} if self.report is None else self.report.heads).items():
            words = "" if self.accuracy is None else f"accuracy {self.accuracy.heads[name]:.4f}, "
            lines.append(
                f"{file}, {name}: {words}parity with torch {error:.1e}, same class for "
                f"{agreement:.1%}"
            )
        if self.timing is not None and self.separate_ms is not None:
            lines.append(
                f"{file}: {self.timing.latency_ms:.4g} ms for {len(self.separate)} heads, "
                f"{self.separate_ms:.4g} ms for a file of each (noise {self.noise_floor:.1%})"
            )
        return lines


def main(config: dict[str, Any]) -> int:
    wanted = files_of(config)
    check_options(config)
    source, network, card = _network(config)
    config, data = _data(config, card, wanted, source)
    out = OutFolder(config)
    job = Job(
        config,
        source,
        out.folder,
        wanted,
        network,
        card,
        data if config["judge"] else None,
        images=None if data is None else parity_images(data, card, config["seed"]),
        calibration=[] if data is None else calibration_images(data, seed=config["seed"]),
        known=known_layers(config, source, wanted),
    )
    found = [job.made(each, precision) for each, precision in wanted]
    _write_examples(found, card, out.folder)
    found = [job.judged(each) for each in found]
    if config["measure"]:
        with tempfile.TemporaryDirectory(dir=out.folder) as place:
            found = timed([job.with_separate(each, Path(place)) for each in found], config)
    accuracy = None if job.data is None else judge_network(network, job.data, job.data.test)
    print_files(found, accuracy)
    out.finish(
        **_result(config, network, card, found), accuracy_top1_network=accuracy and accuracy.all
    )
    if any(each.disagrees for each in found):
        return 1
    missing = [each for each in found if each.left_out is not None]
    if missing and ALL not in _listed(config["format"]):
        raise InputError(f"{missing[0].format.name}, {missing[0].precision}: {missing[0].left_out}")
    return 0


def _network(config: dict[str, Any]) -> tuple[Path | None, Network, NetworkCard]:
    """Read the network of `model=`, or those of `heads=` as one; the former has a folder."""
    if config["model"] is not None:
        source = network_folder(str(config["model"]))
        return source, *load_any(source)
    if config["heads"]:
        if config.get("data"):
            raise InputError(
                "data= is of one data set, and each folder of heads= knows its own; expected one "
                "of the two."
            )
        return None, *joined(config["heads"])
    raise InputError(
        "fbnas export needs model=...; the folder of a trained or pruned network, or of a run."
    )


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


def known_layers(
    config: dict[str, Any], source: Path | None, wanted: Sequence[tuple[Format, str]]
) -> KnownLayers | None:
    """Return which layers `fbnas compress` or `run` left in float, and say what is known.

    None where no int8 file is wanted that it holds for.
    """
    if source is None or not config["float_layers"]:
        return None
    trained = (source / FORM_FILE).is_file()
    models = Path(config["model"]) / "models"
    of_training = [models / record_of(source.name)] if trained else []
    known = KnownLayers.read(source / RECORD, *of_training, models / RECORD)
    if known is None:
        return None
    # A calibrated file names the layers of its float file, one with trained grids its own.
    formats = [
        each.name
        for each, precision in wanted
        if (each.runtime, precision) == (known.runtime, "int8")
        and not (trained and each.suffix in THROUGH_ONNX and known.reduce_range is not None)
    ]
    if not formats:
        return None
    where = f"on the device that {config['model']} was made for"
    if not known.pays:
        print(f"int8 is slower than fp32 {where}; it is written all the same")
    elif known.layers:
        print(
            f"{len(known.layers)} {known.noun} of the int8 {formats[0]} file compute in float: "
            f"that is better {where} (float_layers=false for none)"
        )
    return known


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
    config: dict[str, Any],
    card: NetworkCard,
    wanted: Sequence[tuple[Format, str]],
    source: Path | None,
) -> tuple[dict[str, Any], Data | None]:
    """Return the data that the network was trained on, and before it the configuration with it.

    None where it is neither given nor recorded, or not there any more, which is told; or where
    `judge` is off, no file needs images and none are given.

    Raises:
        InputError: that of other classes, or none where nothing but int8 is asked for, and none of
            it has the grids that the network was trained on.
    """
    trained = source is not None and (source / FORM_FILE).is_file()
    ranged = [
        precision == "int8" and not (trained and each.suffix in THROUGH_ONNX)
        for each, precision in wanted
    ]
    given = config.get("data") or (config["heads"] and source is not None)
    if not (given or config["judge"] or any(ranged)):
        with contextlib.suppress(InputError):
            config = with_data(config, card, source)
        return config, None
    try:
        return data_of_network(config, card, source, needed=all(ranged))
    except InputError as error:
        if given or card.heads:
            raise
        raise InputError(f"precision=int8 {INT8_NEEDS}: {error}") from error


@dataclass(frozen=True)
class Job:
    """What the files of one command are made of and checked by.

    source: folder of the network, None of one that was joined from several; folder: of the files.
    data: by whose test images files are judged, None for by none.
    images: (n, c, h, w) float, normalised, of the validation images; None where no data is there.
    calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges; of training images.
    known: which layers int8 files of a format leave in float.
    """

    config: dict[str, Any]
    source: Path | None
    folder: Path
    wanted: list[tuple[Format, str]]
    network: Network
    card: NetworkCard
    data: Data | None
    images: Tensor | None
    calibration: Sequence[np.ndarray]
    known: KnownLayers | None = None

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
            words = str(error)
            if self.images is None and precision == "int8":  # whose steps tip scores that are alike
                words += " The images are noise: data=... shows it real ones."
            print(words)
            return replace(found, left_out=f"deleted: {words}", disagrees=True)
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
        form = self._form(device) if precision == "int8" else None
        known = self.known
        if known is not None and known.runtime != device.runtime:
            known = None
        reduce_range = self.config["reduce_range"]
        if reduce_range is None and known is not None:
            reduce_range = known.reduce_range
        if reduce_range is None:
            reduce_range = precision == "int8" and form is None and saturates(device)
            if reduce_range:
                print(f"{SEVEN_BITS}; reduce_range=false for 8")
        if form is not None:
            warn_of_bits(form, device)
        if precision == "int8" and form is None and not self.calibration:
            trained = self.source is not None and (self.source / FORM_FILE).is_file()
            why = "has no place for the grids of qat and " if trained else ""
            raise InputError(f"int8 {why}{INT8_NEEDS}")
        return export_file(
            self.network,
            path,
            device,
            card=self.card,
            images=self.images,
            calibration=self.calibration,
            form=form,
            precision=precision,
            opset=self.config["opset"],
            least_agreement=self.config["agreement"],
            float_layers=() if known is None else known.layers,
            reduce_range=reduce_range,
        )

    def _form(self, device: Device) -> QuantizedForm | None:
        return None if self.source is None else form_of(self.source, device)

    def judged(self, found: Made) -> Made:
        """Add the accuracy of the file itself, on the test images, where its runtime is."""
        if found.report is None or found.device is None or self.data is None:
            return found
        if found.report.max_error is None:
            return found
        accuracy = judge_file(found.report.path, self.data, self.data.test, device=found.device)
        return replace(found, accuracy=accuracy)

    def with_separate(self, found: Made, folder: Path) -> Made:
        """Write what an ONNX file of several heads comes in the place of: a file for each."""
        if found.report is None or found.device is None or found.format.suffix != ".onnx":
            return found
        files = []
        for number, (name, class_names) in enumerate(self.card.heads.items()):
            alone = replace(
                self,
                network=only_head(self.network, self.card.heads, name),
                card=replace(self.card, class_names=class_names, heads={}),
                config={**self.config, "agreement": 0.0},  # all heads' file agrees
            )
            files.append(folder / f"{found.precision}_{number}.onnx")
            alone._exported(files[-1], found.device, found.precision)
        return replace(found, separate=tuple(files))


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
    """Add latencies; files of one runtime and provider are timed against each other.

    Those of single heads come last; they are deleted by whoever made them.
    """
    groups: dict[Device, list[int]] = {}
    for index, each in enumerate(found):
        checked = each.report is not None and each.report.max_error is not None
        if checked and each.device is not None:
            groups.setdefault(replace(each.device, precision="fp32"), []).append(index)
    done = list(found)
    for device, indices in groups.items():
        paths = [report.path for report in (found[i].report for i in indices) if report is not None]
        separate = [path for i in indices for path in found[i].separate]
        measured = device.measure_quietly(
            [*paths, *separate],
            f"Timing files of {device.runtime}",
            rounds=config["rounds"] or ROUNDS,
            seed=config["seed"],
        )
        times = iter(measured.whole)
        for index in indices:
            done[index] = replace(done[index], timing=next(times), noise_floor=measured.noise_floor)
        for index in indices:
            alone_ms = [next(times).latency_ms for _ in done[index].separate]
            done[index] = replace(done[index], separate_ms=sum(alone_ms) if alone_ms else None)
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
        "heads": {name: list(names) for name, names in card.heads.items()} or None,
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
        "accuracy_top1": only.accuracy_top1,
        "accuracy_by_head": only.accuracy and (only.accuracy.heads or None),
        "latency_ms": only.timing and only.timing.as_dict(),
        "separate_latency_ms": only.separate_ms,
        "noise_floor": only.noise_floor,
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


def print_files(found: Sequence[Made], accuracy: Accuracy | None) -> None:
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
            _shown(each.accuracy_top1, ".4f"),
            *_milliseconds(each.timing),
        )
    Console(width=None if Console().is_terminal else 140).print(table)
    for line in (line for each in found for line in each.lines_of_heads()):
        print(line)
    if accuracy is not None:
        print(f"the network itself (torch): accuracy {accuracy} on the test images")
    for each in found:
        if each.left_out is not None:
            print(f"left out: {each.format.name}, {each.precision}: {each.left_out}")


def _milliseconds(timing: Timing | None) -> tuple[str, str, str]:
    if timing is None:
        return "", "", ""
    return f"{timing.latency_ms:.4g}", f"{timing.low_ms:.4g}", f"{timing.high_ms:.4g}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
