"""Post-training static int8 of an exported file, calibrated on training images alone."""

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fbnas.compression.equalisation import equalise_
from fbnas.compression.paying import Latencies, Measure, Mixable, paying_layers
from fbnas.compression.sensitivity import Sensitivity, fewest_float, sensitivity_of
from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.latency.devices import Device
from fbnas.latency.lowering import Scheme, layer_names, quantize_graph
from fbnas.latency.ranges import PERCENTILE, activation_ranges
from fbnas.latency.saturation import saturates
from fbnas.progress import progress
from fbnas.training.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    import onnx

    from fbnas.training.data import Data, Images

Scores = Callable[[Path, "Images"], torch.Tensor]  # a file and n images to (n, classes)


@dataclass(frozen=True)
class StaticQuantization:
    """Activations with ranges from calibration images, weights of 8 bits; QDQ form.

    Args:
        per_channel: one weight scale per output channel instead of one per tensor.
        calibration_images: how many training images are shown, in a seeded random choice.
        ranges: minmax; percentile, which cuts outliers off; entropy, which cuts off where the
            distribution changes least.
        percentile: of the values that its range encloses.
        activations: asymmetric or symmetric, as `Scheme` says.
        weights: symmetric, or asymmetric, which needs one scale per tensor.
        equalise: even out the weights of neighbouring layers first, by `equalise_`.
        reduce_range: weights in 7 bits, for x86 CPUs without VNNI, whose sums saturate at 16 bits;
            None: where ONNX Runtime on this machine is found to be so, by `saturates`.
        batch_size: calibration images per run.
        max_accuracy_drop: leave few layers in float, as `fewest_float` seeks them, that keep
            validation accuracy within it of the float file's; None: none for that.
        sensitivity: tell what int8 of each layer alone does, even where no layer has to be float.
        sensitivity_images: validation images that tell it.
        pays: leave layers in float that int8 makes slower on the device.
    """

    NAME: ClassVar[str] = "int8"

    per_channel: bool = True
    calibration_images: int = 256
    ranges: str = "minmax"
    percentile: float = PERCENTILE
    activations: str = "asymmetric"
    weights: str = "symmetric"
    equalise: bool = False
    reduce_range: bool | None = None
    batch_size: int = 32
    max_accuracy_drop: float | None = None
    sensitivity: bool = False
    sensitivity_images: int = 512
    pays: bool = True

    def __post_init__(self) -> None:
        for name in ("calibration_images", "batch_size", "sensitivity_images"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.max_accuracy_drop is not None and not 0 <= self.max_accuracy_drop <= 1:
            raise InputError(
                f"max_accuracy_drop is {self.max_accuracy_drop:g}; expected 0 to 1, or null."
            )
        self._scheme(reduce_range=False)

    @property
    def scheme(self) -> Scheme:
        """What the graph is quantized by."""
        left_open = self.reduce_range is None
        return self._scheme(saturates(Device()) if left_open else bool(self.reduce_range))

    def _scheme(self, reduce_range: bool) -> Scheme:
        return Scheme(
            per_channel=self.per_channel,
            activations=self.activations,
            weights=self.weights,
            ranges=self.ranges,
            percentile=self.percentile,
            reduce_range=reduce_range,
        )


@dataclass(frozen=True)
class Calibrated:
    """A float graph with the ranges of its activations: any of its layers can become int8.

    `model`: equalised where the method says so. `images`: how many calibrated it.
    """

    model: "onnx.ModelProto"
    ranges: dict[str, tuple[float, float]]
    scheme: Scheme
    images: int

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of what can become int8: convolutions and linear layers, in order."""
        return layer_names(self.model.graph)

    def write(self, path: Path, float_layers: Collection[str] = (), *, draft: bool = False) -> Path:
        """Write the file in which all layers but these compute in int8, and return its path.

        Args:
            draft: weights have one scale per tensor, which is written four times as fast and
                takes as long to run.
        """
        scheme = replace(self.scheme, per_channel=False) if draft else self.scheme
        graph = quantize_graph(self.model, self.ranges, scheme, float_layers=float_layers)
        atomic_write(path, graph.SerializeToString())
        return path


@dataclass(frozen=True)
class QuantizationReport:
    """The int8 file, both sizes in bytes, and how many images calibrated it.

    `layers`: of the network that could be int8. `accurate_layers`: left in float for accuracy,
    `quick_layers` for speed. `sensitivities`: where layers were ordered by them.
    `latencies`: of the float, the int8 and the mixed file, where they were measured.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    calibration_images: int
    layers: tuple[str, ...] = ()
    accurate_layers: tuple[str, ...] = ()
    quick_layers: tuple[str, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    latencies: Latencies | None = None

    @property
    def pays(self) -> bool:
        """Whether the file is at least as fast as the float one, as far as is known."""
        return self.latencies is None or self.latencies.fastest != "fp32"

    @property
    def float_layers(self) -> tuple[str, ...]:
        """All layers left in float, in the order of the network."""
        left = {*self.accurate_layers, *self.quick_layers}
        return tuple(name for name in self.layers if name in left)


def quantize_file(
    source: Path | str,
    path: Path | str,
    data: "Data",
    method: StaticQuantization | None = None,
    *,
    scores: Scores | None = None,
    measure: Measure | None = None,
    folder: Path | None = None,
    seed: int = 0,
    task: Task = CLASSIFICATION,
    by: Mixable | None = None,
) -> QuantizationReport:
    """Write the int8 form of an exported network, calibrated on images of `data.train` only.

    Layers are left in float as the method says: for accuracy, judged on validation images, then for
    speed, measured on the device. Where even so the float file is the fastest, the report says it.

    Args:
        source: an ONNX file written by `export_onnx`, or with `by` any runtime's fp32 file.
        path: where the int8 file goes; metadata of an ONNX file are carried over.
        method: how to quantize; the default settings where not given.
        scores: what a file answers; needed for `max_accuracy_drop`.
        measure: times files against each other on the device; without it none is left for speed.
        folder: for files in between; that of `path` where not given.
        seed: of the choice of calibration images.
        task: by which validation images are judged, where that is not classification.
        by: what writes int8 files of the network, as `Converted`; here, from ONNX, if not given.

    Raises:
        InputError: `sensitivity` or `max_accuracy_drop` without scores.
    """
    source, path, method = Path(source), Path(path), method or StaticQuantization()
    calibrated = by or calibrate(source, data, method, seed=seed)
    calibrated.write(path)
    report = QuantizationReport(path, source.stat().st_size, 0, calibrated.images)
    report = replace(report, layers=calibrated.layers)
    folder = folder or path.parent
    if method.sensitivity or method.max_accuracy_drop is not None:
        if scores is None:
            raise InputError(
                "sensitivity and max_accuracy_drop are judged by scores; expected scores=, what a "
                "file answers to images."
            )
        judge = _Judge(source, calibrated, data, scores, folder, task)
        report = _judged(report, judge, method, seed)
    if method.pays and measure is not None:
        quick, latencies = paying_layers(
            calibrated, source, measure, folder=folder, always_float=report.accurate_layers
        )
        report = replace(report, quick_layers=quick, latencies=latencies)
    calibrated.write(path, report.float_layers)
    return replace(report, bytes_after=path.stat().st_size)


def calibrate(
    source: Path | str, data: "Data", method: StaticQuantization | None = None, *, seed: int = 0
) -> Calibrated:
    """Read an ONNX file and the ranges of its activations on images of `data.train` only."""
    import onnx

    method = method or StaticQuantization()
    model = _named(onnx.load(source))
    if method.equalise:
        equalise_(model)
    shown = calibration_images(data, method, seed=seed)
    scheme = method.scheme
    ranges = activation_ranges(model, shown, ranges=scheme.ranges, percentile=scheme.percentile)
    return Calibrated(model, ranges, scheme, sum(len(images) for images in shown))


def sensitivity(
    source: Path | str,
    data: "Data",
    method: StaticQuantization | None = None,
    *,
    scores: Scores,
    folder: Path,
    seed: int = 0,
) -> tuple[Sensitivity, ...]:
    """Return what int8 of each layer alone does to the scores of validation images.

    Args:
        source: an ONNX file written by `export_onnx`.
        scores: what a file answers.
        folder: for files in between.
        seed: of the choice of images, for calibration and for this.
    """
    method = method or StaticQuantization()
    calibrated = calibrate(source, data, method, seed=seed)
    judge = _Judge(Path(source), calibrated, data, scores, folder)
    return judge.sensitivities(method.sensitivity_images, seed)


@dataclass(frozen=True)
class _Judge:
    """Files of a network with some layers in float, judged on validation images."""

    source: Path
    calibrated: Mixable
    data: "Data"
    scores: Scores
    folder: Path
    task: Task = CLASSIFICATION

    def accuracy(self, float_layers: Collection[str] | None = None) -> float:
        """Of all validation images, 0 to 1; of the float file itself where no layers are given."""
        shown = self.data.validation
        whole = self.scores(self.source, shown) if float_layers is None else None
        scores = self._scores(float_layers or (), shown) if whole is None else whole
        return float(self.task.metric(scores, shown.labels).double().mean())

    def sensitivities(self, images: int, seed: int) -> tuple[Sensitivity, ...]:
        from fbnas.training.data import Subset

        everything = self.data.validation
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        shown = Subset(everything, order[:images])
        labels, reference = shown.labels.numpy(), self.scores(self.source, shown).numpy()
        layers, found = self.calibrated.layers, []
        with progress("Sensitivity of layers", total=len(layers)) as advance:
            for layer in layers:
                others = [name for name in layers if name != layer]
                scores = self._scores(others, shown).numpy()
                found.append(sensitivity_of(layer, scores, reference, labels, self.task))
                advance(1)
        return tuple(found)

    def _scores(self, float_layers: Collection[str], shown: "Images") -> torch.Tensor:
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".judged.") as place:
            path = self.calibrated.write(Path(place) / f"mixed{self.source.suffix}", float_layers)
            return self.scores(path, shown)


def _judged(
    report: QuantizationReport, judge: _Judge, method: StaticQuantization, seed: int
) -> QuantizationReport:
    """Find few layers to leave in float for accuracy; none where int8 is good enough."""
    drop = method.max_accuracy_drop
    least = -1.0 if drop is None else judge.accuracy() - drop - 1e-9

    @functools.cache
    def accurate(float_layers: frozenset[str]) -> bool:
        return drop is None or judge.accuracy(float_layers) >= least

    if accurate(frozenset()) and not method.sensitivity:
        return report
    found = judge.sensitivities(method.sensitivity_images, seed)
    order = [each.layer for each in sorted(found, key=lambda each: each.sqnr_db)]
    needed = fewest_float(order, lambda layers: accurate(frozenset(layers)))
    return replace(report, accurate_layers=needed, sensitivities=found)


def _named(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Give nodes without a name, or with another's, one of their own."""
    taken = Counter(node.name for node in model.graph.node)
    for number, node in enumerate(model.graph.node):
        if not node.name or taken[node.name] > 1:
            node.name = f"{node.op_type}_{number}"
    return model


def calibration_images(
    data: "Data", method: StaticQuantization | None = None, *, seed: int = 0
) -> list[np.ndarray]:
    """Return training images, normalised: arrays (n, c, h, w) float32, in a seeded random choice.

    Args:
        method: says how many, and how many in an array.
    """
    from fbnas.training.data import Subset, batches

    method = method or StaticQuantization()
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    chosen = Subset(data.train, order[: method.calibration_images])
    shown = batches(chosen, method.batch_size, mean=data.mean, std=data.std)
    return [images.numpy() for images, _ in shown]
