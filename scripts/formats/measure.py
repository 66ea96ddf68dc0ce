"""Every file that can be made of one network, and what int8 of each of its layers saves here.

    FBNAS_LITERT_PYTHON=PATH python scripts/formats/measure.py WORK NETWORK CIFAR_FOLDER

NETWORK is the folder of a network trained on CIFAR-10 at the resolution of its space (that of
`scripts/compression`, WORK/base_0, was taken). `fbnas export format=all` and `fbnas compress
method=int8` do the work, both at once; result.md, files.csv and int8_saves.csv are written beside
this file. Wants a quiet machine for some minutes.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from fbnas.commands import compress, export
from fbnas.commands.composition import compose
from fbnas.files import atomic_write, read_json
from fbnas.latency import Device

sys.path.append(str(Path(__file__).parents[1]))
from steps import circumstances

HERE = Path(__file__).parent
SAVES = "int8_saves.csv"


def files_of(work: Path, network: Path, data: list[str]) -> pd.DataFrame:
    """Write, check, judge and time the files, unless that was done; a row for each."""
    out = work / "files"
    if not (out / "result.json").is_file():
        options = [f"model={network}", "format=all", *data, f"out={out}", "overwrite=true"]
        export.main(compose("export", options))
    return pd.DataFrame([flat(row) for row in read_json(out / "result.json")["files"]])


def flat(row: dict[str, Any]) -> dict[str, Any]:
    latency = row.get("latency_ms") or {}
    others = {key: value for key, value in row.items() if key != "latency_ms"}
    return {
        **others,
        "latency_ms": latency.get("value"),
        "low_ms": latency.get("low"),
        "high_ms": latency.get("high"),
    }


def int8_of(work: Path, network: Path, data: list[str]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Quantize with `pays`, unless that was done: what was measured, and a row for each layer."""
    out = work / "int8"
    if not (out / "result.json").is_file():
        options = [f"model={network}", "method=int8", *data, f"out={out}", "overwrite=true"]
        compress.main(compose("compress", options))
    shutil.copy(out / SAVES, HERE / SAVES)
    return read_json(out / "result.json")["int8"], pd.read_csv(out / SAVES)


def page(files: pd.DataFrame, int8: dict[str, Any], saves: pd.DataFrame) -> str:
    lines = [
        "# Files of one network",
        "",
        circumstances(Device()),
        "Files of a runtime are timed against each other, one thread, batch 1; accuracy is that of "
        "the file on all test images, and its largest difference from torch's scores on 256 "
        "validation images is relative to the largest score.",
        "",
        "| file | runtime | precision | bytes | accuracy, % | largest difference | same class, % "
        "| ms (low to high) | noise, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    made = files[files.left_out.isna()] if "left_out" in files else files
    for row in made.itertuples():
        lines.append(
            f"| {row.file} | {row.runtime} | {row.precision} | {int(row.bytes):,} "
            f"| {100 * row.accuracy_top1:.2f} | {row.parity_max_error:.1e} "
            f"| {100 * row.parity_argmax_agreement:.1f} | {row.latency_ms:.4f} ({row.low_ms:.4f} "
            f"to {row.high_ms:.4f}) | {100 * row.noise_floor:.1f} |"
        )
    for row in files.drop(made.index).itertuples():
        lines.append(f"\nLeft out: {row.format}, {row.precision}: {row.left_out}")
    return "\n".join([*lines, "", *layers(int8, saves), ""])


def layers(int8: dict[str, Any], saves: pd.DataFrame) -> list[str]:
    """Say what int8 of each layer does to the latency, the largest gain first."""
    measured = int8["measured"]
    times = {key: measured[f"{key}_ms"] for key in ("fp32", "int8", "mixed")}
    said = ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items() if ms is not None)
    changes_us = 1e3 * saves.change_ms[:-1]
    lines = [
        "## What int8 does per layer",
        "",
        f"ONNX Runtime: {said} (noise {100 * measured['noise_floor']:.1f} %); "
        f"{int8['fastest']} is taken. A change of precision between two layers costs "
        f"{changes_us.min():.1f} to {changes_us.max():.1f} us (median {changes_us.median():.1f}).",
        "",
        "| layer | int8 saves, us | a change after it costs, us | left in float |",
        "|---|---|---|---|",
    ]
    for row in saves.sort_values("saved_ms", ascending=False).itertuples():
        left = "yes" if row.left_in_float else ""
        cost_us = 1e3 * row.change_ms
        lines.append(f"| {row.layer} | {1e3 * row.saved_ms:+.2f} | {cost_us:.2f} | {left} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for the files")
    parser.add_argument("network", type=Path, help="folder of fbnas train")
    parser.add_argument("cifar", type=Path, help="holds CIFAR-10's train and test.parquet")
    parser.add_argument("--images", type=int, default=20000, help="as the network was trained on")
    options = parser.parse_args()
    data = ["data=huggingface", f"data.path={options.cifar}", "data.resize=true",
            f"data.limit={options.images}"]  # fmt: skip
    files = files_of(options.work, options.network, data)
    int8, saves = int8_of(options.work, options.network, data)
    files.to_csv(HERE / "files.csv", index=False, float_format="%.6g")
    text = page(files, int8, saves)
    atomic_write(HERE / "result.md", text)
    print(text)


if __name__ == "__main__":
    main()
