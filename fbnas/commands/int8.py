"""int8 of an exported file in a command: quantized, judged, measured, and what was found told."""

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from fbnas.compression import QuantizationReport, StaticQuantization, quantize_file
from fbnas.compression.paying import Latencies, LayerCost, Mixable
from fbnas.compression.sensitivity import Sensitivity
from fbnas.export import scores_of_file
from fbnas.files import atomic_write, read_json, write_json
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.model_files import digest
from fbnas.latency.profiling import AnyDevice
from fbnas.latency.runtimes import suffixes
from fbnas.report.bars import Bar, write_bars
from fbnas.training.data import Data
from fbnas.training.heads import task_of

TABLE, PLOT = "sensitivity.csv", "sensitivity.html"
COSTS_TABLE, COSTS_PLOT = "int8_saves.csv", "int8_saves.html"
RECORD = "int8.layers.json"  # beside the int8 file of `fbnas compress`, or of a run's stage int8
JUDGING = "onnxruntime"  # what is judged and not measured holds for it


def quantized(
    source: Path,
    target: Path,
    data: Data,
    method: StaticQuantization,
    *,
    measured_on: AnyDevice | None,
    scored_on: AnyDevice | None = None,
    seed: int,
    by: Mixable | None = None,
    made_from: Path | None = None,
    record: str = RECORD,
) -> dict[str, Any]:
    """Write the int8 form of an exported file, its sensitivities beside it, and print the findings.

    That is kept beside it, so that an interrupted command that goes on neither judges nor measures
    the same layers again.

    Args:
        data: with the mean and std that the file wants.
        measured_on: where int8 must pay; None: nothing is measured.
        scored_on: whose runtime computes scores; None: ONNX Runtime here.
        by: what writes int8 files, where they are not calibrated from the source.
        made_from: the file that what was found holds for, if not the source: a converter writes
            other bytes each time. The caller writes the target anew then.
        record: name of the file that keeps what was found.
    """

    def measure(files: Sequence[Path]) -> Measurement:
        assert measured_on is not None
        return measured_on.measure_quietly(files, "Timing int8 and float layers", seed=seed)

    kept, source_of_it = target.with_name(record), made_from or source
    if kept.is_file() and (made_from is not None or target.is_file()):
        before = read_json(kept)
        if before.pop("source") == digest(source_of_it):
            before.pop("runtime", None)
            return dict(before)
    kept.unlink(missing_ok=True)
    can_measure = measured_on is not None and (
        reads_onnx(measured_on) if target.suffix == ".onnx" else measured_on.suffix == target.suffix
    )
    report = quantize_file(
        source,
        target,
        data,
        method,
        scores=partial(scores_of_file, mean=data.mean, std=data.std, device=scored_on),
        measure=measure if can_measure else None,
        seed=seed,
        task=task_of(data.heads),
        by=by,
    )
    prefix = "" if record == RECORD else f"{record.partition('.')[0]}_"
    if report.sensitivities:
        write_sensitivities(target.parent, report, prefix)
    for line in told(report, noun_of(target.suffix)):
        print(line)
    if report.latencies is not None and report.latencies.layer_costs:
        write_layer_costs(target.parent, report, report.latencies, prefix)
    found = as_fields(report)
    if by is None:
        found["reduce_range"] = method.scheme.reduce_range
    runtime = measured_on.runtime if isinstance(measured_on, Device) and can_measure else JUDGING
    write_json(kept, {"source": digest(source_of_it), "runtime": runtime, **found})
    return found


@dataclass(frozen=True)
class KnownLayers:
    """What a command found out of int8: the layers left in float, and whether int8 pays at all.

    `runtime`: that it holds for. Of one that reads ONNX files layers are named as in the fp32 file,
    of a network that was trained for int8 as in its own, of other runtimes as the modules.
    `reduce_range`: whether weights had 7 bits; None where they were not calibrated as ONNX.
    """

    layers: tuple[str, ...]
    pays: bool
    runtime: str
    reduce_range: bool | None = None

    @property
    def noun(self) -> str:
        """What they are."""
        return noun_of(suffixes(self.runtime)[0])

    @classmethod
    def read(cls, *records: Path) -> "KnownLayers | None":
        """Read the first of these files that is there; None without any."""
        for record in records:
            if record.is_file():
                found = read_json(record)
                layers = (*found["float_for_accuracy"], *found["float_for_speed"])
                runtime = found.get("runtime", JUDGING)
                return cls(layers, found["pays"], runtime, found.get("reduce_range"))
        return None


def noun_of(suffix: str) -> str:
    """Return what such an int8 file leaves in float: a converter leaves whole blocks."""
    return "layers" if suffix == ".onnx" else "blocks"


def record_of(stage: str) -> str:
    """Return the name of the file that keeps what was found of a run's stage, beside its model."""
    return f"{stage}.layers.json"


def reads_onnx(device: AnyDevice) -> bool:
    """Whether ONNX files can be timed there: not by other runtimes, nor on a planned device."""
    return device.kind != "roofline" and device.suffix == ".onnx"


def told(report: QuantizationReport, noun: str = "layers") -> list[str]:
    """Say in words which layers, or blocks, were left in float, and what was measured."""
    lines = []
    for layers, why in (
        (report.accurate_layers, "for accuracy"),
        (report.quick_layers, "because int8 makes them slower"),
    ):
        if layers:
            names = ", ".join(short(name) for name in layers)
            lines.append(
                f"{len(layers)} of {len(report.layers)} {noun} left in float {why}: {names}"
            )
    found = report.latencies
    if found is not None:
        times = {"fp32": found.fp32_ms, "int8": found.int8_ms, "mixed": found.mixed_ms}
        measured = ", ".join(f"{name} {ms:.4g} ms" for name, ms in times.items() if ms is not None)
        lines.append(f"{measured} (noise {100 * found.noise_floor:.1f} %): {found.fastest}")
    return lines


def as_fields(report: QuantizationReport) -> dict[str, Any]:
    """Return the report as in result.json; names of layers are those of the nodes in the file."""
    return {
        "pays": report.pays,
        "layers": len(report.layers),
        "float_for_accuracy": list(report.accurate_layers),
        "float_for_speed": list(report.quick_layers),
        "fastest": report.latencies and report.latencies.fastest,
        "measured": report.latencies and _measured(report.latencies),
    }


def _measured(latencies: Latencies) -> dict[str, Any]:
    found = asdict(latencies)
    del found["layer_costs"]  # they have a table of their own
    return found


def write_sensitivities(folder: Path, report: QuantizationReport, prefix: str = "") -> None:
    """Write the table and the plot of what int8 of each layer alone does."""
    left = set(report.float_layers)
    table, plot = folder / f"{prefix}{TABLE}", folder / f"{prefix}{PLOT}"
    _write_table(table, report.sensitivities, left)
    bars = [
        Bar(
            short(found.layer),
            found.sqnr_db,
            f"{found.layer}\nSQNR {found.sqnr_db:.1f} dB, cross-entropy "
            f"{found.cross_entropy_rise:+.2g}, accuracy {0.0 - found.accuracy_drop:+.4f}",
            marked=found.layer in left,
        )
        for found in report.sensitivities
    ]
    write_bars(
        plot,
        bars,
        title="What int8 of each layer alone does to the scores",
        axis="signal to quantization noise of the scores, dB",
        words=[
            "The shorter the bar, the more the network suffers from that layer in int8. Layers in "
            "the other colour were left in float. Hover a bar to see more."
        ],
    )
    print(f"sensitivity of {len(bars)} layers: {table}, {plot}")


def write_layer_costs(
    folder: Path, report: QuantizationReport, latencies: Latencies, prefix: str = ""
) -> None:
    """Write the table and the plot of what int8 of each layer saves on the device."""
    left, costs = set(report.float_layers), latencies.layer_costs
    table, plot = folder / f"{prefix}{COSTS_TABLE}", folder / f"{prefix}{COSTS_PLOT}"
    _write_table(table, costs, left)
    bars = [
        Bar(
            short(cost.layer),
            1e3 * cost.saved_ms,
            f"{cost.layer}\nint8 saves {1e3 * cost.saved_ms:+.2f} us; a change of precision after "
            f"it costs {1e3 * cost.change_ms:.2f} us",
            marked=cost.layer in left,
        )
        for cost in costs
    ]
    changes_us = [1e3 * cost.change_ms for cost in costs[:-1]]
    write_bars(
        plot,
        bars,
        title="What int8 of each layer saves on this device",
        axis="saved by int8, microseconds; negative: float is faster",
        words=[
            f"{told(report)[-1]}. The bars add up to what int8 saves of the whole: "
            f"{1e3 * sum(cost.saved_ms for cost in costs):+.1f} us.",
            "Layers in the other colour were left in float. Quantizing or dequantizing between two "
            f"layers costs {min(changes_us):.1f} to {max(changes_us):.1f} us here, so a layer that "
            "gains less than that between two of the other precision follows them.",
        ],
    )
    print(f"what int8 of each layer saves: {table}, {plot}")


def _write_table(
    path: Path, found: Sequence[Sensitivity] | Sequence[LayerCost], left: Collection[str]
) -> None:
    """Write a row per layer: its name, the other fields, and whether it was left in float."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow([*(field.name for field in fields(found[0])), "left_in_float"])
    for each in found:
        layer, *numbers = asdict(each).values()
        values = [f"{number:.6g}" for number in numbers]
        writer.writerow([layer, *values, str(layer in left).lower()])
    atomic_write(path, rows.getvalue())


def short(layer: str) -> str:
    """Return the name of a node without what every name has: /head/head.0/Conv is head.0."""
    parts = [part for part in layer.split("/") if part]
    if len(parts) > 1 and parts[-1].rstrip("0123456789_") in ("Conv", "Gemm", "MatMul"):
        parts = parts[:-1]
    merged = [
        part for i, part in enumerate(parts) if not "".join(parts[i + 1 : i + 2]).startswith(part)
    ]
    return ".".join(merged)
