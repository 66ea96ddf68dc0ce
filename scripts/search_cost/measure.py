"""What a step of a search costs against a step of training: seconds per image and peak memory.

    python scripts/search_cost/measure.py OUT [--space fbnet_cifar] [--batch 64] [--rounds 7]

Interleaved in one run on the same images: (a) all nine branches summed as public implementations
write it; (b) ours, all branches mixed by the same gates; (c) `search=fast`: a weights step on one
path, and theta steps of every kind; (d) training the median network alone. (a) and (b) are also
compared number by number. Time is that of a median step; the noise is the interquartile range.
Memory: on a GPU torch's peak; on a CPU the growth of the process over what it holds without a step,
each in a process of its own.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbnas.search import ArchitectureDistribution, Supernet
from fbnas.space import Architecture, SearchSpace, build_network, count
from fbnas.training.settings import choose_device

CANDIDATES = 101
CLASSES = 10
THETA_SHARE = 0.2
NAMES = {
    "naive": "(a) straightforward sum over nine branches",
    "all": "(b) ours, all branches",
    "path": "(c) weights step on one path",
    "theta_hard": "(c) theta step, hard",
    "theta_two_paths": "(c) theta step, two_paths",
    "theta_all": "(c) theta step, all",
    "alone": "(d) the median network alone",
}


class Bench:
    """Every kind of step on the same images."""

    def __init__(self, space: SearchSpace, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.space, self.device = space, device
        supernet = Supernet(space, CLASSES).train()
        self.plain = copy.deepcopy(supernet).to(device)
        self.ours = supernet.to(device, memory_format=torch.channels_last)
        self.alone = build_network(space, median(space), CLASSES).train()
        self.alone.to(device, memory_format=torch.channels_last)
        self.theta = ArchitectureDistribution(space)
        shape = (batch, space.input_channels, space.resolution, space.resolution)
        self.images = torch.randn(shape, device=device)
        self.last = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        modules = (self.plain, self.ours, self.alone)
        self.optimisers = {m: torch.optim.SGD(m.parameters(), 0.01, 0.9) for m in modules}

    def step(self, kind: str) -> float:
        """Take a step and return its loss."""
        if kind == "naive":
            return self._train(self.plain, self._naive(self._gates()))
        if kind == "all":
            return self._train(self.ours, self.ours(self.last, self._gates().to(self.device)))
        if kind == "path":
            return self._train(self.ours, self.ours(self.last, self.theta.sample_path()))
        if kind == "alone":
            return self._train(self.alone, self.alone(self.last))
        return self._theta(kind.removeprefix("theta_"))

    def _gates(self) -> Tensor:
        with torch.no_grad():
            return self.theta.gates(5.0, generator=torch.Generator().manual_seed(1))

    def _naive(self, gates: Tensor) -> Tensor:
        gates = gates.to(self.device)
        features = self.plain.stem(self.images)
        for layer, gate in zip(self.plain.layers, gates, strict=True):
            features = sum(gate[i] * layer.branch(i)(features) for i in layer.index)
        return self.plain.classifier(self.plain.head(features))

    def _train(self, module: nn.Module, scores: Tensor) -> float:
        loss = F.cross_entropy(scores, self.labels)
        self.optimisers[module].zero_grad(set_to_none=True)
        loss.backward()
        self.optimisers[module].step()
        return float(loss.detach())

    def _theta(self, kind: str) -> float:
        self.ours.requires_grad_(False)
        if kind == "two_paths":
            gates, among = self.theta.two_path_gates(1.0)
        else:
            gates, among = self.theta.gates(1.0, hard=kind == "hard"), None
        loss = F.cross_entropy(self.ours(self.last, gates, among), self.labels)
        self.theta.logits.grad = None
        loss.backward()
        self.ours.requires_grad_(True)
        return float(loss.detach())


def median(space: SearchSpace) -> Architecture:
    """The network of the median multiply-adds among random ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = [Architecture.random(space, generator) for _ in range(CANDIDATES)]
    shape = (space.input_channels, space.resolution, space.resolution)
    return sorted(drawn, key=lambda a: count(build_network(space, a, CLASSES), shape).macs)[
        CANDIDATES // 2
    ]


def compare(bench: Bench) -> tuple[float, float]:
    """Largest difference of scores and of weights' gradients of (a) and (b), relative."""
    outputs = []
    for module, forward in (
        (bench.plain, bench._naive),
        (bench.ours, lambda gates: bench.ours(bench.last, gates.to(bench.device))),
    ):
        module.zero_grad(set_to_none=True)
        scores = forward(bench._gates())
        F.cross_entropy(scores, bench.labels).backward()
        slopes = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        outputs.append((scores.detach(), slopes))
    (a, slope_a), (b, slope_b) = outputs
    scores = float((a - b).abs().max() / a.abs().max())
    return scores, float((slope_a - slope_b).norm() / slope_a.norm())


def times(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Seconds of every kind of step, visited in turn."""
    seconds: dict[str, list[float]] = {kind: [] for kind in NAMES}
    for kind in NAMES:
        bench.step(kind)
    for _ in range(rounds):
        for kind, found in seconds.items():
            repeats = 3 if kind in ("path", "alone") else 1  # paths differ: a mean of some
            started = time.perf_counter()
            for _ in range(repeats):
                bench.step(kind)
            found.append((time.perf_counter() - started) / repeats)
    return seconds


def peak_mb(bench: Callable[[], Bench], kind: str, device: torch.device) -> float:
    """What a step adds to the memory in use, in MB (1e6 bytes)."""
    made = bench()
    if device.type == "cuda":
        made.step(kind)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made.step(kind)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        made.step(kind)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) * 1024 / 1e6


def page(
    seconds: dict[str, list[float]], memory: dict[str, float], arguments: argparse.Namespace,
    differences: tuple[float, float], device: torch.device,
) -> str:  # fmt: skip
    middle = {kind: statistics.median(found) for kind, found in seconds.items()}
    alone = middle["alone"]
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    lines = [
        f"Space {arguments.space}, batch {arguments.batch}, {where}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s), {arguments.rounds} interleaved rounds.",
        "",
        "| step | ms per image | IQR | time / (d) | memory of a step | memory / (d) |",
        "|---|---|---|---|---|---|",
    ]
    for kind, name in NAMES.items():
        quarter, _, three = statistics.quantiles(seconds[kind], n=4)
        lines.append(
            f"| {name} | {1e3 * middle[kind] / arguments.batch:.3f} | "
            f"{100 * (three - quarter) / middle[kind]:.0f} % | {middle[kind] / alone:.2f} | "
            f"{memory[kind]:.0f} MB | {memory[kind] / memory['alone']:.2f} |"
        )
    lines += [
        "",
        f"(a) / (b): {middle['naive'] / middle['all']:.2f}; scores differ by {differences[0]:.1e}, "
        f"gradients of the weights by {differences[1]:.1e} (relative).",
        "",
        "An epoch with theta awake, against an epoch of (d) over all images:",
        "",
    ]
    for kind in ("theta_hard", "theta_two_paths", "theta_all"):
        epoch = (1 - THETA_SHARE) * middle["path"] + THETA_SHARE * middle[kind]
        four = (1 - THETA_SHARE) * middle["path"] + 4 * THETA_SHARE * middle[kind]
        lines.append(
            f"- {kind.removeprefix('theta_')}: {epoch / alone:.2f} with one target, "
            f"{four / alone:.2f} with four ({four / epoch:.2f} times one)"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--space", default="fbnet_cifar")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory-of", help="print one number and end (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    space = SearchSpace.load(arguments.space)

    def bench() -> Bench:
        return Bench(space, arguments.batch, device)

    if arguments.memory_of:
        print(peak_mb(bench, arguments.memory_of, device))
        return
    memory = {}
    for kind in NAMES:
        command = [sys.executable, *sys.argv, "--memory-of", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[kind] = float(done.stdout.split()[-1])
    made = bench()
    differences = compare(made)
    report = page(times(made, arguments.rounds), memory, arguments, differences, device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
