"""Training steps on a CPU with freed memory kept and given back: time and peak memory.

    python scripts/allocator/measure.py [--rounds 5] [--steps 4] [--out DIR]

Each round times both ways, each in a process of its own, in alternating order; the ratio is that of
their medians over rounds, the noise how far a round's own ratio lies from it. One thread.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from fbnas.files import atomic_write
from fbnas.latency import Device

sys.path.append(str(Path(__file__).parents[1]))
from steps import circumstances

HERE = Path(__file__).parent
CASES = {  # name: (space, block of every layer, images a step)
    "224x224, k3_e6, 32 images": (str(HERE.parent / "results" / "imagenette.yaml"), "k3_e6", 32),
    "224x224, k3_e3, 32 images": (str(HERE.parent / "results" / "imagenette.yaml"), "k3_e3", 32),
    "224x224, k3_e3, 8 images": (str(HERE.parent / "results" / "imagenette.yaml"), "k3_e3", 8),
    "32x32, fbnet_cifar, k3_e6, 64 images": ("fbnet_cifar", "k3_e6", 64),
    "16x16, 10 layers, k3_e3, 64 images": (
        str(HERE.parent / "cross_device" / "space.yaml"),
        "k3_e3",
        64,
    ),
}
WAYS = ("kept", "given back")
TIMED = """
import json, resource, sys, time
from contextlib import nullcontext
import torch
from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training.allocator import memory_kept

space, block, images, way, steps = sys.argv[1:]
torch.set_num_threads(1)
space = SearchSpace.load(space)
device, layout = torch.device("cpu"), torch.channels_last
names = tuple(block for _ in space.layers)
network = build_network(space, Architecture(names, space.name), 10).to(memory_format=layout).train()
shape = (int(images), space.input_channels, space.resolution, space.resolution)
x, y = torch.randn(shape).to(memory_format=layout), torch.randint(10, shape[:1])
times = []
with memory_kept(device) if way == "kept" else nullcontext():
    for _ in range(2 + int(steps)):
        started = time.perf_counter()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        times.append(time.perf_counter() - started)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps([min(times[2:]), peak]))
"""


def timed(case: str, way: str, steps: int) -> tuple[float, float]:
    """Return the least seconds of a step, and the process's peak memory in GB."""
    given = [*map(str, CASES[case]), way, str(steps)]
    found = subprocess.run(
        [sys.executable, "-c", TIMED, *given], capture_output=True, text=True, check=True
    )
    seconds, peak = json.loads(found.stdout)
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    lines = [
        "# A training step with freed memory kept, and given back",
        "",
        circumstances(Device()),
        "| case | ms given back | ms kept | ratio (rounds) | GB given back | GB kept |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(options.rounds):
            for way in WAYS if number % 2 else WAYS[::-1]:
                found[way].append(timed(case, way, options.steps))
        seconds = {way: [s for s, _ in found[way]] for way in WAYS}
        ms = {way: 1e3 * statistics.median(seconds[way]) for way in WAYS}
        peak = {way: max(p for _, p in found[way]) for way in WAYS}
        ratios = [a / b for a, b in zip(seconds["kept"], seconds["given back"], strict=True)]
        lines.append(
            f"| {case} | {ms['given back']:.1f} | {ms['kept']:.1f} | "
            f"{ms['kept'] / ms['given back']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{peak['given back']:.2f} | {peak['kept']:.2f} |"
        )
        print(lines[-1], flush=True)
    atomic_write(options.out / "result.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
