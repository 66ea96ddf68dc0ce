"""One backbone with two heads, trained and compressed together, against two separate networks.

    python scripts/heads/measure.py WORK CIFAR_FOLDER [--fashion FOLDER] [--steps train,time,write]

CIFAR_FOLDER holds CIFAR-10's train.parquet and test.parquet, FOLDER Fashion-MNIST's four files. One
head names the ten classes of CIFAR-10. The other is a near task (is it a vehicle or an animal?
asked of the same pictures) or a far one (which of ten clothes?). Each network has the same
architecture, is trained, has a quarter of its channels pruned and is tuned, and is quantized; each
stage is exported, and the accuracy is that of the file. What is trained is kept in WORK, where the
script goes on after an interrupt.
"""

import argparse
import copy
import gzip
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from fbnas.commands.parts import card_for
from fbnas.compression import ChannelPruning, StaticQuantization, compress_, quantize_file
from fbnas.export import export_onnx, judge_file
from fbnas.files import atomic_write
from fbnas.latency import Device
from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import (
    Data,
    Images,
    Subset,
    TensorImages,
    TrainingSettings,
    load_data,
    train,
)
from fbnas.training.heads import join_data, task_of

sys.path.append(str(Path(__file__).parents[1]))
from steps import append_rows, circumstances, is_known, rows_of, spread, steps_asked, take

HERE = Path(__file__).parent
BLOCKS = ("k3_e1", "k5_e6", "k5_e6", "k5_e6", "k5_e6", "k5_e6")
PAIRS = {"near": ("object", "kind"), "far": ("object", "clothes")}
STAGES = ("fp32", "pruned", "int8")
VEHICLES = (0, 1, 8, 9)  # airplane, automobile, ship, truck
CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)
AUGMENT = {"crop_padding": 2, "flip": True}
PRUNED = 0.25  # of the channels


@dataclass(frozen=True)
class Study:
    """Where it works, on how much, and the data of each head."""

    arguments: argparse.Namespace
    space: SearchSpace
    heads: Mapping[str, Data]

    @property
    def rows(self) -> Path:
        return self.arguments.work / "rows.csv"

    @property
    def pairs(self) -> dict[str, tuple[str, ...]]:
        return {pair: heads for pair, heads in PAIRS.items() if all(x in self.heads for x in heads)}

    def data(self, name: str) -> Data:
        """Of a pair's heads as one, or of one head."""
        if name in PAIRS:
            return join_data({head: self.heads[head] for head in PAIRS[name]})
        return self.heads[name]

    def file(self, name: str, stage: str, seed: int) -> Path:
        return Path(self.arguments.work / f"{name}_{seed}_{stage}.onnx")


def objects(folder: Path, space: SearchSpace, images: int, test_images: int) -> Data:
    data = load_data(
        "huggingface", path=str(folder), limit=images, resize=True, channels=3, space=space
    )
    first = torch.arange(test_images)
    return replace(data, load_test=lambda: Subset(data.test, first))


def kinds(data: Data) -> Data:
    """The same pictures, asked whether they show a vehicle or an animal."""

    def asked(images: Images) -> TensorImages:
        vehicle = torch.isin(images.labels, torch.tensor(VEHICLES))
        return TensorImages(images.batch(torch.arange(len(images))), (~vehicle).long())

    return replace(
        data,
        name="vehicle or animal",
        class_names=("vehicle", "animal"),
        train=asked(data.train),
        validation=asked(data.validation),
        load_test=lambda: asked(data.test),
    )


def clothes(folder: Path, like: Data) -> Data:
    """As many pictures of Fashion-MNIST as the other data has, of the same size."""
    side = like.resolution

    def read(split: str, first: int, last: int) -> TensorImages:
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        whole = torch.from_numpy(pixels[first:last].copy()).float()
        small = F.interpolate(whole, (side, side), mode="bilinear", antialias=True)
        grey = small.round().clamp(0, 255).to(torch.uint8)
        kept = torch.from_numpy(labels[first:last].astype(np.int64))
        return TensorImages(grey.expand(-1, 3, -1, -1).contiguous(), kept)

    count = len(like.train)
    return replace(
        like,
        name="Fashion-MNIST",
        class_names=CLOTHES,
        train=read("train", 0, count),
        validation=read("train", count, count + len(like.validation)),
        load_test=lambda: read("t10k", 0, len(like.test)),
    )


def train_all(study: Study) -> None:
    """Train, prune and quantize what rows.csv does not know yet: pairs, then single heads."""
    singles = dict.fromkeys(head for heads in study.pairs.values() for head in heads)
    for seed in range(study.arguments.seeds):
        for name in (*study.pairs, *singles):
            if not is_known(rows_of(study.rows), name=name, seed=seed):
                append_rows(study.rows, rows_for(study, name, seed))


def rows_for(study: Study, name: str, seed: int) -> list[dict[str, Any]]:
    """Make the three files of a network; a row for each of its heads and stages."""
    data = study.data(name)
    architecture = Architecture(BLOCKS, study.space.name)
    card, task = card_for(study.space, architecture, data), task_of(data.heads)

    def learn(network: nn.Module, epochs: int, lr: float) -> None:
        settings = TrainingSettings(epochs=epochs, lr=lr, augment=AUGMENT)
        train(network, data, settings=settings, seed=seed, task=task)

    torch.manual_seed(seed)
    network = build_network(study.space, architecture, data.classes)
    learn(network, study.arguments.epochs, 0.1)
    files = {stage: study.file(name, stage, seed) for stage in STAGES}
    export_onnx(network, files["fp32"], card=card)
    pruned = copy.deepcopy(network)
    compress_(
        pruned,
        ChannelPruning(ratio=PRUNED),
        train=lambda model: learn(model, study.arguments.tuning_epochs, 0.02),
        data=data,
        seed=seed,
        task=task,
    )
    export_onnx(pruned, files["pruned"], card=card)
    method = StaticQuantization(pays=False)
    quantize_file(files["pruned"], files["int8"], data, method, seed=seed, task=task)
    rows = []
    for stage, file in files.items():
        found = judge_file(file, data, data.test)
        for head, accuracy in (found.heads or {name: found.all}).items():
            rows.append(
                {
                    "name": name,
                    "seed": seed,
                    "stage": stage,
                    "head": head,
                    "accuracy": accuracy,
                    "bytes": file.stat().st_size,
                }
            )
        print(f"{name}, seed {seed}, {stage}: {found}", flush=True)
    return rows


def time_all(study: Study) -> None:
    """Time the files of seed 0 against each other."""
    names = sorted(set(rows_of(study.rows).name))
    chosen = [(name, stage) for name in names for stage in STAGES]
    found = Device().measure_quietly(
        [study.file(name, stage, 0) for name, stage in chosen], "Timing", seed=0
    )
    rows = [
        {"name": name, "stage": stage, "ms": timing.latency_ms, "noise_floor": found.noise_floor}
        for (name, stage), timing in zip(chosen, found.whole, strict=True)
    ]
    atomic_write(study.arguments.work / "latency.csv", pd.DataFrame(rows).to_csv(index=False))


def write(study: Study) -> None:
    """Write result.md, and the rows beside it."""
    rows, times = rows_of(study.rows), rows_of(study.arguments.work / "latency.csv")
    lines = [
        "| heads | stage | test accuracy, %, together (seeds) | apart | kB together, apart "
        "| ms together, apart |",
        "|---|---|---|---|---|---|",
    ]
    for pair, heads in study.pairs.items():
        for stage in STAGES:
            here = rows[rows.stage == stage]
            joint = here[here.name == pair]
            single = {head: here[here.name == head] for head in heads}
            together = [spread(joint[joint["head"] == head].accuracy) for head in heads]
            apart = [spread(single[head].accuracy) for head in heads]
            kilobytes = (joint.bytes.mean(), sum(x.bytes.mean() for x in single.values()))
            sizes = ", ".join(f"{x / 1000:.0f}" for x in kilobytes)
            lines.append(
                f"| {' and '.join(heads)} | {stage} | {'; '.join(together)} | {'; '.join(apart)} "
                f"| {sizes} | {milliseconds(times, pair, heads, stage)} |"
            )
    noise = (
        f"Noise floor of the latencies: {100 * times.noise_floor.max():.1f} %. "
        if len(times)
        else ""
    )
    counts = ", ".join(f"{len(data.train):,} for {head}" for head, data in study.heads.items())
    text = f"{noise}Training images: {counts}.\n\n{circumstances(Device())}\n" + "\n".join(lines)
    atomic_write(study.arguments.out / "result.md", text + "\n")
    atomic_write(study.arguments.out / "rows.csv", rows.to_csv(index=False, float_format="%.6g"))
    print(text)


def milliseconds(times: pd.DataFrame, pair: str, heads: tuple[str, ...], stage: str) -> str:
    if times.empty:
        return "not timed"
    ms = times[times.stage == stage].set_index("name").ms
    return f"{ms[pair]:.4g}, {sum(ms[head] for head in heads):.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="of a head, validation included")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--tuning-epochs", type=int, default=4)
    parser.add_argument("--steps", default="train,time,write")
    arguments = parser.parse_args()
    actions = {"train": train_all, "time": time_all, "write": write}
    steps = steps_asked(parser, arguments.steps, actions)
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    space = SearchSpace.load(HERE.parent / "ground_truth" / "space.yaml")
    heads = {"object": objects(arguments.cifar, space, arguments.images, arguments.test_images)}
    heads["kind"] = kinds(heads["object"])
    if arguments.fashion:
        heads["clothes"] = clothes(arguments.fashion, heads["object"])
    take(steps, actions, Study(arguments, space, heads))


if __name__ == "__main__":
    main()
