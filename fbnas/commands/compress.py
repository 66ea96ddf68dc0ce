"""fbnas compress: methods that make a network smaller or quicker, one after the other."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from fbnas.commands.folder import OutFolder
from fbnas.commands.int8 import quantized, reads_onnx
from fbnas.commands.parts import (
    data_of,
    data_of_file,
    device_of,
    network_folder,
    with_heads,
    with_heads_of_file,
)
from fbnas.commands.teachers import (
    SUPERNET,
    UNCOMPRESSED,
    Sources,
    check_teacher,
    teacher_of,
)
from fbnas.commands.train import report_epoch
from fbnas.compression import (
    FORM_FILE,
    METHODS,
    QAT,
    CompressionReport,
    Facts,
    Method,
    Rounded,
    StaticQuantization,
    Tools,
    compress_,
    facts,
    load_any,
    write_packed,
)
from fbnas.compression.coding import CODERS
from fbnas.compression.packing import PACKED_FILE, PAYS_BELOW
from fbnas.errors import InputError, check_known
from fbnas.export import TrainedInt8, export_onnx, judge_file
from fbnas.latency.fake_quantization import QuantizedForm
from fbnas.latency.profiling import AnyDevice
from fbnas.latency.saturation import saturates
from fbnas.progress import progress
from fbnas.report.sparsity_scan import draw_scan
from fbnas.space import NetworkCard, save_network
from fbnas.training.data import Data
from fbnas.training.heads import judge_network, task_of
from fbnas.training.loop import train
from fbnas.training.settings import TrainingSettings

INT8 = StaticQuantization.NAME  # of a file, so the last
NAMES = (*METHODS, INT8)
SEVEN_BITS = (
    "int8 weights have 7 bits: this device cuts sums of 8 bits off at 16 bits (x86 without VNNI)"
)


def main(config: dict[str, Any]) -> int:
    names = method_names(config["method"])
    check_compression(config)
    device = device_of(config)  # refuses a wrong one before anything is spent
    if names == [INT8]:
        return _quantize(config)
    folder = network_folder(config["model"])
    network, card = load_any(folder)
    config = with_heads(config, card.heads, folder)
    data = data_of(config, card)
    before = judge_network(network, data, data.test)
    out = OutFolder(config)
    methods = [build_method(name, config, device) for name in names if name != INT8]
    measure = measuring(config, card, out.folder) if config["measure"] else None
    report = compress_and_save(
        network, card, data, config, out.folder, methods=methods, resume=out.resume, measure=measure
    )
    accuracy = judge_network(network, data, data.test)
    steps = [
        {"method": x.method.NAME, "before": asdict(x.before), "after": asdict(x.after)}
        for x in report.steps
    ]
    print_steps(steps)
    print(f"test accuracy {before} -> {accuracy}")
    packed = packed_file(config, out.folder, network, report)
    rounded, quantized = _rounded(report), dict[str, Any]()
    if rounded is not None:
        quantized = {
            "quantization": rounded.form.method,
            "weight_bits": rounded.form.weight_bits,
            "validation_accuracy_ptq": rounded.ptq_accuracy,
            "validation_accuracy_qat": rounded.qat_accuracy,
        }
    if INT8 in names or rounded is not None:
        quantized |= _int8_file(config, out.folder, network, card, data, known=report.after)
        steps.append(quantized.pop("step"))
        print_steps(steps[-1:])
    first, last = report.before, report.after
    fields: dict[str, Any] = {
        "method": names[0] if len(names) == 1 else names,
        "params": last.params,
        "macs": last.macs,
        "params_before": first.params,
        "macs_before": first.macs,
        "accuracy_top1": accuracy.all,
        "accuracy_top1_before": before.all,
        "accuracy_by_head": accuracy.heads or None,
        "accuracy_by_head_before": before.heads or None,
        "validation_accuracy": last.accuracy,
        "validation_accuracy_before": first.accuracy,
        "steps": steps,
        "architecture": list(card.architecture.blocks),
    }
    out.finish(**{**fields, **packed, **quantized})
    return 0


def method_names(given: Any, option: str = "method") -> list[str]:
    """Return the methods of an option: one, or several in their order, int8 the last.

    Raises:
        InputError: an unknown one, or int8 before another.
    """
    names = [str(name) for name in given] if isinstance(given, list) else [str(given)]
    check_known("method", names, NAMES)
    if not names or INT8 in names[:-1] or len(set(names)) < len(names):
        raise InputError(
            f"{option}={given}; expected one method or a list of different ones, int8 the last of "
            "them: it makes a file, which nothing here compresses further."
        )
    return names


def build_method(name: str, config: dict[str, Any], device: AnyDevice | None = None) -> Method:
    """Build a method of its section of `compression`.

    Args:
        device: decides what is left to it: the bits of weights that are trained for int8.

    Raises:
        InputError: an unknown option, or a value out of its range.
    """
    kind = METHODS[name]
    options = config["compression"][kind.SECTION]
    check_known(f"option of compression.{kind.SECTION}:", options, options_of(kind))
    if kind is QAT and options["weight_bits"] is None:
        bits = 7 if device is not None and saturates(device) else 8
        options = {**options, "weight_bits": bits}
        if bits < 8:
            print(f"{SEVEN_BITS}; compression.qat.weight_bits=8 for 8")
    return kind(**options)


def options_of(kind: Any) -> list[str]:
    """Return the names of a method's options."""
    return [field.name for field in fields(kind)]


def compress_and_save(
    network: Any,
    card: NetworkCard,
    data: Data,
    config: dict[str, Any],
    folder: Path,
    *,
    methods: Sequence[Method],
    resume: bool,
    measure: Callable[[Sequence[nn.Module]], list[float]] | None = None,
    sources: Sources | None = None,
) -> CompressionReport:
    """Compress in place, fine-tuning as `compression.fine_tuning` says, and save the network.

    Methods that train from first weights on do it as `training` says. The first training is kept in
    `folder`, others in its tuning_02 and so on: `resume` goes on from them. What int8 of a trained
    quantization needs goes into its quantization.json.

    Args:
        sources: of teachers; by default, the network as it is given is the uncompressed one.

    Raises:
        InputError: an unknown option of compression.
    """
    fine, anew = tuning(config), TrainingSettings.from_dict(config["training"])
    task, trainings = task_of(data.heads), 0
    sources = sources or Sources(uncompressed=deepcopy(network))
    teacher = teacher_of(config["compression"]["fine_tuning"]["teacher"], data, sources)

    def tune(model: nn.Module, settings: TrainingSettings) -> Any:
        nonlocal trainings
        trainings += 1
        place = folder if trainings == 1 else folder / f"tuning_{trainings:02d}"
        return train(
            model,
            data,
            settings=settings,
            seed=config["seed"],
            out=place,
            resume=resume,
            on_epoch=report_epoch(settings.epochs, every=5),
            task=task,
            teacher=teacher,
        )

    report = compress_(
        network,
        methods,
        input_shape=card.input_shape,
        train=lambda model, lr=fine.lr: tune(model, replace(fine, lr=lr)),
        train_anew=lambda model, epochs=anew.epochs: tune(model, replace(anew, epochs=epochs)),
        data=data,
        measure=measure,
        folder=folder,
        seed=config["seed"],
        coder=coder_of(config),
        task=task,
    )
    rounded = _rounded(report)
    (folder / FORM_FILE).unlink(missing_ok=True)
    if rounded is not None:
        rounded.form.save(folder / FORM_FILE)
    save_network(folder, network, card)  # the last: network.yaml says that all of it is there
    for line in draw_scan(folder):
        print(line)
    return report


def packed_file(
    config: dict[str, Any], folder: Path, network: nn.Module, report: CompressionReport
) -> dict[str, Any]:
    """Write the network's packed weights where they pay; return what result.json says of them."""
    dense, stored = report.after.dense_bytes, report.after.stored_bytes
    if stored >= PAYS_BELOW * dense:
        return {}
    path = folder / PACKED_FILE
    written = write_packed(network, path, coder_of(config))
    print(
        f"{path}: {written:,} bytes, {report.before.dense_bytes / written:.1f} times smaller than "
        f"{report.before.dense_bytes:,} bytes before; network.yaml and it are all the network needs"
    )
    return {"packed_bytes": written, "dense_bytes": dense, "packed": path.name}


def _rounded(report: CompressionReport) -> Rounded | None:
    """Return what quantization-aware training found, where nothing came after it."""
    found = [change for change in report.changes if isinstance(change, Rounded)]
    return found[0] if found else None


@dataclass(frozen=True)
class DeviceMeasure:
    """Times networks on a device against each other; one with an `input_shape` at that.

    folder: for their files, while they are timed.
    """

    device: AnyDevice
    input_shape: tuple[int, int, int]
    folder: Path
    seed: int

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the latencies depend on."""
        return self.device.fingerprint()

    def __call__(self, networks: Sequence[nn.Module]) -> list[float]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            files = [Path(place) / f"{i:03d}{self.device.suffix}" for i in range(len(networks))]
            with progress("Converting", total=len(files)) as advance:
                for network, file in zip(networks, files, strict=True):
                    shape = getattr(network, "input_shape", self.input_shape)
                    self.device.compile(network, shape, file)
                    advance(1)
            found = self.device.measure_quietly(
                files, f"Timing {len(files)} networks", seed=self.seed
            )
        return [timing.latency_ms for timing in found.whole]


def measuring(config: dict[str, Any], card: NetworkCard, folder: Path) -> DeviceMeasure:
    """Return what times networks on the device of `device=`, against each other."""
    return DeviceMeasure(device_of(config), card.input_shape, folder, config["seed"])


def print_steps(steps: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for what was there before, and one per step, as they are in result.json."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("after")
    for name in ("val. acc.", "params", "not zero", "M macs", "kB", "kB packed", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    first = "fp32 file" if steps[0]["method"] == INT8 else "-"
    rows = [(first, steps[0]["before"]), *((step["method"], step["after"]) for step in steps)]
    for name, found in rows:
        table.add_row(
            name,
            _written(found["accuracy"], "{:.4f}"),
            _written(found["params"], "{:,}"),
            _written(found["nonzero"], "{:,}"),
            _written(found["macs"], "{:.2f}", 1e-6),
            _written(found["dense_bytes"], "{:.0f}", 1e-3),
            _written(found["stored_bytes"], "{:.0f}", 1e-3),
            _written(found["latency_ms"], "{:.4g}"),
        )
    Console(width=None if Console().is_terminal else 100).print(table)


def _written(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else form.format(value * scale)


def _int8_file(
    config: dict[str, Any],
    folder: Path,
    network: nn.Module,
    card: NetworkCard,
    data: Data,
    *,
    known: Facts,
) -> dict[str, Any]:
    """Write the network's int8 file; return what result.json says of it, and its step."""
    source, target = folder / "fp32.onnx", folder / "model.onnx"
    export_onnx(network, source, card=card)
    fields = _int8(
        config,
        source,
        target,
        data,
        trained=trained_int8(folder, network, card),
        known=known,
    )
    print(f"test accuracy of the int8 file {fields.pop('accuracy')}")
    return fields


def trained_int8(folder: Path, network: nn.Module, card: NetworkCard) -> TrainedInt8 | None:
    """Return the int8 that a folder says its network was trained for, None where it was not."""
    path = folder / FORM_FILE
    if not path.is_file():
        return None
    return TrainedInt8(network, QuantizedForm.load(path), card.input_shape, card)


def _int8(
    config: dict[str, Any],
    source: Path,
    target: Path,
    data: Data,
    *,
    trained: TrainedInt8 | None = None,
    known: Facts | None = None,
) -> dict[str, Any]:
    """Write model.onnx: int8 with the grids it was trained on, or calibrated where there are none.

    The float file where int8 does not pay at all. Returned with the rest is its step.
    """
    device = device_of(config)
    if trained is None:
        method = told_quantization(config, device)
    else:
        method = quantization_of(config)
        warn_of_bits(trained.form, device)
    measured_on = device if config["measure"] and method.pays else None
    judged_on = device if device.suffix == ".onnx" else None
    layers = quantized(
        source,
        target,
        data,
        method,
        measured_on=measured_on,
        scored_on=judged_on,
        seed=config["seed"],
        by=trained,
    )
    if not layers["pays"]:
        target.write_bytes(source.read_bytes())
        print(
            "int8 does not pay on this device: model.onnx is the float file "
            "(compression.quantization.pays=false writes int8 all the same)"
        )
    found = {"int8": layers}
    size = target.stat().st_size
    print(f"{target}: {source.stat().st_size:,} -> {size:,} bytes")
    if device.suffix != ".onnx":
        print(
            f"{target} is an int8 ONNX file; {device.runtime} reads none, so it was not measured: "
            f"fbnas export format={device.runtime} precision=int8 makes that runtime's own file"
        )
    accuracy = judge_file(target, data, data.test, device=judged_on)
    latencies_ms = _file_latencies(config, source, target, found)
    step = _int8_step(
        source, target, data, latencies_ms=latencies_ms, known=known, judged_on=judged_on
    )
    return {
        "step": step,
        "model_bytes": size,
        "accuracy": accuracy,
        "accuracy_top1": accuracy.all,
        "accuracy_by_head": accuracy.heads or None,
        **found,
    }


def _int8_step(
    source: Path,
    target: Path,
    data: Data,
    *,
    latencies_ms: tuple[float | None, float | None],
    known: Facts | None,
    judged_on: AnyDevice | None,
) -> dict[str, Any]:
    """Return the step `int8` of result.json: the fp32 file before it, the int8 file after it.

    Accuracies, bytes and latencies are those of the files; the counts are those of the network.

    Args:
        latencies_ms: of both.
        known: of the network; None: counts stay None.
        judged_on: whose answers count; None: those of ONNX Runtime here.
    """
    before_ms, after_ms = latencies_ms
    counts = {name: known and getattr(known, name) for name in ("params", "macs", "nonzero")}

    def of(file: Path, latency_ms: float | None) -> dict[str, Any]:
        size = file.stat().st_size
        accuracy = judge_file(file, data, data.validation, device=judged_on).all
        weighed = {"dense_bytes": size, "stored_bytes": size}
        return {**counts, **weighed, "accuracy": accuracy, "latency_ms": latency_ms}

    return {"method": INT8, "before": of(source, before_ms), "after": of(target, after_ms)}


def _file_latencies(
    config: dict[str, Any], source: Path, target: Path, made: Mapping[str, Any]
) -> tuple[float | None, float | None]:
    """Latencies in ms of the fp32 and the int8 file against each other, None where none is asked.

    What was measured to decide which layers stay in float is not measured again.
    """
    measured = made.get("int8", {}).get("measured")
    if measured:
        return measured["fp32_ms"], measured[f"{made['int8']['fastest']}_ms"]
    device = device_of(config) if config["measure"] else None
    if device is None or not reads_onnx(device):
        return None, None
    before, after = device.measure_quietly(
        [source, target], "Timing the fp32 and the int8 file", seed=config["seed"]
    ).whole
    return before.latency_ms, after.latency_ms


def form_of(folder: Path, device: AnyDevice) -> QuantizedForm | None:
    """Return how a network was trained for int8; None where it was not, or no ONNX file is meant.

    Runtimes with files of their own take the weights, and ranges by their own converters.
    """
    path = folder / FORM_FILE
    return QuantizedForm.load(path) if device.suffix == ".onnx" and path.is_file() else None


def _quantize(config: dict[str, Any]) -> int:
    model = Path(config["model"])
    card = None
    if not (model.is_file() and model.suffix == ".onnx"):
        folder = network_folder(model)
        network, card = load_any(folder)
        config = with_heads(config, card.heads, folder)
        data = data_of(config, card)
    else:
        config = with_heads_of_file(config, model)
        data = data_of_file(config, model)
    out = OutFolder(config)
    source = model
    if card is not None:
        source = out.folder / "fp32.onnx"
        export_onnx(network, source, card=card)
    before = judge_file(source, data, data.test)
    trained = known = None
    if card is not None:
        trained = trained_int8(folder, network, card)
        known = facts(network, Tools(card.input_shape, coder=coder_of(config)))
    target = out.folder / "model.onnx"
    fields = _int8(config, source, target, data, trained=trained, known=known)
    step = fields.pop("step")
    print_steps([step])
    print(f"test accuracy {before} -> {fields.pop('accuracy')}")
    out.finish(
        method="int8",
        model_bytes_before=source.stat().st_size,
        accuracy_top1_before=before.all,
        accuracy_by_head_before=before.heads or None,
        calibration_images=min(quantization_of(config).calibration_images, len(data.train)),
        params=known and known.params,
        macs=known and known.macs,
        steps=[step],
        **fields,
    )
    return 0


def check_compression(config: dict[str, Any]) -> None:
    """Refuse wrong options of compression before anything is spent on what they come after.

    Raises:
        InputError: an unknown option, or a value out of its range.
    """
    options = config["compression"]
    sections = [kind.SECTION for kind in METHODS.values()]
    others = ["methods", "fine_tuning", "packing", "quantization"]
    check_known("part of compression", options, [*sections, *others])
    if options["methods"]:
        method_names(options["methods"], "compression.methods")
    for name in METHODS:
        build_method(name, config)
    quantization_of(config)
    coder_of(config)
    tuning(config)


def coder_of(config: dict[str, Any]) -> str:
    """Return the coder of `compression.packing`.

    Raises:
        InputError: an unknown one, or an unknown option.
    """
    options = config["compression"]["packing"]
    check_known("option of compression.packing:", options, ["coder"])
    check_known("coder", [options["coder"]], CODERS)
    return str(options["coder"])


def tuning(config: dict[str, Any]) -> TrainingSettings:
    """Return the settings of fine-tuning: the training's, but for compression.fine_tuning."""
    training = TrainingSettings.from_dict(config["training"])
    options = dict(config["compression"]["fine_tuning"])
    given = options.pop("teacher")
    check_teacher("compression.fine_tuning.teacher", given, words=(UNCOMPRESSED, SUPERNET))
    check_known("option of compression.fine_tuning:", options, config["training"])
    return replace(training, **options)


def quantization_of(config: dict[str, Any], device: AnyDevice | None = None) -> StaticQuantization:
    """Build the method of `compression.quantization`.

    Args:
        device: decides what is left to it where it runs ONNX files: whether weights have 7 bits.
    """
    options = config["compression"]["quantization"]
    check_known("option of compression.quantization:", options, options_of(StaticQuantization))
    left_open = options.get("reduce_range") is None
    if left_open and device is not None and device.suffix == ".onnx":
        options = {**options, "reduce_range": saturates(device)}
    return StaticQuantization(**options)


def told_quantization(config: dict[str, Any], device: AnyDevice) -> StaticQuantization:
    """Do the same, and say where the device decided for 7 bits."""
    method = quantization_of(config, device)
    left_open = config["compression"]["quantization"].get("reduce_range") is None
    if left_open and method.reduce_range:
        print(f"{SEVEN_BITS}; compression.quantization.reduce_range=false for 8")
    return method


def warn_of_bits(form: QuantizedForm, device: AnyDevice) -> None:
    """Say where a network was trained for more bits than a device bears."""
    if form.weight_bits > 7 and saturates(device):
        print(
            f"The network was trained for int8 weights of {form.weight_bits} bits, whose sums "
            f"{device.name} cuts off at 16 bits (x86 without VNNI), which costs accuracy: "
            "compression.qat.weight_bits=7 trains it for what that bears"
        )
