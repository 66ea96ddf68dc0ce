"""The stages of a run: fp32, then one per compression method; each is kept only if it is no slower
and accurate enough.

Decisions look at validation images; the test images are read once all are made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fbnas.commands.compress import (
    INT8,
    DeviceMeasure,
    build_method,
    compress_and_save,
    form_of,
    method_names,
    packed_file,
    quantization_of,
    told_quantization,
    trained_int8,
    warn_of_bits,
)
from fbnas.commands.int8 import noun_of, quantized, record_of
from fbnas.commands.teachers import Sources
from fbnas.compression import (
    FORM_FILE,
    Converted,
    LatencyNotReachedError,
    LatencyPruning,
    calibration_images,
)
from fbnas.compression.packing import PACKED_FILE
from fbnas.compression.paying import Mixable
from fbnas.errors import InputError
from fbnas.export import accuracy_of_file, export_file
from fbnas.files import read_json, write_json
from fbnas.latency.devices import Device, allowed_ratio
from fbnas.latency.profiling import AnyDevice
from fbnas.latency.timing import Timing
from fbnas.space import Count, count, load_network
from fbnas.training.data import Data, Subset, batches

PARITY_IMAGES = 64
PRUNINGS = ("channel_pruning", "latency_pruning")  # the first of them is the stage `pruned`


@dataclass
class Stage:
    """A model file and what is known of it; `network` is its folder within the run.

    `precision` is that of the file, fp32 or int8, whatever the device's.
    """

    name: str
    path: Path
    network: str
    params: int
    macs: int
    validation_accuracy: float
    precision: str = "fp32"
    accepted: bool = True
    reason: str = ""
    timing: Timing | None = None
    accuracy_top1: float = 0.0
    note: str = ""  # on how it was made
    kept: str = ""  # what is told of its accuracy where it is accepted

    def as_dict(self, folder: Path) -> dict[str, Any]:
        """Return the stage as in result.json."""
        packed = folder / self.network / PACKED_FILE
        return {
            "name": self.name,
            "file": str(self.path.relative_to(folder)),
            "network": self.network,
            "precision": self.precision,
            "accuracy_top1": self.accuracy_top1,
            "validation_accuracy": self.validation_accuracy,
            "latency_ms": self.timing.as_dict() if self.timing else None,
            "model_bytes": self.path.stat().st_size,
            "params": self.params,
            "macs": self.macs,
            "accepted": self.accepted,
            "reason": self.reason,
            **({"packed_bytes": packed.stat().st_size} if packed.is_file() else {}),
        }


def stages_of(
    config: dict[str, Any], folder: Path, data: Data, device: AnyDevice, *, resume: bool
) -> list[Stage]:
    """Build every stage on the best one before it, and decide which are kept."""
    judge = Judge(config, folder, data, device)
    fp32 = _exported("fp32", "train", folder, data, device)
    fp32.reason = "the trained network, always a candidate"
    stages = [fp32]

    best = fp32
    asked = config["compression"]["methods"]
    for name in method_names(asked) if asked else ():
        stage = (
            _quantized(judge, best, fp32)
            if name == INT8
            else _compressed(name, best, judge, trained=fp32, resume=resume)
        )
        if stage is not None:
            judge.decide(stage, best=best, trained=fp32)
            stages.append(stage)
            best = stage if stage.accepted else best

    for stage in stages:  # all decisions are made: the first and only look at the test images
        stage.accuracy_top1 = _accuracy(stage.path, data, data.test, device)
    return stages


def _compressed(
    name: str, best: Stage, run: "Judge", *, trained: Stage, resume: bool
) -> Stage | None:
    """Apply a method to the network of the best stage, and export what comes of it.

    None where pruning does not make the device faster: that is told, and hours of search and
    training are not lost for it.
    """
    stage = stage_name(name, run.config["compression"]["methods"])
    if not (run.folder / stage / "network.yaml").is_file():
        network, card = load_network(run.folder / best.network)
        method, folder = build_method(name, run.config, run.device), run.folder / stage
        if isinstance(method, LatencyPruning):
            method = replace(method, strict=False)
        timing = DeviceMeasure(run.device, card.input_shape, folder, run.config["seed"])
        try:
            report = compress_and_save(
                network,
                card,
                run.data,
                run.config,
                folder,
                methods=[method],
                resume=resume,
                measure=timing if method.MEASURES else None,
                sources=Sources(run.folder / "search", load_network(run.folder / "train")[0]),
            )
        except LatencyNotReachedError as error:
            print(f"{name} is left out: {error}")
            return None
        packed_file(run.config, folder, network, report)
    if form_of(run.folder / stage, run.device) is not None:
        return _as_trained(stage, run, trained)
    if (run.folder / stage / FORM_FILE).exists():
        print(
            f"{name}: the file of {run.device.runtime} is fp32, with the weights that were trained "
            "for int8; the method int8 after it lets the runtime's own converter quantize them"
        )
    return _exported(stage, stage, run.folder, run.data, run.device)


def _as_trained(name: str, run: "Judge", trained: Stage) -> Stage:
    """Write the int8 file of a network that was trained for it; layers that lose stay in float."""
    network, card = load_network(run.folder / name)
    by = trained_int8(run.folder / name, network, card)
    assert by is not None
    warn_of_bits(by.form, run.device)
    as_float = _exported(f"{name}_in_float", name, run.folder, run.data, run.device)
    path = run.folder / "models" / f"{name}{run.device.suffix}"
    note, _ = _mixed(run, as_float, path, trained, by=by)
    as_float.path.unlink()
    accuracy = _accuracy(path, run.data, run.data.validation, run.device)
    return replace(
        as_float, name=name, path=path, precision=INT8, validation_accuracy=accuracy, note=note
    )


def stage_name(method: str, methods: Sequence[str]) -> str:
    """Return the name of a method's stage: that of the method, but for the first pruning."""
    first = next((name for name in methods if name in PRUNINGS), None)
    return "pruned" if method == first else method


@dataclass(frozen=True)
class Judge:
    """Accepts or rejects a stage against the best one before it."""

    config: dict[str, Any]
    folder: Path
    data: Data
    device: AnyDevice

    def decide(self, stage: Stage, *, best: Stage, trained: Stage) -> None:
        """Reject a stage that is slower than the noise allows, or too inaccurate."""
        record = self.folder / "models" / f"{stage.name}.decision.json"
        if not record.is_file():
            ratio, noise_floor = self._ratio(stage, best)
            write_json(record, {"ratio": ratio, "noise_floor": noise_floor})
        found = read_json(record)
        ratio, noise_floor = found["ratio"], found["noise_floor"]
        drop = trained.validation_accuracy - stage.validation_accuracy
        allowed = self.config["max_accuracy_drop"]
        speed = f"{1 / ratio:.2f} times as fast as {best.name}"
        noise = f"noise {100 * noise_floor:.1f} %"
        if drop > allowed:
            stage.accepted = False
            stage.reason = f"rejected: validation accuracy falls by {drop:.4f}, allowed {allowed:g}"
        elif ratio > allowed_ratio(noise_floor):
            stage.accepted = False
            stage.reason = f"rejected: slower, {speed} ({noise})"
        else:
            stage.kept = f", validation accuracy {0.0 - drop:+.4f}"
            stage.reason = f"accepted: {speed} ({noise}){stage.kept}"
        stage.reason += stage.note

    def _ratio(self, stage: Stage, best: Stage) -> tuple[float, float]:
        measurement = self.device.measure_quietly(
            [best.path, stage.path],
            f"Timing {stage.name} against {best.name}",
            seed=self.config["seed"],
        )
        before, after = measurement.whole
        return after.latency_ms / before.latency_ms, measurement.noise_floor


def final_measurement(stages: Sequence[Stage], device: AnyDevice, *, seed: int) -> float:
    """Time all stages against each other once more, for the table; return the noise floor.

    An accepted stage that this measurement finds slower than one accepted before it is rejected
    after all: its decision was made on another measurement, and stages that each were as fast as
    the one before within the noise may not be so together. What the reasons of accepted stages
    tell of speed is what this measurement found, as the table does.
    """
    files = [stage.path for stage in stages]
    measurement = device.measure_quietly(files, "Timing all stages", seed=seed + 1)
    fastest, least_ms = "", math.inf  # of those accepted so far
    for stage, timing in zip(stages, measurement.whole, strict=True):
        stage.timing, ms = timing, timing.latency_ms
        if not stage.accepted:
            continue
        speed = f"{least_ms / ms:.2f} times as fast as {fastest}"
        noise = f"(noise {100 * measurement.noise_floor:.1f} %)"
        if ms > least_ms * allowed_ratio(measurement.noise_floor):
            stage.accepted = False
            stage.reason = (
                f"rejected: slower when all stages were timed together, {speed} {noise}{stage.note}"
            )
            continue
        if fastest:
            stage.reason = f"accepted: {speed} {noise}{stage.kept}{stage.note}"
        if ms < least_ms:
            fastest, least_ms = stage.name, ms
    return measurement.noise_floor


def _exported(name: str, source: str, folder: Path, data: Data, device: AnyDevice) -> Stage:
    """Write a network as the device's runtime executes it, in fp32, checked on real images."""
    network, card = load_network(folder / source)
    path = folder / "models" / f"{name}{device.suffix}"
    shown = Subset(data.validation, torch.arange(min(PARITY_IMAGES, len(data.validation))))
    images = torch.cat([x for x, _ in batches(shown, PARITY_IMAGES, mean=card.mean, std=card.std)])
    fp32 = replace(device, precision="fp32")
    export_file(network, path, fp32, card=card, images=images.contiguous())
    found: Count = count(network, card.input_shape)
    accuracy = _accuracy(path, data, data.validation, device)
    return Stage(name, path, source, found.params, found.macs, accuracy)


def _quantized(run: "Judge", best: Stage, trained: Stage) -> Stage | None:
    """Write the int8 form of a stage, with ranges from training images; None where there is none.

    ONNX files are quantized as `compression.quantization` says, others by their own converter;
    layers (there whole blocks) that int8 makes slower or too inaccurate are left in float.
    """
    if form_of(run.folder / best.network, run.device) is not None:
        print(f"int8 is left out: the file of {best.name} is int8 already")
        return None
    path = run.folder / "models" / f"{INT8}{run.device.suffix}"
    stage = Stage(INT8, path, best.network, best.params, best.macs, 0.0, precision=INT8)
    try:
        int8 = replace(run.device, precision="int8")
        if run.device.suffix == ".onnx":
            stage.note, _ = _mixed(run, best, path, trained)
        else:
            network, card = load_network(run.folder / best.network)
            method = quantization_of(run.config)
            images = calibration_images(run.data, method, seed=run.config["seed"])
            assert isinstance(int8, Device)  # a planned one reads ONNX files
            by = Converted(network, card.input_shape, int8, images)
            try:
                weights = run.folder / best.network / "weights.safetensors"
                stage.note, left = _mixed(run, best, path, trained, by=by, made_from=weights)
            except InputError as error:
                print(f"No block of int8 is left in float: {error}")
                left = ()
            export_file(network, path, int8, card=card, calibration=images, float_layers=left)
        stage.validation_accuracy = _accuracy(path, run.data, run.data.validation, int8)
    except InputError as error:
        print(f"int8 is left out: {error}")
        return None
    return stage


def _mixed(
    run: "Judge",
    as_float: Stage,
    path: Path,
    trained: Stage,
    *,
    by: Mixable | None = None,
    made_from: Path | None = None,
) -> tuple[str, tuple[str, ...]]:
    """Write the int8 file, with layers in float where that is better; say how many, and which.

    Args:
        trained: validation accuracy may fall below its by the run's max_accuracy_drop.
        by, made_from: as of `quantized`.
    """
    if by is None:
        method = told_quantization(run.config, run.device)
    else:
        method = quantization_of(run.config)
    if method.max_accuracy_drop is None:
        least = trained.validation_accuracy - run.config["max_accuracy_drop"]
        allowed = as_float.validation_accuracy - least
        method = replace(method, max_accuracy_drop=min(max(allowed, 0.0), 1.0))
    found = quantized(
        as_float.path,
        path,
        run.data,
        method,
        measured_on=run.device,
        scored_on=replace(run.device, precision=INT8),
        seed=run.config["seed"],
        by=by,
        made_from=made_from,
        record=record_of(path.stem),
    )
    left = tuple(dict.fromkeys((*found["float_for_accuracy"], *found["float_for_speed"])))
    noun = noun_of(path.suffix)
    return (f", {len(left)} of {found['layers']} {noun} in float" if left else ""), left


def _accuracy(path: Path, data: Data, images: Any, device: AnyDevice) -> float:
    return accuracy_of_file(path, images, mean=data.mean, std=data.std, device=device)


def print_stages(stages: Sequence[Stage]) -> None:
    """Print a row per stage, and below why each was accepted or rejected."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for name in ("accuracy", "ms", "from", "to", "kB", "params", "M macs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for stage in stages:
        assert stage.timing is not None
        table.add_row(
            stage.name,
            f"{stage.accuracy_top1:.4f}",
            *(
                f"{ms:.4g}"
                for ms in (stage.timing.latency_ms, stage.timing.low_ms, stage.timing.high_ms)
            ),
            f"{stage.path.stat().st_size / 1024:.0f}",
            f"{stage.params:,}",
            f"{stage.macs / 1e6:.2f}",
            "accepted" if stage.accepted else "rejected",
        )
    Console(width=None if Console().is_terminal else 100).print(table)
    for stage in stages:
        print(f"{stage.name}: {stage.reason}")
