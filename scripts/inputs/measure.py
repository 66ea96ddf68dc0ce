"""Inputs that cost less: smaller images, and a stem that sees a wavelet split of them.

    python scripts/inputs/measure.py WORK CIFAR_FOLDER [--steps train,time,write]

CIFAR_FOLDER holds CIFAR-10's train.parquet and test.parquet. One network (the space of
`scripts/cross_device`, 10 layers, `k3_e3` in each) is trained alike on every kind of input of KINDS
and exported; accuracy is that of the file on test images, latency is measured over the files of
seed 0, interleaved. What is trained is kept in WORK, where the script goes on after an interrupt.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch

from fbnas.commands.parts import card_for
from fbnas.export import export_onnx, judge_file
from fbnas.files import atomic_write
from fbnas.latency import Device
from fbnas.space import Architecture, SearchSpace, build_network, count
from fbnas.training import Data, Subset, TrainingSettings, load_data, train

sys.path.append(str(Path(__file__).parents[1]))
from steps import append_rows, circumstances, is_known, part_of, rows_of, spread, steps_asked, take

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
BLOCK = "k3_e3"


@dataclass(frozen=True)
class Kind:
    """What the network sees: images of a side, through a stem of a stride, split or not."""

    side: int
    stride: int
    wavelet: bool = False

    def __str__(self) -> str:
        return f"{self.side} px, stem stride {self.stride}{', wavelet' if self.wavelet else ''}"

    def space(self) -> SearchSpace:
        base = SearchSpace.load(HERE.parent / "cross_device" / "space.yaml").to_dict()
        stem = {"channels": 16, "stride": self.stride, "wavelet": self.wavelet}
        return SearchSpace.from_dict(
            {**base, "name": "inputs", "resolution": self.side, "stem": stem}
        )


KINDS = (
    Kind(32, 2),
    Kind(32, 2, wavelet=True),
    Kind(24, 2),
    Kind(32, 4),
    Kind(32, 4, wavelet=True),
    Kind(16, 2),
)


@dataclass(frozen=True)
class Study:
    """Where it works, and on how much."""

    arguments: argparse.Namespace

    @property
    def rows(self) -> Path:
        return Path(self.arguments.work / "rows.csv")

    def file(self, kind: Kind, seed: int) -> Path:
        name = f"{kind.side}_{kind.stride}{'_wavelet' if kind.wavelet else ''}_{seed}.onnx"
        return Path(self.arguments.work / name)

    def data(self, space: SearchSpace) -> Data:
        arguments = self.arguments
        data = load_data(
            "huggingface",
            path=str(arguments.cifar),
            limit=arguments.images,
            resize=True,
            space=space,
        )
        judging = torch.arange(arguments.test_images)
        return replace(data, load_test=lambda: Subset(data.test, judging))


def train_all(study: Study) -> None:
    """Train and judge what rows.csv does not know yet."""
    arguments = study.arguments
    everything = [(seed, kind) for seed in range(arguments.seeds) for kind in KINDS]
    for seed, kind in part_of(everything, arguments.part):
        if is_known(rows_of(study.rows), kind=str(kind), seed=seed):
            continue
        space = kind.space()
        architecture = Architecture((BLOCK,) * len(space.layers), space.name)
        data = study.data(space)
        torch.manual_seed(seed)
        network = build_network(space, architecture, data.classes)
        augment = {"crop_padding": kind.side // 8, "flip": True}
        settings = TrainingSettings(epochs=arguments.epochs, augment=augment)
        train(network, data, settings=settings, seed=seed)
        path = study.file(kind, seed)
        export_onnx(network, path, card=card_for(space, architecture, data))
        sizes = count(network, (space.input_channels, kind.side, kind.side))
        accuracy = judge_file(path, data, data.test).all
        row = {"kind": str(kind), "seed": seed, "accuracy": accuracy, "macs": sizes.macs}
        append_rows(study.rows, [{**row, "params": sizes.params}])
        print(f"seed {seed}, {kind}: {accuracy:.4f}", flush=True)


def time_all(study: Study) -> None:
    """Time the files of seed 0 against each other."""
    files = [study.file(kind, 0) for kind in KINDS]
    found = Device().measure_quietly(files, "Timing", seed=0)
    rows = [
        {"kind": str(kind), "ms": timing.latency_ms, "noise_floor": found.noise_floor}
        for kind, timing in zip(KINDS, found.whole, strict=True)
    ]
    atomic_write(study.arguments.work / "latency.csv", pd.DataFrame(rows).to_csv(index=False))


def write(study: Study) -> None:
    """Write result.md, result.csv and inputs.png."""
    arguments = study.arguments
    times = rows_of(arguments.work / "latency.csv")
    rows = rows_of(study.rows).merge(times, on="kind")
    lines = [
        "| input | M multiply-adds | ms | test accuracy, % (seeds) |",
        "|---|---|---|---|",
    ]
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for kind in KINDS:
        mine = rows[rows.kind == str(kind)]
        ms, macs = mine.ms.iloc[0], mine.macs.iloc[0] / 1e6
        lines.append(f"| {kind} | {macs:.2f} | {ms:.4f} | {spread(mine.accuracy)} |")
        colour = "tab:orange" if kind.wavelet else "tab:blue"
        mean, deviation = 100 * mine.accuracy.mean(), 100 * mine.accuracy.std()
        axes.errorbar(ms, mean, deviation, fmt="o", color=colour, capsize=3)
        side = {"xytext": (7, -3)} if kind.wavelet else {"xytext": (-7, -3), "ha": "right"}
        axes.annotate(str(kind), (ms, mean), textcoords="offset points", fontsize=8, **side)
    axes.margins(x=0.75)
    axes.set_xlabel("measured latency, ms")
    axes.set_ylabel("test accuracy, %: mean and deviation of seeds")
    figure.savefig(arguments.out / "inputs.png", dpi=110)
    noise = f"Noise floor of the latencies: {100 * times.noise_floor.max():.1f} %. "
    amount = (
        f"{arguments.images:,} training images, a fifth of them validate; "
        f"{arguments.test_images:,} test images; {arguments.epochs} epochs."
    )
    text = f"{noise}{amount}\n\n{circumstances(Device())}\n" + "\n".join(lines)
    atomic_write(arguments.out / "result.md", text + "\n")
    atomic_write(arguments.out / "result.csv", rows.to_csv(index=False, float_format="%.6g"))
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--part", default="0/1", help="this part of so many, from 0, of train")
    parser.add_argument("--steps", default="train,time,write")
    arguments = parser.parse_args()
    actions = {"train": train_all, "time": time_all, "write": write}
    steps = steps_asked(parser, arguments.steps, actions)
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    take(steps, actions, Study(arguments))


if __name__ == "__main__":
    main()
