"""Every compression method at three strengths, and stacks: accuracy against bytes and latency.

    python scripts/compression/measure.py WORK CIFAR_FOLDER
        [--images 20000] [--epochs 12] [--fine-tune 2] [--blocks k5_e1,k3_e3,...] [--seeds 0]
        [--only REGEX]
        [--steps base,methods,stacks,timed,measure,report] [--part 0/1]

Every row is a `fbnas compress` of the same trained network. Steps, in order:

    base     trains the network, once per seed
    methods  each method alone; --part i/n shares the work
    stacks   several methods one after the other; --part i/n shares the work
    timed    the methods and stacks that ask the device while they decide (wants a quiet machine)
    measure  all files against each other, interleaved, ONNX Runtime, one thread (wants quiet)
    report   OUT/result.csv, result.md and compression.png

WORK keeps it all: the same command continues, and a kill loses at most the method under way.
CIFAR_FOLDER holds train.parquet and test.parquet.
"""

import argparse
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from plan import Trial, base_folder, trials
from report import write_report

from fbnas import training
from fbnas.commands import compress, train
from fbnas.commands.composition import compose
from fbnas.commands.folder import holds_nothing
from fbnas.commands.parts import data_for
from fbnas.compression import FORM_FILE, Tools, facts, load_any
from fbnas.compression.packing import PACKED_FILE
from fbnas.errors import InputError
from fbnas.export import accuracy_of_file, export_onnx
from fbnas.files import atomic_write, read_json
from fbnas.latency import Device
from fbnas.space import Architecture, SearchSpace, build_network, save_network
from fbnas.space.network import save_weights
from fbnas.training import Data

sys.path.append(str(Path(__file__).parents[1]))
from steps import append_rows, is_known, part_of, rows_of, steps_asked, take

HERE = Path(__file__).parent
SPACE = HERE.parent / "cross_device" / "space.yaml"
BLOCKS = (  # searched for LiteRT by scripts/cross_device
    "k5_e1,k3_e3,k3_e3,k3_e3,k5_e3,k3_e3,k3_e3,k5_e6,k5_e3,k5_e3"
)


@dataclass(frozen=True)
class Study:
    """What every step needs."""

    options: argparse.Namespace
    data: Data

    @property
    def work(self) -> Path:
        return self.options.work

    @property
    def rows(self) -> Path:
        return self.work / "rows.csv"

    def base(self, seed: int) -> Path:
        return self.work / base_folder(seed)

    def folder(self, trial: Trial, seed: int) -> Path:
        return self.work / f"trials_{seed}" / trial.folder

    def plan(self) -> list[tuple[Trial, int]]:
        return [
            (trial, seed)
            for seed in self.options.seeds
            for trial in trials(str(self.work), seed, self.options.epochs)
            if re.fullmatch(self.options.only, trial.name)
        ]


def base(study: Study) -> None:
    """Train the network as `fbnas train` does, and keep the weights it began with for tickets."""
    space = SearchSpace.load(SPACE)
    architecture = Architecture(tuple(study.options.blocks.split(",")), space.name)
    file = study.work / "architecture.yaml"
    if not file.is_file():
        architecture.save(file)
    for seed in study.options.seeds:
        folder = study.base(seed)
        if (folder / "first.safetensors").is_file():
            continue
        options = [
            f"architecture={file}",
            f"space={SPACE}",
            *common(study, seed, folder),
            f"training.epochs={study.options.epochs}",
            f"resume={str(not holds_nothing(folder)).lower()}",
        ]
        train.main(compose("train", options))
        torch.manual_seed(seed)
        first = build_network(space, architecture, study.data.classes)
        save_weights(first, folder / "first.safetensors")


def common(study: Study, seed: int, folder: Path) -> list[str]:
    """Options that training and compression share."""
    options = study.options
    return [
        *data_options(options),
        "training.augment.flip=true",
        f"seed={seed}",
        f"out={folder}",
    ]


def data_options(options: argparse.Namespace) -> list[str]:
    return ["data=huggingface", f"data.path={options.cifar}", "data.resize=true",
            f"data.limit={options.images}"]  # fmt: skip


def methods(study: Study) -> None:
    untimed = [
        (t, s) for t, s in study.plan() if t.kind in ("none", "control", "method") and not t.timed
    ]
    try_all(study, part_of(untimed, study.options.part))


def stacks(study: Study) -> None:
    untimed = [(t, s) for t, s in study.plan() if t.kind == "stack" and not t.timed]
    try_all(study, part_of(untimed, study.options.part))


def timed(study: Study) -> None:
    try_all(study, [(t, s) for t, s in study.plan() if t.timed])


def try_all(study: Study, work: Sequence[tuple[Trial, int]]) -> None:
    """Compress by each trial that has no row yet; one that is refused has its reason instead."""
    for trial, seed in work:
        if is_known(rows_of(study.rows), trial=trial.name, seed=seed):
            continue
        if not (study.base(seed) / "first.safetensors").is_file():
            raise SystemExit(f"{study.base(seed)} is not trained; expected --steps base before.")
        print(f"\n== {trial.name}, seed {seed}", flush=True)
        started, refused = time.monotonic(), ""
        try:
            compressed(study, trial, seed)
        except InputError as error:
            refused = str(error)
        seconds = time.monotonic() - started
        found = judged(study, trial, seed) if not refused else dict.fromkeys(COLUMNS)
        about = {
            "trial": trial.name,
            "kind": trial.kind,
            "methods": "+".join(trial.methods) or "none",
            "strength": trial.strength,
            "seed": seed,
        }
        append_rows(study.rows, [{**about, **found, "seconds": seconds, "refused": refused}])
        print(f"{trial.name}: {refused or found}, {seconds:.0f} s", flush=True)


def compressed(study: Study, trial: Trial, seed: int) -> None:
    """Run `fbnas compress`, and write the file that is timed where the command wrote none.

    Raises:
        InputError: the command refuses it.
    """
    folder = study.folder(trial, seed)
    config = compose(
        "compress",
        [
            f"model={study.base(seed)}",
            f"method=[{','.join(trial.methods)}]",
            *common(study, seed, folder),
            f"compression.fine_tuning.epochs={study.options.fine_tune}",
            f"measure={str(trial.timed).lower()}",
            *trial.options,
            "overwrite=true",
        ],
    )
    if trial.methods:
        compress.main(config)
    elif trial.kind == "control":
        network, card = load_any(study.base(seed))
        training.train(network, study.data, settings=compress.tuning(config), seed=seed)
        save_network(folder, network, card)
    if not (folder / "model.onnx").is_file():
        network, card = load_any(network_folder(study, trial, seed))
        folder.mkdir(parents=True, exist_ok=True)
        export_onnx(network, folder / "model.onnx", card=card)


def network_folder(study: Study, trial: Trial, seed: int) -> Path:
    """Where the weights are: int8 alone makes a file, and no network of its own."""
    folder = study.folder(trial, seed)
    return folder if (folder / "network.yaml").is_file() else study.base(seed)


COLUMNS = ("validation_accuracy", "accuracy", "params", "macs", "dense_bytes", "stored_bytes",
           "file_bytes")  # fmt: skip


def judged(study: Study, trial: Trial, seed: int) -> dict[str, Any]:
    """Accuracies of the file that is timed, counts and bytes: a value for each of COLUMNS."""
    folder, data = study.folder(trial, seed), study.data
    network, card = load_any(network_folder(study, trial, seed))
    file = folder / "model.onnx"
    found = facts(network, Tools(card.input_shape))
    accuracies = (
        accuracy_of_file(file, images, mean=card.mean, std=card.std, threads=1)
        for images in (data.validation, data.test)
    )
    size = file.stat().st_size
    stored = stored_bytes(folder, found.dense_bytes)
    values = (*accuracies, found.params, found.macs, found.dense_bytes, stored, size)
    return dict(zip(COLUMNS, values, strict=True))


def stored_bytes(folder: Path, dense_bytes: int) -> int:
    """The least bytes of what was written that hold the network whole.

    A float network: its packed weights where `fbnas compress` wrote them, else its tensors. int8:
    the file; where it was trained for, its packed weights and grids do as well.
    """
    packed, form = folder / PACKED_FILE, folder / FORM_FILE
    small = packed.stat().st_size if packed.is_file() else dense_bytes
    if form.is_file():
        return min(small + form.stat().st_size, (folder / "model.onnx").stat().st_size)
    return (folder / "model.onnx").stat().st_size if is_int8(folder) else small


def is_int8(folder: Path) -> bool:
    """Whether model.onnx is int8: where that did not pay, it is the float file."""
    result = folder / "result.json"
    int8 = read_json(result).get("int8") if result.is_file() else None
    return int8 is not None and int8["fastest"] != "fp32"


def measure(study: Study) -> None:
    """Time the files of all rows against each other, unless that was done."""
    out, rows = study.work / "latency.csv", rows_of(study.rows)
    if rows.empty:
        raise SystemExit(f"{study.rows} has no rows; expected --steps methods,stacks before.")
    known = set(zip(*rows[rows.refused.isna()][["trial", "seed"]].T.to_numpy(), strict=True))
    files = {(t.name, seed): study.folder(t, seed) / "model.onnx" for t, seed in study.plan()}
    files = {name: file for name, file in files.items() if name in known}
    before = rows_of(out)
    if not before.empty and list(files) == list(zip(before.trial, before.seed, strict=True)):
        return
    found = Device().measure_quietly(list(files.values()), f"Timing {len(files)} files")
    timings = pd.DataFrame(
        {
            "trial": [trial for trial, _ in files],
            "seed": [seed for _, seed in files],
            "latency_ms": [timing.latency_ms for timing in found.whole],
            "low_ms": [timing.low_ms for timing in found.whole],
            "high_ms": [timing.high_ms for timing in found.whole],
            "noise_floor": found.noise_floor,
        }
    )
    atomic_write(out, timings.to_csv(index=False, float_format="%.6g"))
    print(f"{len(files)} files: noise {100 * found.noise_floor:.1f} %", flush=True)


def report(study: Study) -> None:
    options = study.options
    words = (
        f"{len(study.data.train)} training images of CIFAR-10 at 16x16, "
        f"{len(study.data.validation)} to validate, {len(study.data.test)} to test; "
        f"`{options.blocks.replace(',', ' ')}` trained for {options.epochs} epochs, fine-tuned for "
        f"{options.fine_tune}; seeds {', '.join(map(str, options.seeds))}."
    )
    latencies = rows_of(study.work / "latency.csv")
    if latencies.empty:
        raise SystemExit(
            f"{study.work / 'latency.csv'} is missing; expected --steps measure before."
        )
    places = {trial.name: place for place, (trial, _) in enumerate(study.plan())}
    rows = rows_of(study.rows)
    rows = rows[rows.trial.isin(places)].sort_values("trial", key=lambda names: names.map(places))
    rows = rows.merge(latencies, how="left")
    write_report(rows, options.out, words=words, test_images=len(study.data.test))


ACTIONS: dict[str, Callable[[Study], None]] = {
    step.__name__: step for step in (base, methods, stacks, timed, measure, report)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", type=Path, help="folder for networks and files")
    add("cifar", type=Path, help="folder with train.parquet and test.parquet of CIFAR-10")
    add("--out", type=Path, default=HERE, help="folder for the result (default: beside this)")
    add("--steps", default=",".join(ACTIONS), help="separated by commas")
    add("--part", default="0/1", help="this part of so many, from 0, of methods and stacks")
    add("--blocks", default=BLOCKS, help="of the network, in the space of cross_device")
    add("--images", type=int, default=20000, help="of CIFAR-10, a fifth of them to validate")
    add("--epochs", type=int, default=12, help="of the network's training, and of tickets")
    add("--fine-tune", type=int, default=2, help="epochs after each method that trains")
    add("--seeds", default="0", help="of training and compression, separated by commas")
    add("--only", default=".*", help="trials whose whole name, as in the table, this matches")
    add("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    options.work = options.work.absolute()
    options.cifar = options.cifar.absolute()
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    steps = steps_asked(parser, options.steps, ACTIONS)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(options.threads)
    space, config = (
        SearchSpace.load(SPACE),
        compose("compress", ["model=.", *data_options(options)]),
    )
    study = Study(options, data_for(config, space))
    take(steps, ACTIONS, study)


if __name__ == "__main__":
    main()
