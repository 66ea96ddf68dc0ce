"""fbnas evaluate: accuracy and measured latency of a file."""

from pathlib import Path
from typing import Any

from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import check_target_ms, data_of_file, device_of, with_heads_of_file
from fbnas.export import check_suffix, judge_file, read_metadata
from fbnas.latency.devices import ROUNDS
from fbnas.latency.model_files import size_bytes
from fbnas.report.summary import tolerance


def main(config: dict[str, Any]) -> int:
    model, device = Path(config["model"]), device_of(config)
    target_ms = config["target_ms"]
    check_target_ms(target_ms)
    check_suffix(model, device)
    device.fingerprint()  # it answers, and has the runtime
    config = with_heads_of_file(config, model)
    data = data_of_file(config, model)
    out = OutFolder(config)
    accuracy = judge_file(model, data, data.test, device=device)
    rounds = config["rounds"] or ROUNDS
    measurement = device.measure_quietly(
        [model], f"Timing {model.name}", rounds=rounds, seed=config["seed"]
    )
    timing = measurement.whole[0]
    planned = device.kind == "roofline"
    print(f"{model}: accuracy {accuracy} on {len(data.test)} test images of {data.name}")
    if planned:
        print(f"{timing.latency_ms:.4g} ms on {device.name}: planned, not measured")
    else:
        print(
            f"{timing.latency_ms:.4g} ms ({timing.low_ms:.4g} to {timing.high_ms:.4g}) on "
            f"{device.name} through {device.runtime}, {device.threads} thread(s); noise floor "
            f"{100 * measurement.noise_floor:.1f} %"
        )
    missed = target_ms is not None and is_missed(
        timing.latency_ms, target_ms, measurement.noise_floor
    )
    if target_ms is not None:
        print(f"target {target_ms:.4g} ms: {'missed' if missed else 'met'}")
    out.finish(
        accuracy_top1=accuracy.all,
        accuracy_by_head=accuracy.heads or None,
        latency_ms=timing.as_dict(),
        noise_floor=measurement.noise_floor,
        planned=planned,
        target_ms=target_ms,
        model_bytes=size_bytes(model),
        architecture=read_metadata(model).get("architecture"),
        device=device.fingerprint(),
    )
    return 3 if missed else 0


def is_missed(latency_ms: float, target_ms: float, noise_floor: float) -> bool:
    """Whether a latency is above target by more than the tolerance of exit code 3."""
    return latency_ms > target_ms * (1 + tolerance(noise_floor))
