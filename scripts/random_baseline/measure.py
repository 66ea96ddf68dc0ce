"""Does the searched network beat random ones of the same measured latency, all trained alike?

    python scripts/random_baseline/measure.py WORK CIFAR_FOLDER
        [--steps table,search,draw,train,report] [--seeds 0,1,2] [--fraction 0.4] [--epochs 40]
        [--images 4000] [--train-epochs 12] [--train-seeds 3] [--random 10]
        [--random-train-seeds 3] [--part 0/1]

Space: scripts/cross_device/space.yaml, CIFAR-10 at 16x16. Device: ONNX Runtime, fp32, one thread of
this machine. Steps, in order:

    table   profiles the device and mends its table by whole networks (wants a quiet machine)
    search  a search per seed, and its network chosen in two ways: "probable", the most probable
            one; "ranked", the best by the shared weights of the `--among` most probable and of
            those that evolution breeds. --part i/n shares the seeds
    draw    `--random` uniform random networks a seed. They and the searched ones cost `--least` to
            1.0 of the budget by the table; then all are measured against each other, and random
            ones that are off by more than `--tolerance` of the searched ones' middle are dropped
            and drawn again (wants a quiet machine)
    train   everything alone, alike: network by network, training seeds the outer loop. --part i/n
            shares the work among processes
    report  OUT/result.csv, result.md and random.png

WORK keeps it all, the same command continues; parts may run side by side into the same WORK.
CIFAR_FOLDER holds train.parquet and test.parquet.

The verdict: the searched network's mean over training seeds, less the mean of the random ones, per
search seed; its mean against its own deviation over search seeds. To find out why, where it is
not above: how the shared weights rank all trained networks (Kendall), their parameters and
multiply-adds, how sure theta is.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau

from fbnas.commands.candidates import FINALISTS, ROUNDS, SCREENING
from fbnas.files import write_json
from fbnas.latency import Device, LatencyTable
from fbnas.search import (
    Band,
    Learned,
    SearchSettings,
    SharedWeightsJudge,
    draw_within,
    evolve,
    most_probable_within,
    rank_by_shared_weights,
    read_supernet,
)
from fbnas.search.logbook import read_result
from fbnas.space import Architecture, SearchSpace, build_network, count
from fbnas.training import Data, TrainingSettings, evaluate, load_data, train

sys.path.append(str(Path(__file__).parents[1]))
from steps import (
    append_rows,
    calibrated_table,
    circumstances,
    exported,
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
SPACE = HERE.parent / "cross_device" / "space.yaml"
STEPS = ("table", "search", "draw", "train", "report")
KINDS = ("probable", "ranked")
AUGMENT = {"flip": True}
ATTEMPTS = 5  # at drawing random networks that measure as the searched ones do


@dataclass(frozen=True)
class Study:
    """What every step needs."""

    options: argparse.Namespace
    space: SearchSpace
    data: Data
    device: Device

    @property
    def work(self) -> Path:
        return self.options.work

    @property
    def seeds(self) -> list[int]:
        return [int(seed) for seed in self.options.seeds.split(",")]

    def table(self) -> LatencyTable:
        return LatencyTable.load(self.work / "table.csv")

    def folder(self, seed: int) -> Path:
        return self.work / f"search_{seed}"

    def chosen(self, seed: int) -> list[Architecture]:
        """The searched networks, in the order of KINDS."""
        return [Architecture.load(self.folder(seed) / f"{kind}.yaml") for kind in KINDS]

    def named(self, blocks: str) -> Architecture:
        return Architecture(tuple(blocks.split()), self.space.name)


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
        epochs=options.epochs, batch_size=options.batch, augment=AUGMENT, device="cpu"
    )
    target = target_at(study.table(), study.space, study.data.classes, options.fraction)
    for seed in part_of(study.seeds, options.part):
        folder = study.folder(seed)
        if (folder / f"{KINDS[-1]}.yaml").is_file():
            continue
        started = time.monotonic()
        one = searched(folder, study.space, study.data, [target], settings=settings, seed=seed)[0]
        seconds = time.monotonic() - started
        probable = most_probable(study, one)
        judged = ranked(study, one, probable, seed)
        write_json(folder / "seconds.json", {"search": seconds, "all": time.monotonic() - started})
        for kind, architecture in zip(KINDS, (probable[0], judged), strict=True):
            architecture.save(folder / f"{kind}.yaml")
            print(f"seed {seed}, {kind}: {architecture}", flush=True)


def most_probable(study: Study, one: Learned) -> list[Architecture]:
    """The `among` most probable networks within the budget that use `least` of it."""
    return most_probable_within(
        one.distribution.probabilities(),
        one.latency_ms,
        budget_ms=one.budget_ms,
        base_ms=one.base_ms,
        count=study.options.among,
        space=study.space,
        limits=one.limits[1:],
        least_used=study.options.least,
    )


def ranked(study: Study, one: Learned, probable: Sequence[Architecture], seed: int) -> Architecture:
    """The best by the shared weights: of the most probable, and of those that evolution breeds.

    As `fbnas sample rank=shared_weights candidates_from=evolution`: evolution looks at few images,
    its finalists are ranked by all.
    """
    supernet = read_supernet(study.folder(seed), study.space, study.data.classes)
    bred = evolve(
        SharedWeightsJudge(supernet, study.data, seed=seed, **SCREENING),
        one.limits,
        theta=one.distribution,
        population=study.options.population,
        generations=ROUNDS - 1,
        floor=study.options.least,
        seed=seed,
    )
    finalists = {r.architecture.blocks: r.architecture for r in bred[:FINALISTS]}
    finalists |= {a.blocks: a for a in probable}
    everyone = list(finalists.values())
    return rank_by_shared_weights(supernet, everyone, study.data, seed=seed)[0].architecture


def draw(study: Study) -> None:
    """Random networks that measure as the searched ones, one seed after the other."""
    out = study.work / "networks.csv"
    for seed in study.seeds:
        if not is_known(rows_of(out), search_seed=seed):
            append_rows(out, drawn(study, seed))


def drawn(study: Study, seed: int) -> list[dict]:
    """A row per network of a search seed: the searched ones, then the random ones that are kept."""
    options, chosen = study.options, study.chosen(seed)
    one = read_result(study.folder(seed))[1][0]
    band = Band(one.limits, one.distribution.offered, floor=options.least)
    generator = torch.Generator().manual_seed(1_000 + seed)
    known = [tuple(a.path(study.space)) for a in chosen]
    kept: list[Architecture] = []
    for attempt in range(ATTEMPTS):
        if len(kept) == options.random:
            break
        paths = draw_within(
            one.distribution.offered.double(),
            band,
            2 * (options.random - len(kept)),
            generator=generator,
            known=known,
        )
        known += paths
        new = [Architecture.from_path(study.space, list(p), source="random") for p in paths]
        times, noise = measured(study, [*chosen, *new], seed)
        middle_ms = middle(times[: len(chosen)])
        off = [abs(ms / middle_ms - 1) for ms in times[len(chosen) :]]
        within = [a for a, by in zip(new, off, strict=True) if by <= options.tolerance]
        kept = [*kept, *within][: options.random]
        print(
            f"seed {seed}, attempt {attempt + 1}: {len(within)} of {len(new)} random networks "
            f"within {100 * options.tolerance:.0f} % of {middle_ms:.4f} ms (noise "
            f"{100 * noise:.1f} %); {len(kept)} of {options.random} found",
            flush=True,
        )
    everyone = [*chosen, *kept]
    times, noise = measured(study, everyone, seed)  # once more, all that count
    kinds = [*KINDS, *(f"random {i}" for i in range(len(kept)))]
    rows = []
    for kind, architecture, ms in zip(kinds, everyone, times, strict=True):
        network = build_network(study.space, architecture, study.data.classes)
        sizes = count(network, one_image(study.space))
        rows.append(
            {
                "search_seed": seed,
                "kind": kind,
                "predicted_ms": one.limits[0].of(architecture.path(study.space)),
                "budget_ms": one.budget_ms,
                "measured_ms": ms,
                "off": ms / middle(times[: len(chosen)]) - 1,
                "noise_floor": noise,
                "params": sizes.params,
                "macs": sizes.macs,
                "blocks": str(architecture),
            }
        )
    return rows


def measured(study: Study, networks: list[Architecture], seed: int) -> tuple[list[float], float]:
    """Latencies of whole networks against each other, ms, and the noise floor."""
    files = exported(networks, study.space, study.device, study.work / "models", study.data)
    found = study.device.measure_quietly(
        files, f"Timing {len(files)} networks", rounds=study.options.rounds, seed=seed
    )
    return [timing.latency_ms for timing in found.whole], found.noise_floor


def middle(times: Sequence[float]) -> float:
    return (min(times) + max(times)) / 2


def one_image(space: SearchSpace) -> tuple[int, int, int]:
    return (space.input_channels, space.resolution, space.resolution)


def train_all(study: Study) -> None:
    """Train what is not trained yet; a network that two seeds chose is trained once."""
    options, out = study.options, study.work / "trained.csv"
    rows = rows_of(study.work / "networks.csv")
    rows = rows[rows.search_seed.isin(study.seeds)]
    is_searched = rows.kind.isin(KINDS)
    wanted = [
        (blocks, seed)
        for seed in range(max(options.train_seeds, options.random_train_seeds))
        for part, seeds in ((rows[is_searched], options.train_seeds),
                            (rows[~is_searched], options.random_train_seeds))
        for blocks in part.blocks
        if seed < seeds
    ]  # fmt: skip
    mine = part_of(list(dict.fromkeys(wanted)), options.part)
    known = rows_of(out)
    left = [(b, s) for b, s in mine if not is_known(known, blocks=b, train_seed=s)]
    settings = TrainingSettings(
        epochs=options.train_epochs, batch_size=64, augment=AUGMENT, device="cpu"
    )
    data = study.data
    for number, (blocks, seed) in enumerate(left, start=1):
        started = time.monotonic()
        torch.manual_seed(seed)
        network = build_network(study.space, study.named(blocks), data.classes)
        found = train(network, data, settings=settings, seed=seed)
        _, accuracy = evaluate(found.network, data.test, mean=data.mean, std=data.std)
        seconds = time.monotonic() - started
        append_rows(
            out,
            [
                {
                    "blocks": blocks,
                    "train_seed": seed,
                    "accuracy": accuracy,
                    "validation_accuracy": found.validation_accuracy,
                    "seconds": seconds,
                }
            ],
        )
        print(
            f"{number}/{len(left)} seed {seed} {blocks}: {accuracy:.4f}, {seconds:.0f} s, about "
            f"{(len(left) - number) * seconds / 60:.0f} min left",
            flush=True,
        )


def report(study: Study) -> None:
    """The page. Needs every network trained at least once."""
    networks, trained = rows_of(study.work / "networks.csv"), rows_of(study.work / "trained.csv")
    networks = networks[networks.search_seed.isin(study.seeds)]
    missing = set(networks.blocks) - set(trained.blocks)
    if missing:
        sys.exit(f"{len(missing)} networks are not trained yet; run --steps train")
    by_shared = pd.concat([shared_weights(study, seed, networks) for seed in study.seeds])
    networks = networks.merge(by_shared, on=["search_seed", "blocks"])
    out = study.options.out
    out.mkdir(parents=True, exist_ok=True)
    result = networks.merge(trained, on="blocks")
    result.to_csv(out / "result.csv", index=False, float_format="%.6g")
    draw_strips(result, out / "random.png")
    page = words(study, networks, result)
    (out / "result.md").write_text(page)
    print(page)


def shared_weights(study: Study, seed: int, networks: pd.DataFrame) -> pd.DataFrame:
    """What a search's shared weights say of all its networks."""
    path = study.folder(seed) / "shared_weights.csv"
    own = networks[networks.search_seed == seed]
    known = rows_of(path)
    if known.empty or set(known.blocks) != set(own.blocks):
        supernet = read_supernet(study.folder(seed), study.space, study.data.classes)
        everyone = [study.named(blocks) for blocks in own.blocks.unique()]
        found = rank_by_shared_weights(supernet, everyone, study.data, seed=seed)
        known = pd.DataFrame(
            {
                "search_seed": seed,
                "blocks": [str(r.architecture) for r in found],
                "shared_cross_entropy": [r.cross_entropy for r in found],
            }
        )
        known.to_csv(path, index=False)
    return known


@dataclass(frozen=True)
class Compared:
    """One search seed and kind: accuracies by training seed, and of the random networks' means."""

    seed: int
    kind: str
    own: pd.Series
    random: pd.Series

    @property
    def gain(self) -> float:
        return float(self.own.mean() - self.random.mean())

    @property
    def beaten(self) -> int:
        return int((self.random < self.own.mean()).sum())


def compared(result: pd.DataFrame) -> list[Compared]:
    found = []
    for kind in KINDS:
        for seed, part in result.groupby("search_seed"):
            random = part[~part.kind.isin(KINDS)].groupby("blocks").accuracy.mean()
            found.append(Compared(int(seed), kind, part[part.kind == kind].accuracy, random))
    return found


def words(study: Study, networks: pd.DataFrame, result: pd.DataFrame) -> str:
    options, everything = study.options, compared(result)
    lines = [
        "# The searched network against random ones of the same measured latency",
        "",
        circumstances(study.device),
        f"{table_words(study.table())}.",
        "",
        f"Space {study.space.name}; {options.images} images of CIFAR-10, a fifth of them to "
        f"validate; searches of {options.epochs} epochs; trainings of {options.train_epochs} "
        f"epochs; budget {options.fraction:g} of the way from the fastest to the slowest network. "
        f"All networks cost {options.least:g} to 1.0 of it by the table, random ones within "
        f"{100 * options.tolerance:.0f} % of the searched ones' middle when measured (noise floor "
        f"{100 * networks.noise_floor.max():.1f} %).",
        "",
        f"Accuracies on the {len(study.data.test):,} test images, %, mean ± deviation (number): of "
        "a searched network over training seeds, of random ones over networks.",
        "",
        "| chosen | search seed | searched | random: mean | random: best | "
        "searched - mean, points | random ones beaten | measured against the middle |",
        "|---" * 8 + "|",
    ]
    for c in everything:
        own = networks[(networks.search_seed == c.seed) & (networks.kind == c.kind)].iloc[0]
        lines.append(
            f"| {c.kind} | {c.seed} | {spread(c.own)} | {spread(c.random)} | "
            f"{100 * c.random.max():.2f} | {100 * c.gain:+.2f} | {c.beaten} of {len(c.random)} | "
            f"{100 * own.off:+.1f} % |"
        )
    lines += ["", "## Verdict", ""]
    lines += [verdict([c for c in everything if c.kind == kind]) for kind in KINDS]
    lines += ["", "## Why", "", *reasons(study, networks, result)]
    return "\n".join([*lines, "", "![accuracies](random.png)", ""])


def verdict(parts: list[Compared]) -> str:
    """The gain over the mean of random networks, beside the spreads that it has to exceed."""
    gains = pd.Series([c.gain for c in parts])
    trainings = float(np.sqrt(np.mean([c.own.var() for c in parts])))
    networks = float(np.mean([c.random.std() for c in parts]))
    over = gains.std() if len(gains) > 1 else float("nan")
    least = np.nanmax([over, trainings])
    said = "above" if gains.mean() > least else "not above"
    means = pd.Series([c.own.mean() for c in parts])
    return (
        f"- {parts[0].kind}: {spread(means)} over search seeds; {100 * gains.mean():+.2f} points "
        f"against the mean of random networks, {said} the seeds' spread (over search seeds "
        f"{100 * over:.2f}, over training seeds {100 * trainings:.2f}); "
        f"{gains.mean() / networks:+.1f} standard deviations of random networks "
        f"({100 * networks:.2f}); against their best "
        f"{100 * float(np.mean([c.own.mean() - c.random.max() for c in parts])):+.2f}."
    )


def reasons(study: Study, networks: pd.DataFrame, result: pd.DataFrame) -> list[str]:
    """What tells good networks from others here: rank correlations with the accuracy alone."""
    accuracy = result.groupby("blocks").accuracy.mean()
    lines = [
        "Kendall's tau with the accuracy alone over all networks of a search seed; theta's mean "
        "probability of the block it likes best, a layer.",
        "",
        "| search seed | shared weights (-cross-entropy) | multiply-adds | parameters | "
        "measured ms | theta's best block | macs searched / random | params searched / random |",
        "|---" * 8 + "|",
    ]
    for seed, part in networks.groupby("search_seed"):
        own = part.drop_duplicates("blocks")
        known = accuracy[own.blocks].to_numpy()
        signs = {"shared_cross_entropy": -1, "macs": 1, "params": 1, "measured_ms": 1}
        taus = [kendalltau(sign * own[c], known).statistic for c, sign in signs.items()]
        one = read_result(study.folder(int(seed)))[1][0]
        sure = float(one.distribution.probabilities().max(dim=1).values.mean())
        is_searched = part.kind.isin(KINDS)
        ratios = [part[is_searched][c].mean() / part[~is_searched][c].mean()
                  for c in ("macs", "params")]  # fmt: skip
        cells = [*(f"{tau:.2f}" for tau in taus), f"{sure:.2f}", *(f"{r:.2f}" for r in ratios)]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    lines += ["", "The searched networks:", ""]
    chosen = networks[networks.kind.isin(KINDS)]
    return lines + [f"- seed {r.search_seed}, {r.kind}: `{r.blocks}`" for r in chosen.itertuples()]


def draw_strips(result: pd.DataFrame, path: Path) -> None:
    """A strip per search seed: every random network's mean, every training of the searched ones."""
    seeds = sorted(result.search_seed.unique())
    figure, axes = plt.subplots(figsize=(1.8 + 1.7 * len(seeds), 4.6), layout="constrained")
    colours = dict(zip(KINDS, ("tab:blue", "tab:red"), strict=True))
    shifts = dict(zip(KINDS, (0.2, 0.35), strict=True))
    for x, seed in enumerate(seeds):
        part = result[result.search_seed == seed]
        random = 100 * part[~part.kind.isin(KINDS)].groupby("blocks").accuracy.mean()
        label = {True: "random networks, mean of each", False: None}[x == 0]
        jitter = np.linspace(-0.3, -0.05, len(random))
        axes.scatter(x + jitter, random, color="grey", s=18, label=label)
        axes.plot([x - 0.35, x], [random.mean()] * 2, color="black", linewidth=1)
        for kind in KINDS:
            own = 100 * part[part.kind == kind].accuracy
            where = [x + shifts[kind]] * len(own)
            shown = f"{kind}, each training" if x == 0 else None
            axes.scatter(where, own, color=colours[kind], s=14, alpha=0.5, label=shown)
            axes.scatter(where[:1], [own.mean()], color=colours[kind], s=60, marker="_")
    axes.set_xticks(range(len(seeds)), [f"search seed {seed}" for seed in seeds])
    axes.set_ylabel("test accuracy alone, %")
    axes.set_title("Searched and random networks of the same measured latency", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


ACTIONS: dict[str, Callable[[Study], None]] = dict(
    zip(STEPS, (table, search, draw, train_all, report), strict=True)
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", type=Path, help="folder for the table, searches and trainings")
    add("cifar", type=Path, help="folder with train.parquet and test.parquet of CIFAR-10")
    add("--out", type=Path, default=HERE, help="folder for the result (default: beside this)")
    add("--steps", default=",".join(STEPS), help="separated by commas")
    add("--part", default="0/1", help="this part of so many, from 0, of search and train")
    add("--seeds", default="0,1,2", help="of the searches")
    add("--networks", type=int, default=20, help="that the table's correction is fitted on")
    add("--held-out", type=int, default=10, help="that judge it")
    add("--fraction", type=float, default=0.4, help="the budget")
    add("--images", type=int, default=4000, help="of CIFAR-10, a fifth of them to validate")
    add("--epochs", type=int, default=40, help="of a search")
    add("--batch", type=int, default=64, help="images a step of a search")
    add("--among", type=int, default=10, help="most probable networks that are ranked")
    add("--population", type=int, default=50, help=f"of evolution, {ROUNDS} rounds")
    add("--least", type=float, default=0.97, help="of the budget, that all networks cost")
    add("--tolerance", type=float, default=0.03, help="of measured latency")
    add("--rounds", type=int, default=30, help="of measuring")
    add("--random", type=int, default=10, help="random networks a search seed")
    add("--train-epochs", type=int, default=12)
    add("--train-seeds", type=int, default=3, help="of the searched networks")
    add("--random-train-seeds", type=int, default=3, help="of the random networks")
    add("--threads", type=int, default=1, help="of torch")
    add("--device", default="epyc", help="name of this machine")
    options = parser.parse_args()
    steps = steps_asked(parser, options.steps, ACTIONS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    space = SearchSpace.load(SPACE)
    path, limit = str(options.cifar), options.images
    data = load_data("huggingface", path=path, resize=True, space=space, limit=limit)
    study = Study(options, space, data, Device(name=options.device))
    take(steps, ACTIONS, study)


if __name__ == "__main__":
    main()
