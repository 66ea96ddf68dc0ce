"""Deep Compression of the paper's two LeNets on real images, and of an FBNet: sizes and accuracies.

    python scripts/deep_compression/measure.py WORK --mnist FOLDER --fashion FOLDER --fbnet

README.md says where the images come from. What is trained is kept in WORK: the script goes on where
it was stopped, and writes result.csv, layers.csv and result.md beside itself.
"""

import argparse
import copy
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lenet import PAPER, LayerDensities, idx_data, lenet
from torch import nn

import fbnas
from fbnas.compression import (
    PackedTensor,
    WeightSharing,
    compress_,
    describe,
    pack,
    read_packed,
    unpack,
    write_packed,
)
from fbnas.files import atomic_write, read_json, write_json
from fbnas.space import Architecture, SearchSpace, build_network, load_tensors_
from fbnas.training.data import Data, load_data
from fbnas.training.evaluation import evaluate
from fbnas.training.loop import train
from fbnas.training.settings import TrainingSettings

HERE = Path(__file__).parent
SHAPE = (1, 28, 28)
SOURCES = {"mnist": "MNIST", "fashion": "Fashion-MNIST", "digits": "digits"}
CODERS = ("huffman", "arithmetic")
COMMON = {"batch_size": 128, "label_smoothing": 0.0, "weight_decay": 1e-4}
# Epochs and rates: of the training, of each of the steps of pruning, of the shared values. The last
# is small because the gradient of a value is here the sum over all weights that share it.
RECIPES: dict[str, dict[str, Any]] = {
    "lenet_300_100": {
        "train": {"epochs": 15, "lr": 0.1, "ema": 0.99},
        "prune": {"epochs": 5, "lr": 0.05, "ema": 0.99},
        "share": {"epochs": 3, "lr": 0.0003, "ema": 0.99},
        "steps": 4,
    },
    "lenet_5": {
        "train": {"epochs": 6, "lr": 0.05, "ema": 0.99},
        "prune": {"epochs": 5, "lr": 0.05, "ema": 0.99, "weight_decay": 5e-4},  # Caffe's decay
        "share": {"epochs": 1, "lr": 0.0001, "ema": 0.99},
        "steps": 3,
    },
}
# One block of each kind, of the space of `fbnas run experiment=quickstart`.
BLOCKS = ("k3_e1", "k5_e3", "k3_e3", "k5_e1_g2", "k3_e6", "k5_e6", "k3_e1_g2")
POINTS = ((0.5, 6), (0.3, 5), (0.15, 4))  # density and bits of every layer but depthwise ones
FBNET = {
    "train": {"epochs": 30, "lr": 0.1, "batch_size": 32},
    "prune": {"epochs": 8, "lr": 0.03, "batch_size": 32},
    "share": {"epochs": 4, "lr": 0.01, "batch_size": 32},
}


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    for source in ("mnist", "fashion"):
        folder = getattr(arguments, source)
        for name in arguments.networks if folder else ():
            data = idx_data(source, folder)
            for seed in range(arguments.seeds):
                study(arguments.work / f"{source}_{name}_{seed}", name, data, seed)
    for seed in range(arguments.seeds if arguments.fbnet else 0):
        study_fbnet(arguments.work, seed)
    write_results(arguments.work)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--fashion", type=Path)
    parser.add_argument("--networks", nargs="*", default=list(PAPER), choices=list(PAPER))
    parser.add_argument("--fbnet", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args()


def study(folder: Path, name: str, data: Data, seed: int) -> None:
    """Train, prune, share and pack one network, unless that was done."""
    if (folder / "facts.json").is_file():
        return
    paper, recipe = PAPER[name], RECIPES[name]
    torch.manual_seed(seed)
    network = lenet(name)
    kept(folder / "trained.packed", network, trainer(data, recipe["train"], seed))
    accuracy = {"trained": tested(network, data)}
    densities = LayerDensities(paper.density, recipe["steps"])
    kept(
        folder / "pruned.packed",
        network,
        lambda model: compress_(
            model, densities, input_shape=SHAPE, train=trainer(data, recipe["prune"], seed)
        ),
    )
    accuracy["pruned"] = tested(network, data)
    untuned = copy.deepcopy(network)
    sharing = WeightSharing(
        conv_bits=paper.conv_bits, linear_bits=paper.linear_bits, gradient="sum"
    )
    compress_(untuned, sharing, input_shape=SHAPE, seed=seed)
    accuracy["shared, before fine-tuning"] = tested(untuned, data)
    train_values = trainer(data, recipe["share"], seed)
    compress_(network, sharing, input_shape=SHAPE, train=train_values, seed=seed)
    accuracy["shared"] = tested(network, data)
    for coder in CODERS:
        write_packed(network, folder / f"{coder}.packed", coder)
    read_back = lenet(name)
    load_tensors_(read_back, read_packed(folder / "arithmetic.packed"), str(folder))
    accuracy["read back"] = tested(read_back, data)
    write_json(folder / "facts.json", {"accuracy": accuracy})
    print(folder.name, {k: round(v, 4) for k, v in accuracy.items()}, flush=True)


def kept(path: Path, network: nn.Module, make_: Callable[[nn.Module], Any]) -> None:
    """Do what is to be done to a network, or read what came of it before the script was stopped."""
    if path.is_file():
        load_tensors_(network, read_packed(path), str(path))
    else:
        make_(network)
        write_packed(network, path)
        print(path, flush=True)


def trainer(data: Data, settings: dict[str, Any], seed: int) -> Callable[[nn.Module], Any]:
    def run(network: nn.Module) -> Any:
        return train(network, data, settings=TrainingSettings(**{**COMMON, **settings}), seed=seed)

    return run


def tested(network: nn.Module, data: Data) -> float:
    return evaluate(network, data.test, mean=data.mean, std=data.std)[1]


def study_fbnet(work: Path, seed: int) -> None:
    """Train an FBNet on digits, then compress copies of it more and more, unless that was done."""
    folders = [work / f"digits_fbnet_{kept:g}_{bits}_{seed}" for kept, bits in POINTS]
    space, data = SearchSpace.load("quickstart"), load_data("digits", resolution=16, resize=True)
    torch.manual_seed(seed)
    whole = build_network(space, Architecture(BLOCKS, space.name), classes=data.classes)
    kept(work / f"fbnet_{seed}.packed", whole, trainer(data, FBNET["train"], seed))
    for folder, (density, bits) in zip(folders, POINTS, strict=True):
        if (folder / "facts.json").is_file():
            continue
        network = copy.deepcopy(whole)
        accuracy = {"trained": tested(network, data)}
        densities = tuple(1.0 if is_depthwise(layer) else density for layer in layers_of(network))
        pruning = LayerDensities(densities, 2)
        compress_(network, pruning, train=trainer(data, FBNET["prune"], seed))
        accuracy["pruned"] = tested(network, data)
        sharing = WeightSharing(conv_bits=bits, linear_bits=bits)
        compress_(network, sharing, train=trainer(data, FBNET["share"], seed), seed=seed)
        accuracy["shared"] = tested(network, data)
        for coder in CODERS:
            write_packed(network, folder / f"{coder}.packed", coder)
            write_json(folder / "facts.json", {"accuracy": accuracy})
        print(folder.name, accuracy, flush=True)


def layers_of(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.weight.shape[1] == 1


def write_results(work: Path) -> None:
    """Write result.csv, layers.csv and result.md of all that was done."""
    rows, layers = [], []
    for place in sorted(work.glob("*/facts.json")):
        source, name, seed = place.parent.name.split("_", 1)[0], *named(place.parent.name)
        row, parts = facts(place.parent)
        rows.append({"data": SOURCES[source], "network": name, "seed": seed, **row})
        layers += [{"data": SOURCES[source], "network": name, "seed": seed, **x} for x in parts]
    pd.DataFrame(rows).to_csv(HERE / "result.csv", index=False, float_format="%.6g")
    pd.DataFrame(layers).to_csv(HERE / "layers.csv", index=False, float_format="%.6g")
    atomic_write(HERE / "result.md", page(pd.DataFrame(rows), pd.DataFrame(layers)))


def named(folder: str) -> tuple[str, int]:
    """Return network and seed of a folder's name, SOURCE_NETWORK_SEED."""
    name, seed = folder.split("_", 1)[1].rsplit("_", 1)
    return name, int(seed)


def facts(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a network's row and one per layer; it is packed again, read back and compared."""
    found = read_json(folder / "facts.json")
    tensors = read_packed(folder / "huffman.packed")
    dense = sum(t.numel() * t.element_size() for t in tensors.values())
    weights = [name for name, tensor in tensors.items() if tensor.ndim > 1]
    kept = sum(int(tensors[name].count_nonzero()) for name in weights)
    row = {
        **{key: found["accuracy"][key] for key in ("trained", "pruned", "shared")},
        "weights": sum(tensors[name].numel() for name in weights),
        "kept": kept,
        "dense_bytes": dense,
    }
    packed: dict[str, dict[str, PackedTensor]] = {}
    for coder in CODERS:
        data = pack(tensors, coder)
        assert all(same_bits(tensor, tensors[name]) for name, tensor in unpack(data).items())
        packed[coder] = {tensor.name: tensor for tensor in describe(data)}
        row[f"{coder}_bytes"] = len(data)
    fixed = sum(fixed_bits(tensor) for tensor in packed["huffman"].values()) / 8
    row["fixed_bits_bytes"] = round(fixed)
    for key in ("fixed_bits", *CODERS):
        row[f"{key}_ratio"] = dense / row[f"{key}_bytes"]
    return row, [layer_row(name, packed) for name in weights]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def fixed_bits(tensor: PackedTensor) -> float:
    """Return the bits of a tensor without an entropy code: every position and index as wide."""
    indices = tensor.kept * math.ceil(math.log2(tensor.clusters)) if tensor.clusters else 0
    return tensor.gaps * tensor.gap_bits + indices + 8 * tensor.value_bytes


def layer_row(name: str, packed: dict[str, dict[str, PackedTensor]]) -> dict[str, Any]:
    """Return a layer's density and the bits that a weight which is kept takes."""
    plain = packed["huffman"][name]
    row: dict[str, Any] = {
        "layer": name,
        "weights": plain.numel,
        "density": plain.kept / plain.numel,
        "form": plain.form,
        "values": plain.clusters,
        "position_bits": plain.gap_bits,
    }
    for coder, tensors in packed.items():
        tensor = tensors[name]
        row[f"{coder}_index_bits"] = 8 * tensor.index_bytes / tensor.kept
        row[f"{coder}_position_bits"] = 8 * tensor.position_bytes / tensor.kept
        row[f"{coder}_percent"] = 100 * tensor.bytes / (4 * tensor.numel)
    return row


def page(rows: pd.DataFrame, layers: pd.DataFrame) -> str:
    lines = [
        "# Deep Compression: what was measured",
        "",
        f"fbnas {fbnas.__version__}, torch {torch.__version__}, {platform.machine()} CPU, one "
        "thread. Sizes are those of whole files: all tensors, code tables and header. Accuracy in "
        "percent on test images, mean and sample standard deviation over seeds.",
        "",
        "| data | network | seeds | kept | accuracy before | pruned | shared | fixed bits "
        "| Huffman | arithmetic | paper |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (data, name), group in rows.groupby(["data", "network"], sort=False):
        paper = PAPER.get(name)
        accuracies = " | ".join(spread(100 * group[key]) for key in ("trained", "pruned", "shared"))
        ratios = " | ".join(
            f"{group[f'{key}_ratio'].mean():.1f}x" for key in ("fixed_bits", *CODERS)
        )
        before, after = (100 - 100 * error for error in paper.error) if paper else (0, 0)
        stated = f"{paper.ratio}x, {before:.2f} to {after:.2f}" if paper else "-"
        share = 100 * (group["kept"] / group["weights"]).mean()
        lines.append(
            f"| {data} | {name} | {len(group)} | {share:.1f} % | {accuracies} | {ratios} "
            f"| {stated} |"
        )
    lines += [
        "",
        "## Layers",
        "",
        "Bits per weight that is kept, mean over seeds; percent of 32 bits for every weight.",
        "",
        "| data | network | layer | weights | density | values | index: Huffman | arithmetic "
        "| position: Huffman | arithmetic | percent: Huffman | arithmetic |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (data, name, layer), group in layers.groupby(["data", "network", "layer"], sort=False):
        if name not in PAPER:
            continue
        mean = group.mean(numeric_only=True)
        bits = " | ".join(
            f"{mean[f'{coder}_{kind}']:.2f}"
            for kind in ("index_bits", "position_bits", "percent")
            for coder in CODERS
        )
        lines.append(
            f"| {data} | {name} | {layer} | {mean['weights']:.0f} | {100 * mean['density']:.0f} % "
            f"| {mean['values']:.0f} | {bits} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: pd.Series) -> str:
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
