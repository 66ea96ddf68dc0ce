"""Searched, random, uniform and well-known networks: accuracy of int8 files by their latency.

    python scripts/results/measure.py WORK DATA [--dataset cifar|imagenette] [--seeds 0,1,2]
        [--fractions 0.1,0.18,0.27,0.38,0.5] [--random 1] [--images N] [--epochs N]
        [--train-epochs N] [--space NAME|PATH] [--processes 2] [--out DIR]
        [--steps table,search,choose,rank,train,measure,report]

DATA: CIFAR-10's folder of train.parquet and test.parquet, or Imagenette's of train/ and val/.
Device: ONNX Runtime, int8, one thread of this machine. Everything is done once per seed. Steps:

    table    profiles the device and mends its table by whole networks (wants a quiet machine)
    search   one search for all budgets, each `fraction` of the way from the table's fastest to its
             slowest network; of every theta the most probable network that uses `--least`
    choose   what it is held against (wants a quiet machine): `--random` networks per budget, those
             of many from the same band of the table that measure most like the searched one; the
             uniform networks, one block everywhere, that some budget holds; each family at the
             three of WIDTHS that measure below the smallest budget, nearest to the middle one,
             above the largest
    rank     of 200 networks that theta draws from the same band for each budget, the first by the
             shared weights, as `fbnas run` chooses
    train    all of them alike, in fp32; then an int8 file of each by its own export (ranges from
             training images), judged by itself on all test images
    measure  all these files against each other, interleaved (wants a quiet machine)
    report   OUT/result.csv, result.md and results.png

WORK keeps it all: the same command continues, steps may be run one at a time. `search`, `rank` and
`train` run in so many `--processes`; `--part i/n` runs one of n parts alone. Options without a
default follow from the data set (PRESETS). More seeds may be added in the same WORK, other changes
to what is compared want another one.
"""

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from compare import (
    FAMILY,
    RANDOM,
    RANKED,
    SEARCHED,
    UNIFORM,
    absent,
    without_incomplete_families,
)
from networks import FAMILIES
from page import write_page
from torch import nn

from fbnas.commands.candidates import ranked_by_shared_weights
from fbnas.compression import calibration_images
from fbnas.export import accuracy_of_file, export_file
from fbnas.files import read_json, write_json
from fbnas.latency import Device, LatencyTable, Measurement
from fbnas.latency.profiling import enliven_, one_torch_thread
from fbnas.search import (
    Band,
    Learned,
    SearchSettings,
    draw_within,
    most_probable_within,
)
from fbnas.search.logbook import read_result
from fbnas.space import Architecture, NetworkCard, SearchSpace, build_network, count
from fbnas.training import Data, TrainingSettings, evaluate, load_data, train
from fbnas.training.settings import choose_device

sys.path.append(str(Path(__file__).parents[1]))
from steps import (
    append_rows,
    calibrated_table,
    circumstances,
    is_known,
    part_of,
    rows_of,
    searched,
    table_words,
    target_at,
)

HERE = Path(__file__).parent
STEPS = ("table", "search", "choose", "rank", "train", "measure", "report")
SHARED = ("search", "rank", "train")  # by several processes
WIDTHS = (0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.4)
FIXED = ("dataset", "space", "fractions", "random", "least", "images", "epochs", "train_epochs")
ALLOWED = 1.05  # of the largest budget: a uniform network that takes more is as fast as none
TO_RANK = 200  # networks a budget and seed, as fbnas run does
DRAWN = 6  # random networks that are measured for each that is kept
AUGMENT = {"flip": True}
PRESETS = {
    "cifar": {
        "space": str(HERE.parent / "cross_device" / "space.yaml"),
        "images": 4000,
        "epochs": 40,
        "train_epochs": 8,
        "batch": 64,
    },
    "imagenette": {
        "space": str(HERE / "imagenette.yaml"),
        "images": None,
        "epochs": 40,
        "train_epochs": 20,
        "batch": 32,
    },
}


@dataclass(frozen=True)
class Contender:
    """A network of the comparison: an architecture's blocks, or a family and its width.

    `fraction`: the budget that it was searched or drawn for; None for those of no budget.
    """

    kind: str
    name: str
    blocks: tuple[str, ...] = ()
    width: float = 0.0
    fraction: float | None = None

    def build(self, study: "Study") -> nn.Module:
        if self.blocks:
            return build_network(study.space, self.architecture(study), study.data.classes)
        family, resolution = self.name.rpartition(" ")[0], study.space.resolution
        return FAMILIES[family](self.width, resolution, study.data.classes)

    def architecture(self, study: "Study") -> Architecture:
        """For the files' metadata; a family stands for its blocks."""
        return Architecture(self.blocks or (self.name,), study.space.name)

    def card(self, study: "Study") -> NetworkCard:
        data = study.data
        return NetworkCard(
            study.space, self.architecture(study), data.class_names, data.mean, data.std
        )

    def row(self, study: "Study") -> dict:
        """What networks.csv holds of it."""
        sizes = count(self.build(study), self.card(study).input_shape)
        return {
            "kind": self.kind,
            "name": self.name,
            "fraction": self.fraction,
            "width": self.width,
            "blocks": " ".join(self.blocks),
            "params": sizes.params,
            "macs": sizes.macs,
        }

    @classmethod
    def of_row(cls, row: pd.Series) -> "Contender":
        blocks = "" if pd.isna(row.blocks) else row.blocks
        return cls(row.kind, row["name"], tuple(blocks.split()), row.width, row.fraction)


@dataclass(frozen=True)
class Study:
    """What every step needs."""

    options: argparse.Namespace
    space: SearchSpace
    device: Device

    @cached_property
    def data(self) -> Data:
        return data_of(self.options, self.space)

    @property
    def work(self) -> Path:
        return self.options.work

    @property
    def seeds(self) -> list[int]:
        return [int(seed) for seed in self.options.seeds.split(",")]

    @property
    def fractions(self) -> list[float]:
        return [float(fraction) for fraction in self.options.fractions.split(",")]

    def budget_ms(self, fraction: float) -> float:
        table = LatencyTable.load(self.work / "table.csv")
        found = target_at(table, self.space, self.data.classes, fraction).budget_ms
        assert found is not None
        return found

    def networks(self) -> pd.DataFrame:
        """All that are compared, a row per seed and network."""
        found = rows_of(self.work / "networks.csv")
        if found.empty or not set(self.seeds) <= set(found.seed):
            sys.exit("The networks are not chosen yet; run --steps choose")
        return found[found.seed.isin(self.seeds)].reset_index(drop=True)

    def file(self, seed: int, name: str) -> Path:
        return self.work / "files" / str(seed) / f"{name.replace(' ', '_')}{self.device.suffix}"


def data_of(options: argparse.Namespace, space: SearchSpace) -> Data:
    """CIFAR-10, or Imagenette, whose val/ is the test set here: it has 700 images.

    Imagenette has no third split: a fifth of its training images validate.
    """
    path, limit = str(options.data), options.images
    if options.dataset == "cifar":
        return load_data("huggingface", path=path, resize=True, space=space, limit=limit)
    data = load_data("image_folder", path=path, resize=True, space=space, limit=limit)
    judging = data.validation
    return replace(data, validation=data.test, load_test=lambda: judging)


def table(study: Study) -> None:
    calibrated_table(
        study.work / "table.csv",
        study.space,
        study.device,
        classes=study.data.classes,
        networks=study.options.networks,
        held_out=study.options.held_out,
    )


def search(study: Study) -> None:
    options = study.options
    settings = SearchSettings(
        epochs=options.epochs,
        batch_size=options.batch,
        augment=AUGMENT,
        device=options.torch_device,
    )
    own = LatencyTable.load(study.work / "table.csv")
    targets = [
        replace(target_at(own, study.space, study.data.classes, f), name=f"{f:g}")
        for f in study.fractions
    ]
    for seed in part_of(study.seeds, options.part):
        folder = study.work / f"search_{seed}"
        searched(folder, study.space, study.data, targets, settings=settings, seed=seed)


def choose(study: Study) -> None:
    """The known networks once, then every seed's searched and random ones."""
    out, known = study.work / "networks.csv", study.work / "known.csv"
    if not known.is_file():
        append_rows(known, [one.row(study) for one in known_networks(study)])
    everywhere = [Contender.of_row(row) for _, row in rows_of(known).iterrows()]
    for seed in study.seeds:
        if not is_known(rows_of(out), seed=seed):
            all_of_seed = [*own_networks(study, seed), *everywhere]
            append_rows(out, [{"seed": seed, **one.row(study)} for one in all_of_seed])


def known_networks(study: Study) -> list[Contender]:
    """Uniform networks that some budget holds, each family at three widths around budgets."""
    layers = len(study.space.layers)
    uniform = [
        Contender(UNIFORM, name, (name,) * layers) for name in study.space.blocks if name != "skip"
    ]
    every = {
        family: [Contender(FAMILY, f"{family} {width:g}", width=width) for width in WIDTHS]
        for family in FAMILIES
    }
    families = [one for widths in every.values() for one in widths]
    latency_ms = measured(study, [*uniform, *families], seed=0)
    budgets = [study.budget_ms(fraction) for fraction in sorted(study.fractions)]
    within = [one for one in uniform if latency_ms[one.name] <= ALLOWED * budgets[-1]]
    return within + [one for widths in every.values() for one in bracket(
        widths, [latency_ms[one.name] for one in widths], budgets
    )]  # fmt: skip


def bracket(
    widths: Sequence[Contender], latency_ms: Sequence[float], budgets: Sequence[float]
) -> list[Contender]:
    """Three: below the smallest budget, nearest to the middle one, above the largest.

    Where a family does not go that far, its fastest or slowest; others near the middle fill up.

    Args:
        widths: from the narrowest on, at least three.
        latency_ms: of each.
        budgets: in ms, ascending.
    """
    places = range(len(widths))
    lowest = max((i for i in places if latency_ms[i] <= budgets[0]), default=0)
    highest = min((i for i in places if latency_ms[i] >= budgets[-1]), default=len(widths) - 1)
    middle_ms = budgets[len(budgets) // 2]
    others = sorted(set(places) - {lowest, highest}, key=lambda i: abs(latency_ms[i] - middle_ms))
    between = [i for i in others if lowest < i < highest]
    chosen = list(dict.fromkeys([lowest, highest, *between[:1], *others]))[:3]
    return [widths[i] for i in sorted(chosen)]


def own_networks(study: Study, seed: int) -> list[Contender]:
    """A seed's searched networks, each followed by random ones that measure as it does."""
    learned = read_result(study.work / f"search_{seed}")[1]
    generator = torch.Generator().manual_seed(1_000 + seed)
    pairs = [
        (found_by(study, one, fraction), drawn(study, one, fraction, generator))
        for fraction, one in zip(study.fractions, learned, strict=True)
    ]
    latency_ms = measured(study, [n for best, others in pairs for n in (best, *others)], seed)
    found = []
    for best, others in pairs:
        nearest = sorted(others, key=lambda one: abs(latency_ms[one.name] - latency_ms[best.name]))[
            : study.options.random
        ]
        found += [best, *nearest]
        off = [latency_ms[one.name] / latency_ms[best.name] - 1 for one in nearest]
        print(
            f"seed {seed}, {best.name}: {latency_ms[best.name]:.4f} ms, random ones off by "
            f"{', '.join(f'{100 * x:+.1f} %' for x in off)}",
            flush=True,
        )
    return found


def found_by(study: Study, one: Learned, fraction: float) -> Contender:
    best = most_probable_within(
        one.distribution.probabilities(),
        one.latency_ms,
        budget_ms=one.budget_ms,
        base_ms=one.base_ms,
        count=1,
        space=study.space,
        limits=one.limits[1:],
        least_used=study.options.least,
    )[0]
    return Contender(SEARCHED, f"searched {fraction:g}", best.blocks, fraction=fraction)


def rank(study: Study) -> None:
    """Add every seed's networks that the shared weights put first."""
    out = study.work / "networks.csv"
    for seed in part_of(study.seeds, study.options.part):
        learned = read_result(study.work / f"search_{seed}")[1]
        for fraction, one in zip(study.fractions, learned, strict=True):
            if not is_known(rows_of(out), seed=seed, kind=RANKED, fraction=fraction):
                first = first_by_shared_weights(study, one, fraction, seed)
                append_rows(out, [{"seed": seed, **first.row(study)}])


def first_by_shared_weights(study: Study, one: Learned, fraction: float, seed: int) -> Contender:
    """As `fbnas run` does, but in the band that all networks here are from."""
    theta, data = one.distribution, study.data
    probable = Architecture(found_by(study, one, fraction).blocks, study.space.name)
    paths = draw_within(
        theta.probabilities(),
        Band(one.limits, theta.offered, floor=study.options.least),
        TO_RANK - 1,
        generator=torch.Generator().manual_seed(2_000 + seed),
        known=[tuple(probable.path(theta.space))],
    )
    every = [probable, *(Architecture.from_path(study.space, list(path)) for path in paths)]
    first = ranked_by_shared_weights(
        study.work / f"search_{seed}",
        theta,
        one.limits,
        count=1,
        candidates=TO_RANK,
        candidates_from="theta",
        best=every,
        data=data,
        weights_fraction=SearchSettings().weights_fraction,
        seed=seed,
        device=torch.device(choose_device(study.options.torch_device)),
    )[0]
    words = " ".join(first.blocks)
    print(f"seed {seed}, {fraction:g}: first of {len(every)}: {words}", flush=True)
    return Contender(RANKED, f"ranked {fraction:g}", first.blocks, fraction=fraction)


def drawn(
    study: Study, one: Learned, fraction: float, generator: torch.Generator
) -> list[Contender]:
    """Uniform random networks that cost as much of the budget, by the table, as searched ones."""
    band = Band(one.limits, one.distribution.offered, floor=study.options.least)
    offered = one.distribution.offered.double()
    paths = draw_within(offered, band, DRAWN * study.options.random, generator=generator)
    blocks = [Architecture.from_path(study.space, list(path)).blocks for path in paths]
    return [
        Contender(RANDOM, f"random {fraction:g} {i}", names, fraction=fraction)
        for i, names in enumerate(blocks)
    ]


def measured(study: Study, networks: Sequence[Contender], seed: int) -> dict[str, float]:
    """Latencies of untrained networks against each other, in ms, by name: no weights needed."""
    shown = calibration_images(study.data)[:1]  # ranges only have to be alive here
    files = []
    for one in networks:
        path = study.work / "untrained" / str(seed) / study.file(seed, one.name).name
        if not path.is_file():
            torch.manual_seed(0)
            write(study, one, enliven_(one.build(study)), path, shown)
        files.append(path)
    found = quietly(study, files, seed)
    return {one.name: t.latency_ms for one, t in zip(networks, found.whole, strict=True)}


def write(
    study: Study, one: Contender, network: nn.Module, path: Path, calibration: Sequence
) -> None:
    """Export a network as an int8 file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"partial_{path.name}")
    with one_torch_thread():
        export_file(network, partial, study.device, card=one.card(study), calibration=calibration)
    partial.replace(path)


def quietly(study: Study, files: Sequence[Path], seed: int) -> Measurement:
    return study.device.measure_quietly(
        files, f"Timing {len(files)} files", rounds=study.options.rounds, seed=seed
    )


def train_all(study: Study) -> None:
    """Train, export and judge what is not yet: families last, as most is said of the others."""
    options, out, data = study.options, study.work / "trained.csv", study.data
    settings = TrainingSettings(
        epochs=options.train_epochs,
        batch_size=options.batch,
        augment=AUGMENT,
        device=options.torch_device,
    )
    shown = calibration_images(data)
    rows = [row for _, row in study.networks().iterrows()]
    mine = part_of(sorted(rows, key=lambda row: (row.kind == FAMILY, row.seed)), options.part)
    left = [r for r in mine if not is_known(rows_of(out), seed=r.seed, name=r["name"])]
    for number, row in enumerate(left, start=1):
        started, one, seed = time.monotonic(), Contender.of_row(row), int(row.seed)
        path = study.file(seed, one.name)
        torch.manual_seed(seed)
        folder = study.work / "train" / str(seed) / path.stem
        network = one.build(study)
        found = train(network, data, settings=settings, seed=seed, out=folder, resume=True)
        _, fp32_accuracy = evaluate(found.network, data.test, mean=data.mean, std=data.std)
        write(study, one, found.network, path, shown)
        accuracy = accuracy_of_file(path, data.test, mean=data.mean, std=data.std, threads=1)
        seconds = time.monotonic() - started
        append_rows(
            out,
            [
                {
                    "seed": seed,
                    "name": one.name,
                    "accuracy": accuracy,
                    "fp32_accuracy": fp32_accuracy,
                    "validation_accuracy": found.validation_accuracy,
                    "bytes": path.stat().st_size,
                    "seconds": seconds,
                }
            ],
        )
        print(
            f"{number}/{len(left)} seed {seed} {one.name}: int8 {accuracy:.4f}, fp32 "
            f"{fp32_accuracy:.4f}, {seconds:.0f} s, about "
            f"{(len(left) - number) * seconds / 60:.0f} min left",
            flush=True,
        )


def measure(study: Study) -> None:
    """Every file that was judged, all against each other, or nothing if that is done."""
    keys, out = ["seed", "name"], study.work / "latency.csv"
    known, judged = rows_of(out), rows_of(study.work / "trained.csv")
    if judged.empty:
        sys.exit("No network is trained yet; run --steps train")
    networks = study.networks()[keys].merge(judged[keys], on=keys)
    if not known.empty and len(networks.merge(known, on=keys)) == len(networks):
        return
    files = [study.file(r.seed, r.name) for r in networks.itertuples(index=False)]
    found = quietly(study, files, 0)
    networks.assign(
        measured_ms=[timing.latency_ms for timing in found.whole],
        low_ms=[timing.low_ms for timing in found.whole],
        high_ms=[timing.high_ms for timing in found.whole],
        noise_floor=found.noise_floor,
    ).to_csv(out, index=False)


def report(study: Study) -> None:
    """The page, of what is trained and measured; it says what is not."""
    networks, keys, options = study.networks(), ["seed", "name"], study.options
    result = networks
    for name in ("trained.csv", "latency.csv"):
        if (rows := rows_of(study.work / name)).empty:
            sys.exit("No network is trained and measured yet; run --steps train,measure")
        result = result.merge(rows, on=keys)
    result = without_incomplete_families(networks, result)
    if not {SEARCHED, RANDOM} <= set(result.kind):
        sys.exit("Too few networks are trained and measured yet; run --steps train,measure")
    result["budget_ms"] = result.fraction.map(
        {fraction: study.budget_ms(fraction) for fraction in study.fractions}
    )
    images = len(study.data.train) + len(study.data.validation)
    about = [
        circumstances(study.device),
        f"{table_words(LatencyTable.load(study.work / 'table.csv'))}.",
        "",
        f"{options.dataset}, space {study.space.name}, {study.space.resolution} pixels; {images:,} "
        f"images, of which {len(study.data.validation):,} validate, {len(study.data.test):,} test "
        f"images; a search of {options.epochs} epochs for {len(study.fractions)} budgets and "
        f"trainings of {options.train_epochs} epochs, once per seed ({options.seeds}). Accuracy "
        "and latency are of the same int8 file, written after training in fp32. Searched and "
        f"random networks use {options.least:g} to 1.0 of the budget by the table.",
        *absent(networks, result),
    ]
    write_page(result, rows_of(study.work / "seconds.csv"), about, options.out)


def check_options(options: argparse.Namespace) -> None:
    """Refuse a WORK that was begun with other options: its rows would not belong together."""
    record, own = options.work / "options.json", {name: getattr(options, name) for name in FIXED}
    if not record.is_file():
        write_json(record, own)
    begun = read_json(record)
    if begun != own:
        other = {name: begun[name] for name in FIXED if begun[name] != own[name]}
        sys.exit(f"{options.work} was begun with {other}; expected the same, or another folder")


ACTIONS: dict[str, Callable[[Study], None]] = dict(
    zip(STEPS, (table, search, choose, rank, train_all, measure, report), strict=True)
)


def run_step(study: Study, step: str) -> None:
    """Do a step here, or in several processes of this command, and note its hours."""
    options, started = study.options, time.monotonic()
    if step in SHARED and options.part == "0/1" and options.processes > 1:
        n = options.processes
        command = [sys.executable, __file__, *sys.argv[1:], "--steps", step]
        parts = [subprocess.Popen([*command, "--part", f"{i}/{n}"]) for i in range(n)]
        codes = [part.wait() for part in parts]
        if any(codes):
            sys.exit(f"A part of {step} failed; the same command continues")
        print(f"{step}: {time.monotonic() - started:.0f} s", flush=True)
        return
    try:
        ACTIONS[step](study)
    finally:
        seconds = time.monotonic() - started
        row = {"step": step, "part": options.part, "seconds": seconds}
        append_rows(study.work / "seconds.csv", [row])
    if options.part == "0/1":
        print(f"{step}: {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", type=Path, help="folder for the table, searches, networks and files")
    add("data", type=Path, help="folder of the images")
    add("--dataset", default="cifar", choices=PRESETS)
    add("--out", type=Path, help="folder for the result (default: a folder of its name here)")
    add("--steps", default=",".join(STEPS), help="separated by commas")
    add("--processes", type=int, default=2, help="for search and train")
    add("--part", default="0/1", help="this part of so many, from 0, of search and train")
    add("--seeds", default="0,1,2", help="each with a search and trainings of its own")
    add("--fractions", default="0.1,0.18,0.27,0.38,0.5", help="a budget each")
    add("--random", type=int, default=1, help="random networks a budget and seed")
    add("--least", type=float, default=0.97, help="of the budget, that all these cost")
    add("--space", help="name or path of the search space")
    add("--images", type=int, help="training images, those that validate included")
    add("--epochs", type=int, help="of a search")
    add("--train-epochs", type=int, help="of a training")
    add("--batch", type=int, help="images a step")
    add("--networks", type=int, default=12, help="that the table's correction is fitted on")
    add("--held-out", type=int, default=6, help="that judge it")
    add("--rounds", type=int, default=30, help="of measuring")
    add("--threads", type=int, default=1, help="of torch, a process")
    add("--torch-device", default="cpu", help="that searches and trains: cpu, cuda or auto")
    add("--device", default="epyc", help="name of this machine")
    options = parser.parse_args()
    for name, value in PRESETS[options.dataset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.out = options.out or HERE / options.dataset
    check_options(options)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    space = SearchSpace.load(options.space)
    study = Study(options, space, Device(name=options.device, precision="int8"))
    steps = options.steps.split(",")
    if not set(steps) <= set(STEPS):
        parser.error(f"--steps {options.steps}; expected of {', '.join(STEPS)}")
    for step in steps:
        run_step(study, step)


if __name__ == "__main__":
    main()
