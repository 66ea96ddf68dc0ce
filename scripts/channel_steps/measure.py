"""At which channels does this machine get faster, and does a plan that knows it lose less?

    python scripts/channel_steps/measure.py WORK CIFAR_FOLDER [--steps stairs,train,prune,report]
        [--images 4000] [--epochs 12] [--tuning 4] [--ratios 0.15,0.3,0.45] [--seeds 0]
        [--out scripts/channel_steps]

Steps, in order:

    stairs  one layer at every fourth width, fp32 and int8 (wants a quiet machine)
    train   the network that is pruned
    prune   uniform ratios, each measured; then latency-aware pruning to the latency of each
            (measures: wants a quiet machine), then both fine-tuned alike
    report  OUT/result.md, staircase.csv, rows.csv and staircase.png

WORK keeps it all: the same command continues. CIFAR_FOLDER holds train.parquet and test.parquet.
"""

import argparse
import contextlib
import copy
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from fbnas.commands.compress import DeviceMeasure
from fbnas.commands.parts import card_for
from fbnas.compression import ChannelPruning, LatencyPruning, Tools
from fbnas.compression.channel_steps import LEAST_NOISE, Piece, useful
from fbnas.latency import Device
from fbnas.latency.devices import ROUNDS, Measurement
from fbnas.latency.profiling import one_torch_thread
from fbnas.space import Architecture, SearchSpace, build_network, count, load_network, save_network
from fbnas.training import Data, TrainingSettings, evaluate, load_data, train

sys.path.append(str(Path(__file__).parents[1]))
from steps import append_rows, circumstances, is_known, rows_of, spread

HERE = Path(__file__).parent
BLOCKS = ("k3_e3", "k5_e6", "k3_e6", "k5_e6", "k3_e6")
LAYERS = {  # channels in, kernel, side: as convolutions of small networks are
    "1x1, 96 in, 16x16": (96, 1, 16),
    "3x3, 32 in, 16x16": (32, 3, 16),
}
WIDTHS = range(4, 129, 4)
LOCK_SECONDS = 20
PRIORITY = -15


def stairs(args: argparse.Namespace) -> None:
    """Time each layer at every width, against each other."""
    path = args.work / "staircase.csv"
    for precision in ("fp32", "int8"):
        for name, (channels, kernel, side) in LAYERS.items():
            if is_known(rows_of(path), layer=name, precision=precision):
                continue
            torch.manual_seed(0)
            pieces = [
                Piece(
                    nn.Conv2d(channels, width, kernel, padding=kernel // 2), (channels, side, side)
                )
                for width in WIDTHS
            ]
            ms = measure_on(precision, args)([*pieces, *pieces])
            again = zip(ms[: len(pieces)], ms[len(pieces) :], strict=True)
            append_rows(
                path,
                [
                    {"layer": name, "precision": precision, "width": width, "ms": min(both),
                     "noise": abs(both[0] - both[1]) / min(both)}
                    for width, both in zip(WIDTHS, again, strict=True)
                ],
            )  # fmt: skip


class QuietDevice(Device):
    """Times before other processes: alone with FBNAS_LOCK if it can be had, else by priority."""

    def measure_quietly(
        self, files: Sequence[Path], description: str, *, rounds: int = ROUNDS, seed: int = 0
    ) -> Measurement:
        with locked(fcntl.LOCK_EX), first_in_line():
            found = super().measure_quietly(files, description, rounds=rounds, seed=seed)
        print(f"{description}: noise floor {100 * found.noise_floor:.2f} %", flush=True)
        return found


@contextmanager
def locked(kind: int) -> Iterator[None]:
    """Hold the file FBNAS_LOCK, if one is named; shared where nobody lets go of it for a while."""
    if not os.environ.get("FBNAS_LOCK"):
        yield
        return
    with Path(os.environ["FBNAS_LOCK"]).open("a") as file:
        for _ in range(LOCK_SECONDS):
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(1)
        else:
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def first_in_line() -> Iterator[None]:
    """Run before other processes, where that is allowed; what is started here does too."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def measure_on(precision: str, args: argparse.Namespace) -> DeviceMeasure:
    args.work.mkdir(parents=True, exist_ok=True)
    return DeviceMeasure(QuietDevice(precision=precision), (3, 16, 16), args.work, 0)


def images(args: argparse.Namespace) -> Data:
    space = SearchSpace.load(HERE / "space.yaml")
    return load_data(
        "huggingface", path=str(args.cifar), resize=True, space=space, limit=args.images
    )


def settings(epochs: int, lr: float) -> TrainingSettings:
    return TrainingSettings(epochs=epochs, lr=lr, augment={"flip": True}, device="cpu")


def trained(args: argparse.Namespace, data: Data, seed: int) -> nn.Module:
    """The network that is pruned, trained once."""
    folder = args.work / f"network_{seed}"
    if not (folder / "network.yaml").is_file():
        space = SearchSpace.load(HERE / "space.yaml")
        architecture = Architecture(BLOCKS, space.name)
        torch.manual_seed(seed)
        network = build_network(space, architecture, data.classes)
        with locked(fcntl.LOCK_SH):
            train(network, data, settings=settings(args.epochs, 0.1), seed=seed, out=folder,
                  resume=True)  # fmt: skip
        save_network(folder, network, card_for(space, architecture, data))
    return load_network(folder)[0]


def prune(args: argparse.Namespace, data: Data) -> None:
    """Prune uniformly and latency-aware to the same latency, from the same network."""
    for seed in args.seeds:
        network = trained(args, data, seed)
        record(args, data, network, seed, {"method": "none", "ratio": 0.0, "fraction": 1.0})
        for ratio in args.ratios:
            uniform(args, data, network, seed, ratio)
            latency_aware(args, data, network, seed, ratio)


def uniform(
    args: argparse.Namespace, data: Data, network: nn.Module, seed: int, ratio: float
) -> None:
    row = {"method": "uniform", "ratio": ratio}
    if is_known(rows_of(args.work / "rows.csv"), seed=seed, **row):
        return
    pruned = copy.deepcopy(network)
    method = ChannelPruning(ratio=ratio, importance="taylor", round_to=args.round_to)
    method.apply_(pruned, Tools((3, 16, 16), data=data, seed=seed))
    before, after = measure_on("fp32", args)([network, pruned])
    tune(args, data, pruned, seed)
    record(args, data, pruned, seed, {**row, "fraction": after / before})


def latency_aware(
    args: argparse.Namespace, data: Data, network: nn.Module, seed: int, ratio: float
) -> None:
    row = {"method": "latency_aware", "ratio": ratio}
    rows = rows_of(args.work / "rows.csv")
    alike = rows[(rows.method == "uniform") & (rows.seed == seed) & (rows.ratio == ratio)]
    goal = float(alike.fraction.iloc[0])
    if is_known(rows_of(args.work / "rows.csv"), seed=seed, **row):
        return
    pruned, device = copy.deepcopy(network), measure_on("fp32", args)
    folder = args.work / f"latency_{seed}"  # the layers are timed once for all ratios
    folder.mkdir(exist_ok=True)
    method = LatencyPruning(latency=goal, tolerance=0.01, granularity=args.round_to)
    tools = Tools((3, 16, 16), data=data, measure=device, folder=folder, seed=seed)
    method.apply_(pruned, tools)
    (folder / "latency_pruning.json").rename(folder / f"plan_{ratio:g}.json")
    before, after = device([network, pruned])  # once more, as the uniform one was
    tune(args, data, pruned, seed)
    record(args, data, pruned, seed, {**row, "fraction": after / before})


def tune(args: argparse.Namespace, data: Data, network: nn.Module, seed: int) -> None:
    with locked(fcntl.LOCK_SH):
        train(network, data, settings=settings(args.tuning, 0.02), seed=seed)


def record(
    args: argparse.Namespace, data: Data, network: nn.Module, seed: int, row: dict[str, object]
) -> None:
    path = args.work / "rows.csv"
    if is_known(rows_of(path), seed=seed, method=row["method"], ratio=row["ratio"]):
        return
    counted = count(network, (3, 16, 16))
    accuracy = evaluate(network, data.test, mean=data.mean, std=data.std)[1]
    found = {"params": counted.params, "macs": counted.macs, "accuracy": accuracy}
    append_rows(path, [{**row, "seed": seed, **found}])
    print({**row, "seed": seed, **found}, flush=True)


def report(args: argparse.Namespace) -> None:
    lines = ["# Channel steps", "", circumstances(Device(), Device(precision="int8")), ""]
    rows = rows_of(args.work / "rows.csv")
    lines += [
        "| pruning | channels gone, uniform | of the network's own latency, measured | M macs "
        "| test accuracy, % (n) |",
        "|---|---|---|---|---|",
    ]
    for (ratio, method), same in rows.groupby(["ratio", "method"], sort=True):
        lines.append(
            f"| {method} | {ratio:g} | {same.fraction.mean():.3f} | {same.macs.mean() / 1e6:.2f} "
            f"| {spread(same.accuracy)} |"
        )
    found = rows_of(args.work / "staircase.csv")
    lines += ["", "| layer | precision | noise, median | widths at which it gets faster |",
              "|---|---|---|---|"]  # fmt: skip
    for (layer, precision), same in found.groupby(["layer", "precision"]):
        noise = float(same.noise.median())
        least = max(noise, LEAST_NOISE) * float(same.ms.median())
        kept = useful(dict(zip(same.width, same.ms, strict=True)), least)
        widths = ", ".join(map(str, sorted(int(width) for width in kept)))
        lines.append(f"| {layer} | {precision} | {100 * noise:.1f} % | {widths} |")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.md").write_text("\n".join(lines) + "\n")
    found.to_csv(args.out / "staircase.csv", index=False, float_format="%.5g")
    rows.to_csv(args.out / "rows.csv", index=False, float_format="%.5g")
    plot(found, args.out / "staircase.png")


def plot(found: pd.DataFrame, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axis, (layer, same) in zip(axes, found.groupby("layer"), strict=True):
        for precision, line in same.groupby("precision"):
            axis.step(line.width, 1000 * line.ms, where="pre", marker=".", label=precision)
        axis.set(title=layer, xlabel="output channels", ylabel="microseconds", ylim=(0, None))
        axis.set_xticks(np.arange(0, 129, 16))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--steps", default="stairs,train,prune,report")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--tuning", type=int, default=4)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--ratios", default="0.15,0.3,0.45")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    args.ratios = [float(text) for text in args.ratios.split(",")]
    args.seeds = [int(text) for text in args.seeds.split(",")]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    steps = args.steps.split(",")
    data = images(args) if {"train", "prune"} & set(steps) else None
    with one_torch_thread():
        if "stairs" in steps:
            stairs(args)
        if "train" in steps:
            for seed in args.seeds:
                trained(args, data, seed)
        if "prune" in steps:
            prune(args, data)
        if "report" in steps:
            report(args)


if __name__ == "__main__":
    main()
