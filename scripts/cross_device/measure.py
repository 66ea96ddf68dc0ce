"""Networks searched for four devices in one search, each measured on all four.

    FBNAS_LITERT_PYTHON=PATH python scripts/cross_device/measure.py WORK CIFAR_FOLDER
        [--devices onnxruntime:int8,openvino:int8,executorch:fp32,litert:fp32] [--fraction 0.4]
        [--epochs 40] [--images 4000] [--rank probability] [--train-seeds 0,1] [--train-epochs 12]
        [--steps table,search,train,export,measure,report] [--part 0/1]

A device is a runtime and precision of this machine. Steps, in order:

    table    profiles each device and mends its table by whole networks (wants a quiet machine)
    search   one search, a target per device: `fraction` of the way from its fastest to its slowest
    train    each device's network alone, once per training seed; --part i/n shares the work
    export   every trained network as a file of every device, int8 where it is int8 (ranges from
             training images), with its accuracy on all test images as that device computes it;
             --part i/n shares the work
    measure  per device all files against each other, interleaved, `--repeats` times (wants quiet)
    report   OUT/result.csv, result.md and transfer.png

WORK keeps it all: the same command continues, steps may be run one at a time. CIFAR_FOLDER holds
train.parquet and test.parquet. Runtimes of another environment: FBNAS_RUNTIME_PYTHON=PATH.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch

from fbnas.commands.parts import card_for
from fbnas.compression import calibration_images
from fbnas.export import accuracy_of_file, export_file
from fbnas.files import read_json, write_json
from fbnas.latency import Device, LatencyTable
from fbnas.latency.calibration import predict
from fbnas.latency.profiling import one_torch_thread
from fbnas.search import (
    LEAST_USED,
    Learned,
    SearchSettings,
    most_probable_within,
    rank_by_shared_weights,
    read_supernet,
)
from fbnas.space import Architecture, SearchSpace, build_network, load_network, save_network
from fbnas.training import Data, TrainingSettings, load_data, train

sys.path.append(str(Path(__file__).parents[1]))
from steps import (
    append_rows,
    calibrated_table,
    circumstances,
    is_known,
    part_of,
    rows_of,
    searched,
    spread,
    steps_asked,
    table_words,
    take,
    target_at,
)

mpl.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
STEPS = ("table", "search", "train", "export", "measure", "report")
DEVICES = "onnxruntime:int8,openvino:int8,executorch:fp32,litert:fp32"
AMONG = 8  # of the most probable, where the shared weights choose: as `fbnas run`
AUGMENT = {"flip": True}


@dataclass(frozen=True)
class Study:
    """What every step needs; `devices` by their short name."""

    options: argparse.Namespace
    space: SearchSpace
    data: Data
    devices: dict[str, Device]

    @property
    def work(self) -> Path:
        return self.options.work

    @property
    def seeds(self) -> list[int]:
        return [int(seed) for seed in self.options.train_seeds.split(",")]

    def table_path(self, name: str) -> Path:
        return self.work / f"{name}.csv"

    def tables(self) -> dict[str, LatencyTable]:
        return {name: LatencyTable.load(self.table_path(name)) for name in self.devices}

    def networks(self) -> dict[str, Architecture]:
        """The network of each device, as the step search chose it."""
        found = read_json(self.work / "chosen.json")
        return {
            name: Architecture(tuple(found[name]["blocks"]), self.space.name)
            for name in self.devices
        }

    def trained(self, name: str, seed: int) -> Path:
        return self.work / "train" / f"{name}_{seed}"

    def file(self, network: str, seed: int, device: str) -> Path:
        suffix = self.devices[device].suffix
        return self.work / "files" / device / f"{network}_{seed}{suffix}"


def devices_of(names: str, machine: str) -> dict[str, Device]:
    """Devices of this machine, by runtime_precision."""
    found = {}
    for asked in names.split(","):
        runtime, _, precision = asked.partition(":")
        found[f"{runtime}_{precision}"] = Device(
            name=machine,
            runtime=runtime,
            precision=precision,
            python=os.environ.get(f"FBNAS_{runtime.upper()}_PYTHON"),
        )
    return found


def table(study: Study) -> None:
    for name, device in study.devices.items():
        started = time.monotonic()
        calibrated_table(
            study.table_path(name),
            study.space,
            device,
            classes=study.data.classes,
            networks=study.options.networks,
            held_out=study.options.held_out,
        )
        print(f"table {name}: {time.monotonic() - started:.0f} s", flush=True)


def search(study: Study) -> None:
    """One search for all devices, and what is chosen of it for each."""
    record, options = study.work / "chosen.json", study.options
    if record.is_file():
        return
    targets = [
        replace(target_at(t, study.space, study.data.classes, options.fraction), name=name)
        for name, t in study.tables().items()
    ]
    settings = SearchSettings(
        epochs=options.epochs, batch_size=options.batch, augment=AUGMENT, device="cpu"
    )
    learned = searched(
        study.work / "search",
        study.space,
        study.data,
        targets,
        settings=settings,
        seed=options.seed,
    )
    chosen = {}
    for name, one in zip(study.devices, learned, strict=True):
        best = choose(study, one)
        chosen[name] = {
            "blocks": list(best.blocks),
            "budget_ms": one.budget_ms,
            "predicted_ms": predict(study.space, best, one.latency_ms, one.base_ms),
        }
        print(f"{name}: {best}, {chosen[name]['predicted_ms']:.4f} of {one.budget_ms:.4f} ms")
    write_json(record, chosen)


def choose(study: Study, one: Learned) -> Architecture:
    """A target's network: the most probable, as `fbnas search` chooses.

    With rank shared_weights the best by the shared weights among the most probable, as `fbnas run`
    ranks them.
    """
    by_weights = study.options.rank == "shared_weights"
    probable = most_probable_within(
        one.distribution.probabilities(),
        one.latency_ms,
        budget_ms=one.budget_ms,
        base_ms=one.base_ms,
        count=AMONG if by_weights else 1,
        space=study.space,
        limits=one.limits[1:],
        least_used=LEAST_USED,
    )
    if not by_weights:
        return probable[0]
    supernet = read_supernet(study.work / "search", study.space, study.data.classes)
    ranked = rank_by_shared_weights(supernet, probable, study.data, seed=study.options.seed)
    return ranked[0].architecture


def train_all(study: Study) -> None:
    settings = TrainingSettings(
        epochs=study.options.train_epochs, batch_size=64, augment=AUGMENT, device="cpu"
    )
    work = [(name, seed) for seed in study.seeds for name in study.devices]
    networks = study.networks()
    for name, seed in part_of(work, study.options.part):
        folder = study.trained(name, seed)
        if (folder / "network.yaml").is_file():
            continue
        started = time.monotonic()
        torch.manual_seed(seed)
        network = build_network(study.space, networks[name], study.data.classes)
        found = train(network, study.data, settings=settings, seed=seed, out=folder, resume=True)
        save_network(folder, found.network, card_for(study.space, networks[name], study.data))
        print(
            f"{name}, seed {seed}: validation accuracy {found.validation_accuracy:.4f}, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )


def export_all(study: Study) -> None:
    out, data = study.work / "accuracy.csv", study.data
    shown = calibration_images(data, seed=study.options.seed)
    work = [(d, n, s) for s in study.seeds for n in study.devices for d in study.devices]
    for on, name, seed in part_of(work, study.options.part):
        path, device = study.file(name, seed, on), study.devices[on]
        if is_known(rows_of(out), network=name, train_seed=seed, device=on) and path.is_file():
            continue
        started = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        network, card = load_network(study.trained(name, seed))
        with one_torch_thread():
            export_file(network, path, device, card=card, calibration=shown)
        accuracy = accuracy_of_file(
            path, data.test, mean=data.mean, std=data.std, threads=1, device=device
        )
        append_rows(
            out,
            [{"network": name, "train_seed": seed, "device": on, "accuracy": accuracy}],
        )
        print(f"{path}: {accuracy:.4f}, {time.monotonic() - started:.0f} s", flush=True)


def measure(study: Study) -> None:
    """Devices in turn, so that the machine's slow hours fall on all of them alike."""
    out = study.work / "latency.csv"
    pairs = [(name, seed) for name in study.devices for seed in study.seeds]
    for repeat in range(study.options.repeats):
        for on, device in study.devices.items():
            if is_known(rows_of(out), repeat=repeat, device=on):
                continue
            files = [study.file(name, seed, on) for name, seed in pairs]
            found = device.measure_quietly(files, f"Timing {len(files)} files, {on}", seed=repeat)
            append_rows(
                out,
                [
                    {
                        "repeat": repeat,
                        "device": on,
                        "network": name,
                        "train_seed": seed,
                        "latency_ms": timing.latency_ms,
                        "low_ms": timing.low_ms,
                        "high_ms": timing.high_ms,
                        "noise_floor": found.noise_floor,
                    }
                    for (name, seed), timing in zip(pairs, found.whole, strict=True)
                ],
            )
            print(f"{on}, repeat {repeat}: noise {100 * found.noise_floor:.1f} %", flush=True)


def report(study: Study) -> None:
    latency, accuracy = rows_of(study.work / "latency.csv"), rows_of(study.work / "accuracy.csv")
    out = study.options.out
    out.mkdir(parents=True, exist_ok=True)
    result = result_of(study, latency, accuracy)
    result.to_csv(out / "result.csv", index=False, float_format="%.6g")
    draw(study, result, out / "transfer.png")
    page = words(study, result, latency, accuracy)
    (out / "result.md").write_text(page)
    print(page)


def result_of(study: Study, latency: pd.DataFrame, accuracy: pd.DataFrame) -> pd.DataFrame:
    """A row per network and device: measured, predicted, against the budget and the own network."""
    chosen, networks = read_json(study.work / "chosen.json"), study.networks()
    rows = []
    for on, own_table in study.tables().items():
        latency_ms, base_ms = own_table.tensor(study.space, classes=study.data.classes)
        here = latency[latency.device == on]
        own_ms = here[here.network == on].latency_ms.mean()
        for name, architecture in networks.items():
            times = here[here.network == name].groupby("repeat").latency_ms.mean()
            right = accuracy[(accuracy.network == name) & (accuracy.device == on)].accuracy
            budget_ms = chosen[on]["budget_ms"]
            rows.append(
                {
                    "network": name,
                    "device": on,
                    "measured_ms": times.mean(),
                    "repeats_spread": times.std() / times.mean() if len(times) > 1 else np.nan,
                    "noise_floor": here.noise_floor.median(),
                    "predicted_ms": predict(study.space, architecture, latency_ms, base_ms),
                    "budget_ms": budget_ms,
                    "of_budget": times.mean() / budget_ms,
                    "against_own": times.mean() / own_ms - 1,
                    "accuracy": right.mean(),
                    "accuracy_spread": right.std() if len(right) > 1 else np.nan,
                }
            )
    return pd.DataFrame(rows)


def words(study: Study, result: pd.DataFrame, latency: pd.DataFrame, accuracy: pd.DataFrame) -> str:
    names, options = list(study.devices), study.options
    at = {(r.network, r.device): r for r in result.itertuples()}

    def ms(network: str, device: str) -> str:
        return (
            f"{at[network, device].measured_ms:.4f} (table: {at[network, device].predicted_ms:.4f})"
        )

    def slower(network: str, device: str) -> str:
        return f"{100 * at[network, device].against_own:+.1f} %"

    def budget(network: str, device: str) -> str:
        return f"{100 * at[network, device].of_budget:.1f} %"

    def right(network: str, device: str) -> str:
        own = accuracy[(accuracy.network == network) & (accuracy.device == device)]
        return spread(own.accuracy)

    noise = latency.groupby("device").noise_floor.median()
    apart = result.groupby("device").repeats_spread.max()
    lines = [
        "# Networks of one search, each on every device",
        "",
        circumstances(*study.devices.values()),
        f"Space {study.space.name}; {options.images} images of CIFAR-10, a fifth of them to "
        f"validate; one search of {options.epochs} epochs with {len(names)} targets, seed "
        f"{options.seed}; each budget {options.fraction:g} of the way from the fastest to the "
        f"slowest network of its device; chosen by {options.rank}. A row is the network searched "
        "for a device, a column where it is measured.",
        "",
        *matrix("Measured, ms (mean over repeats and training seeds)", names, ms),
        *matrix("Slower than the device's own network", names, slower),
        *matrix("Measured, of the device's budget", names, budget),
        *matrix("Test accuracy, %, mean ± deviation (training seeds)", names, right),
        "## How far to trust it",
        "",
        "| device | budget, ms | noise floor | largest deviation between repeats | table |",
        "|---|---|---|---|---|",
    ]
    budgets = result.groupby("device").budget_ms.first()
    for name, own in study.tables().items():
        lines.append(
            f"| {name} | {budgets[name]:.4f} | {100 * noise[name]:.1f} % | "
            f"{100 * apart[name]:.1f} % | {table_words(own)} |"
        )
    lines += ["", "## The networks", ""]
    lines += [f"- {name}: `{a}`" for name, a in study.networks().items()]
    return "\n".join([*lines, "", "![transfer](transfer.png)", ""])


def matrix(title: str, names: list[str], cell: Callable[[str, str], str]) -> list[str]:
    lines = [f"## {title}", "", f"| searched for | {' | '.join(names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for name in names:
        lines.append(f"| {name} | {' | '.join(cell(name, on) for on in names)} |")
    return [*lines, ""]


def draw(study: Study, result: pd.DataFrame, path: Path) -> None:
    """Slower than the own network, and of the budget: both matrices in colour."""
    names = list(study.devices)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axes, column, title in (
        (panels[0], "against_own", "slower than the device's own network, %"),
        (panels[1], "of_budget", "over the device's budget, %"),
    ):
        values = 100 * result.pivot(index="network", columns="device", values=column)
        shown = values.loc[names, names] - (100 if column == "of_budget" else 0)
        most = max(float(np.abs(shown.to_numpy()).max()), 1.0)
        axes.imshow(shown, cmap="RdYlGn_r", vmin=-most, vmax=most)
        for (i, j), value in np.ndenumerate(shown.to_numpy()):
            axes.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=9)
        labels = [name.replace("_", "\n") for name in names]
        axes.set_xticks(range(len(names)), labels, fontsize=8)
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        axes.set_xlabel("measured on")
        axes.set_ylabel("searched for")
        axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


ACTIONS: dict[str, Callable[[Study], None]] = dict(
    zip(STEPS, (table, search, train_all, export_all, measure, report), strict=True)
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", type=Path, help="folder for tables, the search, networks and files")
    add("cifar", type=Path, help="folder with train.parquet and test.parquet of CIFAR-10")
    add("--out", type=Path, default=HERE, help="folder for the result (default: beside this)")
    add("--steps", default=",".join(STEPS), help="separated by commas")
    add("--part", default="0/1", help="this part of so many, from 0, of train and export")
    add("--devices", default=DEVICES, help="RUNTIME:PRECISION, separated by commas")
    add("--networks", type=int, default=12, help="that a table's correction is fitted on")
    add("--held-out", type=int, default=6, help="that judge it")
    add("--fraction", type=float, default=0.4, help="every device's budget")
    add("--images", type=int, default=4000, help="of CIFAR-10, a fifth of them to validate")
    add("--epochs", type=int, default=40, help="of the search")
    add("--batch", type=int, default=64, help="images a step of the search")
    add("--seed", type=int, default=0, help="of the search")
    add("--rank", default="probability", choices=("probability", "shared_weights"))
    add("--train-seeds", default="0,1", help="each trains every network once")
    add("--train-epochs", type=int, default=12)
    add("--repeats", type=int, default=3, help="of the measurement on every device")
    add("--threads", type=int, default=1, help="of torch")
    add("--device", default="epyc", help="name of this machine")
    options = parser.parse_args()
    steps = steps_asked(parser, options.steps, ACTIONS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    space = SearchSpace.load(HERE / "space.yaml")
    path, limit = str(options.cifar), options.images
    data = load_data("huggingface", path=path, resize=True, space=space, limit=limit)
    study = Study(options, space, data, devices_of(options.devices, options.device))
    take(steps, ACTIONS, study)


if __name__ == "__main__":
    main()
