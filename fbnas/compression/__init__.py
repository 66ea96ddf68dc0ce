"""Smaller and quicker networks: `compress_(model, method)`, one file per method."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fbnas.compression.converted import Converted
from fbnas.compression.equalisation import equalise_
from fbnas.compression.fixed_point import FixedPoint
from fbnas.compression.holding import held, shared, weighted
from fbnas.compression.iterative import IterativePruning, PruningStep
from fbnas.compression.latency_pruning import (
    ChannelStep,
    LatencyNotReachedError,
    LatencyOutcome,
    LatencyPruning,
)
from fbnas.compression.layer_scan import LayerScan
from fbnas.compression.lottery import LotteryTicket, Round
from fbnas.compression.low_rank import LowRank
from fbnas.compression.method import Applied, Method, Tools
from fbnas.compression.packing import (
    PackedTensor,
    describe,
    load_any,
    pack,
    read_packed,
    unpack,
    unpack_,
    write_packed,
)
from fbnas.compression.paying import Measure
from fbnas.compression.pruning import ChannelPruning, ChannelSet
from fbnas.compression.qat import FORM_FILE, QAT, Rounded
from fbnas.compression.quantization import (
    QuantizationReport,
    StaticQuantization,
    calibrate,
    calibration_images,
    quantize_file,
    sensitivity,
)
from fbnas.compression.sparsity import LayerSparsity, Sparsity
from fbnas.compression.ternary import Ternary
from fbnas.compression.weight_sharing import SharedLayer, WeightSharing, sharing_rate
from fbnas.errors import InputError
from fbnas.latency.lowering import write_onnx
from fbnas.space.network import Count, count
from fbnas.training.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    from fbnas.training.data import Data, Images

SCORED = 256  # images at once, by a file

__all__ = [
    "FORM_FILE",
    "METHODS",
    "QAT",
    "Applied",
    "ChannelPruning",
    "ChannelSet",
    "ChannelStep",
    "CompressionReport",
    "Converted",
    "Facts",
    "FixedPoint",
    "IterativePruning",
    "LatencyNotReachedError",
    "LatencyOutcome",
    "LatencyPruning",
    "LayerScan",
    "LayerSparsity",
    "LotteryTicket",
    "LowRank",
    "Method",
    "PackedTensor",
    "PruningStep",
    "QuantizationReport",
    "Round",
    "Rounded",
    "SharedLayer",
    "Sparsity",
    "StaticQuantization",
    "Step",
    "Ternary",
    "Tools",
    "WeightSharing",
    "calibrate",
    "calibration_images",
    "compress_",
    "describe",
    "equalise_",
    "facts",
    "held",
    "load_any",
    "pack",
    "quantize_file",
    "read_packed",
    "sensitivity",
    "shared",
    "sharing_rate",
    "unpack",
    "unpack_",
    "weighted",
    "write_packed",
]

METHODS: dict[str, type[Method]] = {
    method.NAME: method
    for method in (
        ChannelPruning,
        IterativePruning,
        LatencyPruning,
        Sparsity,
        LotteryTicket,
        WeightSharing,
        LowRank,
        Ternary,
        FixedPoint,
        QAT,
    )
}


@dataclass(frozen=True)
class Facts:
    """What a network is at a point of its compression.

    params, macs: by the rule of `count`. nonzero: weights of convolutions and linear layers that
    are not zero. dense_bytes: all tensors as they are. stored_bytes: packed, as `pack` writes them.
    accuracy: on the validation images, 0 to 1, None without data. latency_ms: on the device, None
    where nothing measures it.
    """

    params: int
    macs: int
    nonzero: int
    dense_bytes: int
    stored_bytes: int
    accuracy: float | None = None
    latency_ms: float | None = None

    @property
    def count(self) -> Count:
        """Parameters and multiply-adds."""
        return Count(self.params, self.macs)


@dataclass(frozen=True)
class Step:
    """A method, the network before and after it, and what was done to each part.

    Of int8 after training `before` and `after` are of the two files, and what was done is its
    QuantizationReport.
    """

    method: Method | StaticQuantization
    before: Facts
    after: Facts
    changes: tuple[Any, ...]
    trained: Any = None  # what `train` returned


@dataclass(frozen=True)
class CompressionReport:
    """A step per method, in order."""

    steps: tuple[Step, ...]

    @property
    def before(self) -> Facts:
        """The network before the first method."""
        return self.steps[0].before

    @property
    def after(self) -> Facts:
        """The network after the last method."""
        return self.steps[-1].after

    @property
    def changes(self) -> tuple[Any, ...]:
        """What the last method did to each part."""
        return self.steps[-1].changes

    @property
    def trained(self) -> Any:
        """What the training of the last method returned."""
        return self.steps[-1].trained


def compress_(
    model: nn.Module,
    method: Method | StaticQuantization | Sequence[Method | StaticQuantization],
    *,
    input_shape: tuple[int, int, int] | None = None,
    train: Callable[..., Any] | None = None,
    train_anew: Callable[..., Any] | None = None,
    data: "Data | None" = None,
    measure: Callable[[Sequence[nn.Module]], list[float]] | None = None,
    measure_files: Measure | None = None,
    folder: Path | str | None = None,
    seed: int = 0,
    coder: str = "huffman",
    task: Task = CLASSIFICATION,
) -> CompressionReport:
    """Compress a network in place by one method, or by several in their order.

        compress_(network, ChannelPruning(ratio=0.25), train=tune)
        compress_(network, [Sparsity(), WeightSharing()], train=tune, data=data)
        compress_(network, StaticQuantization(), data=data, folder="small")  # small/model.onnx

    int8 after training is of a file, so that it is the last and needs `data` and `folder`, where it
    writes fp32.onnx and model.onnx; the network stays as it is. Its step says what both files weigh
    and answer, and model.onnx is the float one where int8 makes the device slower.

    Args:
        input_shape: (c, h, w) of one image; a network of `build_network` knows its own.
        train: fine-tunes a network in place; methods call it as often as they need. `QAT(lr=...)`
            calls it with `lr=`.
        train_anew: trains one from its first weights on, `epochs=` long if asked; None: `train`.
        data: as of `load_data`: training images calibrate, validation images judge.
        measure: latencies in milliseconds of networks on the device, timed against each other; one
            with an `input_shape` (c, h, w) is given an image of that.
        measure_files: times ONNX files on the device against each other, such as
            `Device().measure_quietly`; int8 asks it which layers are to stay in float.
        folder: for what a method leaves beside the network, such as a plot.
        seed: of everything that is drawn.
        coder: of `pack`, by which networks are weighed.
        task: what is asked of the network, where that is not classification.

    Raises:
        InputError: no compression method, no input shape, or a method lacks what it needs.
    """
    given = [method] if not isinstance(method, Sequence) else list(method)
    _check(given, folder, data)
    methods = [each for each in given if isinstance(each, Method)]
    last = given[-1] if isinstance(given[-1], StaticQuantization) else None
    input_shape = input_shape or getattr(model, "input_shape", None)
    if input_shape is None:
        raise InputError("compress_ got no input_shape; expected (channels, height, width).")
    place = None if folder is None else Path(folder)
    tools = Tools(
        input_shape,
        train,
        data,
        measure,
        place,
        seed,
        coder=coder,
        train_anew=train_anew,
        task=task,
    )
    found, applied, snapshots = [facts(model, tools)], list[Applied](), [_copy(model, tools)]
    for each in methods:
        applied.append(each.apply_(model, tools))
        found.append(facts(model, tools))
        snapshots.append(_copy(model, tools))
    if measure is not None:  # all against each other, not each at a time of its own
        latencies = measure([copy for copy in snapshots if copy is not None])
        found = [replace(x, latency_ms=ms) for x, ms in zip(found, latencies, strict=True)]
    steps = [
        Step(each, before, after, done.changes, done.trained)
        for each, before, after, done in zip(methods, found[:-1], found[1:], applied, strict=True)
    ]
    if last is not None:
        steps.append(_int8_step(model, last, tools, found[-1], measure_files))
    return CompressionReport(tuple(steps))


def _int8_step(
    model: nn.Module,
    method: StaticQuantization,
    tools: Tools,
    known: Facts,
    measure_files: Measure | None,
) -> Step:
    """Write the network's float and int8 files; the step is from the one to the other."""
    data, folder = tools.images(), tools.folder
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "fp32.onnx", folder / "model.onnx"
    write_onnx(model, tools.input_shape, source, batch=None)
    scores = partial(_scores, data=data)
    report = quantize_file(
        source,
        target,
        data,
        method,
        scores=scores,
        measure=measure_files,
        seed=tools.seed,
        task=tools.task,
    )
    if not report.pays:
        target.write_bytes(source.read_bytes())
    timed, shown = report.latencies, data.validation

    def weighed(path: Path, latency_ms: float | None) -> Facts:
        size = path.stat().st_size
        right = tools.task.metric(scores(path, shown), shown.labels)
        accuracy = float(right.double().mean())
        return replace(
            known,
            dense_bytes=size,
            stored_bytes=size,
            accuracy=accuracy,
            latency_ms=latency_ms,
        )

    before = weighed(source, None if timed is None else timed.fp32_ms)
    after = weighed(target, None if timed is None else timed.fastest_ms)
    return Step(method, before, after, (report,))


def facts(model: nn.Module, tools: Tools) -> Facts:
    """Count, weigh and judge a network with what the tools have; its latency is not measured."""
    counted = count(model, tools.input_shape)
    dense = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    return Facts(
        counted.params,
        counted.macs,
        nonzero=sum(int(module.weight.count_nonzero()) for module in weighted(model)),
        dense_bytes=dense,
        stored_bytes=len(pack(model, tools.coder)),
        accuracy=tools.accuracy(model) if tools.data is not None else None,
    )


def _copy(model: nn.Module, tools: Tools) -> nn.Module | None:
    return deepcopy(model) if tools.measure is not None else None


def _scores(path: Path, images: "Images", *, data: "Data") -> Tensor:
    """What ONNX Runtime answers by a file, (n, classes)."""
    from fbnas.latency.session import open_session, run
    from fbnas.training.data import batches

    session = open_session(path)
    shown = batches(images, SCORED, mean=data.mean, std=data.std)
    return torch.cat([run(session, inputs) for inputs, _ in shown])


def _check(methods: Sequence[Any], folder: Any, data: Any) -> None:
    if not methods:
        raise InputError("compress_ got no method; expected one, or several in their order.")
    for place, method in enumerate(methods, start=1):
        if isinstance(method, StaticQuantization):
            if place < len(methods) or folder is None or data is None:
                raise InputError(
                    "StaticQuantization compresses an exported file, not a module; expected it as "
                    "the last method, with data= and folder=, where that file goes. Of a file that "
                    "there is already: quantize_file(FILE, OUT, data)."
                )
        elif not isinstance(method, Method):
            known = ", ".join(known.__name__ for known in METHODS.values())
            raise InputError(
                f"Unknown compression method {type(method).__name__}. Known: {known}, "
                "StaticQuantization."
            )
