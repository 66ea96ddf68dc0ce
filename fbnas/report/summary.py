"""What was asked, predicted and measured: the opening sentence and the key figures."""

from dataclasses import dataclass
from typing import Any

from fbnas.report.run import Run
from fbnas.report.words import digits, duration, ms, percent, scaled

LEAST_TOLERANCE = 0.05  # the contract of exit code 3: 5 % or twice the noise floor, the greater,
MOST_TOLERANCE = 0.10  # but a busy machine does not make every budget met


@dataclass(frozen=True)
class Verdict:
    """Whether the budget was met: `kind` is met, close (within the tolerance), missed or open."""

    kind: str
    words: str


def verdict(run: Run) -> Verdict:
    """Judge the measured latency against the target."""
    measured = run.result.get("latency_ms")
    if run.target_ms is None or not measured:
        return Verdict("open", "")
    allowed = tolerance(run.noise_floor or 0.0)
    off = measured["value"] / run.target_ms - 1
    if off <= 0:
        return Verdict("met", f"Budget met: {percent(abs(off))} below the target.")
    above = f"{percent(off)} above the target"
    if off <= allowed:
        return Verdict("close", f"Budget met within {percent(allowed)}: {above}.")
    return Verdict("missed", f"Budget missed: {above}, {percent(allowed)} are allowed.")


def tolerance(noise_floor: float) -> float:
    """Return the fraction by which a measured latency may be above a budget that counts as met."""
    return min(max(LEAST_TOLERANCE, 2 * noise_floor), MOST_TOLERANCE)


def title(run: Run) -> str:
    """Name the page: the folder, what made it, and the space."""
    space = run.space.name if run.space else run.result.get("space")
    where = f" in space {space}" if space else ""
    return f"{run.folder.resolve().name}: {_command(run)}{where}"


def sentence(run: Run) -> str:
    """Say in one sentence what was asked, predicted and measured, as far as the folder knows."""
    if run.result.get("latency_ms"):
        text = _measured(run)
    elif run.search:
        text = _searched(run)
    elif run.training:
        text = _trained(run)
    else:
        text = f"{_command(run)} finished"
    accuracy = run.result.get("accuracy_top1")
    tail = f", with {percent(accuracy)} top-1 accuracy" if accuracy is not None else ""
    return f"{text[0].upper()}{text[1:]}{tail}."


def key_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of the few numbers that matter most."""
    result, latency = run.result, run.result.get("latency_ms")
    predicted = None if run.has_several_targets else result.get("predicted_latency_ms")
    candidates = (
        ("asked", run.target_ms, ms, "at most"),
        ("predicted", predicted, ms, "by the search"),
        ("measured", latency and latency["value"], ms, _spread(latency)),
        ("accuracy", result.get("accuracy_top1"), percent, "top-1"),
        ("size", result.get("model_bytes"), lambda v: scaled(v, "B"), "the model file"),
        ("parameters", result.get("params"), scaled, f"{scaled(result.get('macs'))} multiply-adds"),
        ("time", result.get("seconds"), duration, "the whole command"),
    )
    return [
        (name, write(value), note) for name, value, write, note in candidates if value is not None
    ]


def _measured(run: Run) -> str:
    latency = run.result["latency_ms"]
    predicted = run.result.get("predicted_latency_ms")
    parts = []
    if run.target_ms is not None:
        parts.append(f"asked for at most {ms(run.target_ms)}")
    if predicted is not None:
        parts.append(f"the search predicted {ms(predicted)}")
    spread = f"{digits(latency['low'])} to {digits(latency['high'])}"
    parts.append(f"the final file takes {ms(latency['value'])} ({spread}) on {_device(run)}")
    return joined(parts)


def _searched(run: Run) -> str:
    assert run.search is not None
    last = run.search.epochs[-1]
    ends = [
        f"{ms(target['expected_latency_ms'])} for the {ms(target['budget_ms'])} asked for"
        for target in last["targets"]
    ]
    space = f"space {run.space.name}" if run.space else "the space"
    return f"searched {space} for {last['epoch'] + 1} epochs; theta expects {joined(ends)}"


def _trained(run: Run) -> str:
    rows = next(iter(run.training.values()))
    best = max(rows, key=lambda row: row["validation_accuracy"])
    accuracy = percent(best["validation_accuracy"])
    return (
        f"trained for {rows[-1]['epoch'] + 1} epochs; epoch {best['epoch'] + 1} was best with "
        f"{accuracy} of the validation images right"
    )


def _device(run: Run) -> str:
    """Name the device with its runtime, and the precision of the file that it runs.

    From the result or the table's header; a run for an fp32 device may end on an int8 file, and
    one for an int8 device on an fp32 file.
    """
    device: dict[str, Any] = run.result.get("device") or {}
    header = run.tables[0].header if run.tables else {}
    name = device.get("device") or device.get("name") or "this device"
    how = [str(device.get(key) or header.get(key) or "") for key in ("runtime", "precision")]
    how[1] = _precision_of_final_stage(run) or how[1]
    return f"{name} ({', '.join(word for word in how if word)})" if any(how) else str(name)


def _precision_of_final_stage(run: Run) -> str:
    """Return fp32 or int8, as the stage's file is; empty of a command that has no stages."""
    final = run.result.get("final_stage")
    if final is None:
        return ""
    of_stages = {row.get("name"): row for row in run.result.get("stages") or ()}
    stated = of_stages.get(final, {}).get("precision")
    if stated:
        return str(stated)
    # An older run does not say it: there `qat` is int8 in ONNX files, and in no other.
    onnx = str(run.result.get("model") or "model.onnx").endswith(".onnx")
    return "int8" if final == "int8" or (final == "qat" and onnx) else "fp32"


def _spread(latency: dict[str, Any] | None) -> str:
    if not latency:
        return ""
    samples = f"n\u00a0=\u00a0{latency.get('samples', '?')}"  # kept on one line
    return f"{digits(latency['low'])} to {digits(latency['high'])}, {samples}"


def _command(run: Run) -> str:
    words = [word for word in str(run.result.get("command") or "").split() if word != "fbnas"]
    return f"fbnas {words[0]}" if words else "a search" if run.search else "a training"


def joined(parts: list[str]) -> str:
    """Join parts of a sentence: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
