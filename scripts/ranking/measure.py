"""Do 1,000 candidates ranked by the shared weights cost less than an epoch of the search?

    python scripts/ranking/measure.py OUT [--candidates 1000] [--images 40000] [--rounds 3]

Interleaved in one process, in space `fbnet_cifar` on random images: (a) weights steps and (b) theta
steps of `search=fast` with theta awake, taken by the search's own loop; (c) `SharedWeightsJudge` on
what `fbnas sample rank=shared_weights candidates=1000` ranks: the most probable networks and draws
from P_theta, within 90 to 100 % of the budget. All by the few images of SCREENING, then FINALISTS
of them by all images that it takes by default. Every ranking is a new judge that remembers nothing.
Theta and the budget are those of a real search (--theta: its metrics.jsonl); --uniform draws the
candidates uniformly instead, which share fewer beginnings.

An epoch of so many images is not run but computed from the median steps: its number of weights
steps times (a) and of theta steps times (b). The seconds of (c) are those of whole rankings. The
weights are untrained and the images noise: the arithmetic is the same.
"""

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fbnas import __version__
from fbnas.commands.candidates import FINALISTS, SCREENING, drawn
from fbnas.files import read_jsonl
from fbnas.latency.table import LatencyTable
from fbnas.search import SearchSettings, SharedWeightsJudge, Target, best_within
from fbnas.search.loop import Loop, one_process
from fbnas.search.objectives import DualAscent
from fbnas.space import Architecture, SearchSpace
from fbnas.training.data import Data
from fbnas.training.images import Images, TensorImages
from fbnas.training.task import CLASSIFICATION

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "latency_tables" / "epyc_fbnet_cifar_onnxruntime_int8.csv"
THETA = ROOT / "scripts" / "gpu" / "search.jsonl"
CLASSES = 10
MOST_PROBABLE = 5  # the default of `count`
STEPS = 10  # of each kind before and after each ranking


@dataclass
class Times:
    """Seconds: of every step, and of each whole ranking's two parts."""

    weights: list[float] = field(default_factory=list)
    theta: list[float] = field(default_factory=list)
    screening: list[float] = field(default_factory=list)
    finalists: list[float] = field(default_factory=list)


def noise(images: int, space: SearchSpace) -> Data:
    """Random training images; no others are read."""
    torch.manual_seed(0)
    shape = (images, space.input_channels, space.resolution, space.resolution)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    found = TensorImages(pixels, torch.randint(CLASSES, (images,)))
    half = (0.5,) * space.input_channels
    names = tuple(str(number) for number in range(CLASSES))
    sizes = (space.input_channels, space.resolution)
    return Data("noise", names, *sizes, found, found, lambda: found, half, half)


def candidates_of(loop: Loop, count: int, *, uniform: bool) -> list[Architecture]:
    """What `fbnas sample` would rank."""
    learner = loop.learners[0]
    theta = learner.distribution
    best = [] if uniform else best_within(theta, learner.limits, count=MOST_PROBABLE)
    return drawn(count, theta, learner.limits, best, seed=0)


def timed(call: Callable[[], object], seconds: list[float]) -> None:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - started)


def endless(loop: Loop, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as the search reads them, epoch after epoch."""
    for epoch in itertools.count():
        yield from loop.order(images, epoch, start=0)


def steps(loop: Loop, times: Times, count: int) -> None:
    """Take steps of both kinds as an epoch does, batches read in time too."""
    epoch = loop.settings.warmup
    tau = loop.settings.tau_at(epoch)
    weights, theta = (endless(loop, x) for x in (loop.weights_images, loop.theta_images))

    def weights_step() -> None:
        images, labels = next(weights)
        gates = loop.weights_gates(epoch, loop.weights_learner(epoch))
        loop.weights_step(images, labels, gates)

    def theta_step() -> None:
        images, labels = next(theta)
        loop.theta_step(loop.learners[0], images, labels, tau)

    for _ in range(count):
        loop.supernet.train().requires_grad_(True)
        timed(weights_step, times.weights)
        loop.supernet.requires_grad_(False)
        timed(theta_step, times.theta)


def rank(loop: Loop, candidates: list[Architecture], times: Times) -> None:
    screen = SharedWeightsJudge(loop.supernet, loop.data, **SCREENING)
    timed(lambda: screen(candidates), times.screening)
    best = [found.architecture for found in screen(candidates)[:FINALISTS]]
    judge = SharedWeightsJudge(loop.supernet, loop.data)
    timed(lambda: judge(best), times.finalists)


def page(loop: Loop, times: Times, candidates: int, arguments: argparse.Namespace) -> str:
    batch = loop.settings.batch_size
    counts = [loop.steps(images) for images in (loop.weights_images, loop.theta_images)]
    middles = [statistics.median(found) for found in (times.weights, times.theta)]
    epoch = sum(count * middle for count, middle in zip(counts, middles, strict=True))
    screened = sum(SCREENING.values())
    judge = SharedWeightsJudge(loop.supernet, loop.data)
    finals = len(judge.calibration) + len(judge.held_out)
    finalists = min(FINALISTS, candidates)
    rows = [
        ("(a) weights step", times.weights, batch),
        ("(b) theta step", times.theta, batch),
        (f"(c) {candidates} by {screened} images each", times.screening, screened * candidates),
        (f"(c) {finalists} of them by {finals} images", times.finalists, finals * finalists),
    ]
    whole = [a + b for a, b in zip(times.screening, times.finalists, strict=True)]
    middle = statistics.median(whole)
    where = torch.cuda.get_device_name() if loop.device.type == "cuda" else "CPU"
    lines = [
        f"{time.strftime('%Y-%m-%d')}, space {arguments.space}, batch {batch}, {where} "
        f"({platform.machine()}), torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
        f"fbnas {__version__}, {arguments.rounds} interleaved rounds.",
        "",
        "| what | median s | from | to | ms per image |",
        "|---|---|---|---|---|",
    ]
    for name, found, images in rows:
        median = statistics.median(found)
        lines.append(
            f"| {name} | {median:.3f} | {min(found):.3f} | {max(found):.3f} | "
            f"{1e3 * median / images:.3f} |"
        )
    lines += [
        "",
        f"An epoch of {arguments.images} images with theta awake, computed from the median steps "
        f"({counts[0]} of the weights, {counts[1]} of theta): {epoch:.1f} s. {candidates} "
        f"{'uniform' if arguments.uniform else 'of theta'} candidates: {middle:.1f} s "
        f"({min(whole):.1f} to {max(whole):.1f}), "
        f"{middle / epoch:.2f} of the epoch.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--space", default="fbnet_cifar")
    parser.add_argument("--table", type=Path, default=TABLE, help="of the search")
    parser.add_argument("--theta", type=Path, default=THETA, help="metrics.jsonl of the search")
    parser.add_argument("--uniform", action="store_true", help="candidates without theta")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--images", type=int, default=40_000, help="for training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    space = SearchSpace.load(arguments.space)
    settings = SearchSettings(device=arguments.device)
    learned = read_jsonl(arguments.theta)[-1]["targets"][0]
    loop = Loop(
        space,
        noise(arguments.images, space),
        [Target(LatencyTable.load(arguments.table), learned["budget_ms"], "searched")],
        objective=DualAscent(),
        settings=settings,
        seed=0,
        out=None,
        fabric=one_process(settings),
        task=CLASSIFICATION,
    )
    theta = loop.learners[0].distribution
    with torch.no_grad():
        theta.logits.copy_(torch.tensor(learned["logits"], dtype=torch.float).nan_to_num(0.0))
    candidates = candidates_of(loop, arguments.candidates, uniform=arguments.uniform)
    steps(loop, Times(), 2)  # to warm up
    times = Times()
    for number in range(1, arguments.rounds + 1):
        steps(loop, times, STEPS)
        rank(loop, candidates, times)
        steps(loop, times, STEPS)
        print(f"round {number} of {arguments.rounds} done", flush=True)
    report = page(loop, times, len(candidates), arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
