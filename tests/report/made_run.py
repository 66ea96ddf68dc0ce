"""A made-up run folder that follows the file formats to the letter, its numbers from formulas."""

import math
import random
from pathlib import Path
from typing import Any

from fbnas.files import append_jsonl, atomic_write, write_json, write_yaml

BLOCKS = ["k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip"]
SPACE: dict[str, Any] = {
    "name": "quickstart",
    "resolution": 16,
    "input_channels": 1,
    "stem": {"channels": 16, "stride": 1},
    "stages": [
        {"channels": 16, "layers": 1, "stride": 1},
        {"channels": 32, "layers": 3, "stride": 2},
        {"channels": 64, "layers": 3, "stride": 2},
    ],
    "head": 256,
    "blocks": BLOCKS,
    "skip_on_reduction": False,
    "modules": [],
}
# in, out, stride, height, width of the seven layers, worked out by hand
SHAPES = [
    (16, 16, 1, 16, 16),
    (16, 32, 2, 16, 16),
    (32, 32, 1, 8, 8),
    (32, 32, 1, 8, 8),
    (32, 64, 2, 8, 8),
    (64, 64, 1, 4, 4),
    (64, 64, 1, 4, 4),
]
CHOSEN = ["k3_e1", "k5_e6", "k3_e3", "skip", "k5_e3", "k3_e1_g2", "k5_e6"]
EPOCHS, WARMUP = 12, 6
BUDGET_MS, BASE_MS = 0.25, 0.06


def offered(layer: int, block: str) -> bool:
    return block != "skip" or layer not in (1, 4)


def block_ms(block: str, shape: tuple[int, ...]) -> float:
    if block == "skip":
        return 0.0
    kernel, expansion = int(block[1]), int(block[4])
    return round(2e-6 * shape[0] * expansion * shape[3] * shape[4] * (1 + kernel / 10) + 0.004, 6)


def latency_tensor() -> list[list[float | None]]:
    return [
        [block_ms(b, shape) if offered(k, b) else None for b in BLOCKS]
        for k, shape in enumerate(SHAPES)
    ]


def logits(epoch: int) -> list[list[float | None]]:
    """Uniform while theta sleeps, then the chosen block's logit grows by 0.8 an epoch."""
    gain = 0.8 * max(0, epoch - WARMUP + 1)
    return [
        [gain * (b == CHOSEN[k]) if offered(k, b) else None for b in BLOCKS]
        for k in range(len(SHAPES))
    ]


def expected_ms(epoch: int) -> float:
    total = BASE_MS
    for row, costs in zip(logits(epoch), latency_tensor(), strict=True):
        powers = [0.0 if x is None else math.exp(x) for x in row]
        total += sum(p * (c or 0.0) for p, c in zip(powers, costs, strict=True)) / sum(powers)
    return total


def write_search(
    folder: Path, budgets: tuple[float, ...] = (BUDGET_MS,), table: str = "t.csv"
) -> None:
    write_yaml(folder / "space.yaml", SPACE)
    for epoch in range(EPOCHS):
        asleep = epoch < WARMUP
        target = {
            "expected_latency_ms": expected_ms(epoch),
            "lambda": 0.0 if asleep else 0.1 * epoch,
            "entropy": 2.2 * 0.8 ** max(0, epoch - WARMUP),
            "skips": 0.6 + 0.05 * epoch,
            "skips_per_stage": [0.1, 0.3, 0.2 + 0.05 * epoch],
            "latency_penalty": 0.0,
            "logits": logits(epoch),
        }
        append_jsonl(
            folder / "metrics.jsonl",
            {
                "epoch": epoch,
                "phase": "warmup" if asleep else "search",
                "tau": 5.0 * math.exp(-0.045 * epoch),
                "weights_loss": 2.3 * 0.85**epoch,
                "weights_accuracy": 1 - 0.9 * 0.82**epoch,
                "theta_loss": None if asleep else 2.4 * 0.85**epoch,
                "theta_accuracy": None if asleep else 0.98 - 0.9 * 0.82**epoch,
                "seconds": 1.5,
                "lr": 0.1,
                "targets": [{"budget_ms": budget, **target} for budget in budgets],
            },
        )
    targets = [
        {
            "table": table,
            "budget_ms": budget,
            "base_ms": BASE_MS,
            "latency_ms": latency_tensor(),
            "logits": logits(EPOCHS - 1),
        }
        for budget in budgets
    ]
    write_json(folder / "theta.json", {"space": "quickstart", "blocks": BLOCKS, "targets": targets})


def write_front(folder: Path, targets: int = 1) -> None:
    """Networks of the search as its shared weights judge them: the chosen ones, and baselines."""
    draw = random.Random(1)
    rows: list[dict[str, Any]] = []
    for target in range(targets):
        chosen = {"kind": "target", "name": "chosen", "target": target}
        rows.append(chosen | {"architecture": CHOSEN, "accuracy": 0.9 + 0.01 * target})
        for _ in range(4):
            blocks = [draw.choice([b for b in BLOCKS if offered(k, b)]) for k in range(len(SHAPES))]
            other = {"kind": "random", "name": "random", "target": target}
            rows.append(other | {"architecture": blocks, "accuracy": draw.uniform(0.7, 0.9)})
    for block in BLOCKS[:-1]:
        uniform = {"kind": "uniform", "name": f"all {block}", "architecture": [block] * 7}
        rows.append(uniform | {"accuracy": 0.6 + 0.04 * BLOCKS.index(block)})
    write_json(folder / "front.json", {"images": 512, "networks": rows})


def write_table(path: Path, **header: str) -> None:
    columns = "block,in_channels,out_channels,stride,height,width,latency_ms,low_ms,high_ms,samples"
    rows = ["stem,1,16,1,16,16,0.011,0.010,0.012,30", "head,64,256,1,4,4,0.021,0.02,0.022,30"]
    rows.append("classifier,256,10,1,4,4,0.006,0.005,0.007,30")
    for shape in dict.fromkeys(SHAPES):
        for block in BLOCKS:
            if offered(SHAPES.index(shape), block):
                ms = block_ms(block, shape)
                spread = f"{0.97 * ms:.6f},{1.04 * ms:.6f},{30 if ms else 0}"
                rows.append(f"{block},{','.join(map(str, shape))},{ms},{spread}")
    header = {
        "format_version": 1,
        "runtime": "onnxruntime",
        "runtime_version": "1.31.1",
        "precision": "int8",
        "threads": 1,
        "noise_floor": 0.015,
        "date": "2026-11-21",
        "rows": len(rows),
        **header,
    }
    lines = [f"# {key}: {value}" for key, value in header.items()]
    atomic_write(path, "\n".join([*lines, columns, *rows]) + "\n")


def write_training(folder: Path, epochs: int = 8) -> None:
    write_yaml(
        folder / "network.yaml",
        {"space": SPACE, "blocks": CHOSEN, "class_names": list("0123456789")},
    )
    for epoch in range(epochs):
        dip = 0.02 if epoch == epochs - 1 else 0.0  # the last epoch is not the best
        append_jsonl(
            folder / "metrics.jsonl",
            {
                "epoch": epoch,
                "loss": 2.0 * 0.7**epoch,
                "accuracy": 1 - 0.8 * 0.6**epoch,
                "validation_loss": 2.1 * 0.72**epoch + 0.05,
                "validation_accuracy": 0.985 - 0.7 * 0.6**epoch - dip,
                "lr": 0.1,
                "seconds": 0.8,
            },
        )


def latency(value: float) -> dict[str, float]:
    return {
        "value": value,
        "low": round(0.98 * value, 5),
        "high": round(1.03 * value, 5),
        "samples": 40,
    }


def result() -> dict[str, Any]:
    draw = random.Random(0)
    common = {"params": 61_234, "macs": 3_210_000}
    stages: list[dict[str, Any]] = [
        {
            "name": "fp32",
            "accuracy_top1": 0.975,
            "latency_ms": latency(0.41),
            "model_bytes": 265_000,
        }
        | common
        | {"accepted": True, "reason": "the start", "file": "models/fp32.onnx"},
        {
            "name": "pruned",
            "accuracy_top1": 0.951,
            "latency_ms": latency(0.33),
            "model_bytes": 171_000,
        }
        | {"params": 40_100, "macs": 2_010_000, "accepted": False, "file": "models/pruned.onnx"}
        | {"reason": "costs 0.024 accuracy, more than max_accuracy_drop=0.01"},
        {
            "name": "int8",
            "accuracy_top1": 0.972,
            "latency_ms": latency(0.243),
            "model_bytes": 98_000,
        }
        | common
        | {"accepted": True, "reason": "1.69 times faster", "file": "models/int8.onnx"},
    ]
    candidates = []
    for number in range(8):
        predicted = 0.2 + 0.01 * number
        blocks = [draw.choice([b for b in BLOCKS if offered(k, b)]) for k in range(len(SHAPES))]
        candidates.append(
            {
                "architecture": blocks,
                "predicted_latency_ms": predicted,
                "latency_ms": latency(round(predicted * draw.uniform(0.97, 1.03), 5)),
            }
        )
    networks = []
    for number in range(12):
        predicted = 0.15 + 0.015 * number
        corrected = 1.05 * predicted + 0.01
        measured = corrected * draw.uniform(0.97, 1.03)
        networks.append({"predicted_ms": predicted, "corrected_ms": corrected})
        networks[-1] |= {"measured_ms": measured, "held_out": number % 4 == 0}
    calibration = {"scale": 1.05, "base_ms": 0.01, "bias_before": 0.91, "error_before": 0.09}
    calibration |= {"error_after": 0.021, "noise_floor": 0.015}
    device = {"name": "local", "runtime": "onnxruntime", "runtime_version": "1.31.1"}
    device |= {"precision": "int8", "threads": 1, "cpu": "a 2-core <x86> machine"}
    return {
        "command": "run",
        "command_line": "fbnas run experiment=quickstart seed=3",
        "version": "0.1.0",
        "seconds": 212.4,
        "seed": 3,
        **common,
        "accuracy_top1": 0.972,
        "latency_ms": latency(0.243),
        "predicted_latency_ms": 0.238,
        "target_ms": BUDGET_MS,
        "model_bytes": 98_000,
        "noise_floor": 0.015,
        "stages": stages,
        "architecture": CHOSEN,
        "candidates": candidates,
        "device": device,
        "space": "quickstart",
        "calibration": calibration | {"networks": networks},
    }


def write_run(folder: Path) -> Path:
    write_search(folder / "search", table=str(folder / "table.csv"))
    write_front(folder / "search")
    write_table(folder / "table.csv")
    write_training(folder / "train")
    write_yaml(folder / "config.yaml", {"seed": 3, "target_ms": BUDGET_MS, "note": "</script><b>"})
    write_json(folder / "result.json", result())
    return folder
