"""What steps of a search and of training cost on a GPU, what bounds them, and whether they wait.

    python scripts/gpu/measure.py OUT [--space fbnet_cifar] [--batches 256,1024,64]
        [--settings bf16,tf32]

For each kind of step, precision, memory format and batch size: milliseconds a step by the clock,
and how long the GPU was busy with kernels in it (torch's profiler). Busy far below the clock: what
bounds the step is the CPU that launches kernels. Otherwise the larger of two floors says what does:
multiply-adds over the rate of a large matrix product, bytes (activations and weights, each written
once and read once forward and twice backward) over the rate of a large copy; both measured first.

Kinds: "alone" trains the median network, "graph" does by CUDA graphs, "path" is a weights step of
`search=fast`, "hard" its theta step. Then: how often a step makes the CPU wait for the GPU (torch's
sync debug mode), and how far a path's scores are from the CPU's. Needs a CUDA build of torch.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbnas.search import ArchitectureDistribution, Supernet
from fbnas.space import Architecture, SearchSpace, build_network, count

CLASSES = 10
PATHS = 4  # visited in turn: the first time that a shape is met, cuDNN looks for its kernel
SETTINGS = {  # name: (TF32 in convolutions, autocast to bf16, channels last)
    "bf16 channels last": (True, True, True),
    "bf16": (True, True, False),
    "tf32 channels last": (True, False, True),
    "tf32": (True, False, False),
    "fp32": (False, False, False),
}


class Bench:
    """A supernet and the median network on the GPU, with a batch of random images."""

    def __init__(self, space: SearchSpace, batch: int, *, bf16: bool, channels_last: bool) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.space, self.bf16 = space, bf16
        self.supernet = Supernet(space, CLASSES).train().to("cuda", memory_format=layout)
        network = build_network(space, median(space), CLASSES).train()
        self.alone = network.to("cuda", memory_format=layout)
        self.theta = ArchitectureDistribution(space)
        shape = (batch, space.input_channels, space.resolution, space.resolution)
        self.images = torch.randn(shape, device="cuda").contiguous(memory_format=layout)
        self.labels = torch.randint(CLASSES, (batch,), device="cuda")
        self.graphed: nn.Module | None = None
        self.optimisers = {
            self.supernet: torch.optim.SGD(self.supernet.parameters(), 0.01, 0.9),
            self.alone: torch.optim.SGD(self.alone.parameters(), 0.01, 0.9, fused=True),
        }
        self.paths = [self.theta.sample_path() for _ in range(PATHS)]

    def step(self, kind: str) -> Tensor:
        """Take a step without waiting for it; return its loss."""
        if kind == "hard":
            self.supernet.requires_grad_(False)
            loss = self._loss(self.supernet, self.theta.gates(1.0, hard=True))
            self.theta.logits.grad = None
            loss.backward()
            self.supernet.requires_grad_(True)
            return loss.detach()
        if kind == "path":
            self.paths.append(self.paths.pop(0))
            loss, module = self._loss(self.supernet, self.paths[0]), self.supernet
        else:
            if kind == "graph" and self.graphed is None:
                with self._autocast(cached=False):
                    self.graphed = torch.cuda.make_graphed_callables(self.alone, (self.images,))
            loss, module = self._loss(self.alone), self.alone
        self.optimisers[module].zero_grad(set_to_none=kind != "graph")
        loss.backward()
        self.optimisers[module].step()
        return loss.detach()

    def _loss(self, module: nn.Module, *gates: object) -> Tensor:
        with self._autocast(cached=self.graphed is None):
            scores = module(self.images, *gates)
        return F.cross_entropy(scores.float(), self.labels)

    def _autocast(self, *, cached: bool):
        if not self.bf16:
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=cached)


@cache
def median(space: SearchSpace) -> Architecture:
    """The network of the median multiply-adds among 101 random ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = [Architecture.random(space, generator) for _ in range(101)]
    return sorted(drawn, key=lambda a: costs(space, a)[0])[50]


def costs(space: SearchSpace, architecture: Architecture) -> tuple[int, int]:
    """Multiply-adds of one image, and elements of all outputs of convolutions, BN and ReLU."""
    network = build_network(space, architecture, CLASSES).eval()
    shape = (space.input_channels, space.resolution, space.resolution)
    elements = 0

    def add(module: nn.Module, given: object, output: Tensor) -> None:
        nonlocal elements
        elements += output[0].numel()

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    with torch.no_grad():
        network(torch.zeros(1, *shape))
    return count(network, shape).macs, elements


def ceilings() -> dict[str, float]:
    """TB/s of a large copy (read and written), TFLOP/s of large products, us of a small launch."""
    source = torch.randn(2**30, device="cuda")
    goal = torch.empty_like(source)
    found = {"copy_tb_s": 2 * 4 * 2**30 / seconds(lambda: goal.copy_(source), 10) / 1e12}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, True),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{name}_tflop_s"] = 2 * 8192**3 / seconds(lambda x=x, y=y: x @ y, 5) / 1e12
    small = torch.zeros(32, device="cuda")
    found["launch_us"] = 1e6 * seconds(lambda: small.add_(1), 1000)
    return found


def seconds(work: Callable[[], object], steps: int) -> float:
    """Seconds of one of `steps` in a row, the GPU's work included."""
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def busy_seconds(work: Callable[[], object], steps: int) -> tuple[float, int]:
    """Seconds a step in which the GPU runs kernels, and their number a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            work()
        torch.cuda.synchronize()
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.device_time for e in kernels) / steps / 1e6, round(len(kernels) / steps)


def measured(options: argparse.Namespace, space: SearchSpace) -> Iterator[dict[str, object]]:
    """A row per batch, setting and kind."""
    for batch in options.batches:
        for name in options.settings:
            tf32, bf16, channels_last = SETTINGS[name]
            torch.backends.cudnn.allow_tf32 = tf32
            started = time.perf_counter()
            bench = Bench(space, batch, bf16=bf16, channels_last=channels_last)
            for kind in ("path", "hard", "alone", "graph"):
                row: dict[str, object] = {"setting": name, "batch": batch, "kind": kind}
                try:
                    for _ in range(2 * PATHS if kind == "path" else 2):
                        bench.step(kind)
                    torch.cuda.synchronize()
                    row["first_s"] = time.perf_counter() - started
                    torch.cuda.reset_peak_memory_stats()
                    steps = 2 * PATHS if kind == "path" else 5
                    row["ms"] = 1e3 * seconds(lambda b=bench, k=kind: b.step(k), steps)
                    row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
                    busy, kernels = busy_seconds(lambda b=bench, k=kind: b.step(k), PATHS)
                    row |= {"busy_ms": 1e3 * busy, "kernels": kernels}
                except RuntimeError as error:
                    row["error"] = str(error).splitlines()[0]
                print(" ".join(words(value) for value in row.values()), flush=True)
                started = time.perf_counter()
                yield row
            del bench
            torch.cuda.empty_cache()


def words(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Collect where the CPU waits for the GPU."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("warn")  # warns of itself
        warnings.simplefilter("always")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)]


def waits(space: SearchSpace) -> dict[str, object]:
    """Where each kind of step waits, by line and how often."""
    bench = Bench(space, 64, bf16=True, channels_last=True)
    found = {}
    for kind in ("path", "hard", "alone"):
        bench.step(kind)
        with counted_waits() as lines:
            bench.step(kind)
        found[kind] = {line: lines.count(line) for line in sorted(set(lines))}
    return found


def against_cpu(space: SearchSpace) -> dict[str, float]:
    """Largest difference of a path's scores from those of the CPU, relative to the largest."""
    torch.manual_seed(0)
    supernet = Supernet(space, CLASSES).train()
    path = ArchitectureDistribution(space).sample_path()
    images = torch.randn(32, space.input_channels, space.resolution, space.resolution)
    with torch.no_grad():
        expected = supernet(images, path)
        supernet.cuda()
        found = {}
        for name, (tf32, bf16, _) in SETTINGS.items():
            torch.backends.cudnn.allow_tf32 = tf32
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                scores = supernet(images.cuda(), path).float().cpu()
            found[name] = float((scores - expected).abs().max() / expected.abs().max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--space", default="fbnet_cifar")
    parser.add_argument("--batches", default="256,1024,64")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="separated by commas")
    options = parser.parse_args()
    options.settings = options.settings.split(",")
    options.batches = [int(batch) for batch in options.batches.split(",")]
    if not torch.cuda.is_available():
        sys.exit("This measures a GPU; expected one that torch can use (a CUDA build of torch).")
    space = SearchSpace.load(options.space)
    macs, elements = costs(space, median(space))
    result: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "space": space.name,
        "median": {"macs": macs, "elements": elements},
    }
    result["ceilings"] = ceilings()
    result["against_cpu"] = against_cpu(space)
    result["waits"] = waits(space)
    print(json.dumps(result), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for row in measured(options, space):
        result.setdefault("steps", []).append(row)
        (options.out / "steps.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
