"""Layers that int8 makes slower: chosen exactly where costs are known, and never against the clock.

Latencies are a cost model over which layers a file has in float; nothing here depends on speed.
"""

import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from digits_network import Trained
from torch import nn

from fbnas.compression import StaticQuantization, calibrate, quantize_file
from fbnas.compression.paying import (
    AT_ONCE,
    ChainCosts,
    Latencies,
    best_choice,
    chain_costs,
    paying_layers,
)
from fbnas.export import export_onnx
from fbnas.latency.devices import Measurement
from fbnas.latency.lowering import layer_names, write_onnx
from fbnas.latency.timing import Timing


def measurement(times: Sequence[float], noise_floor: float = 0.0) -> Measurement:
    timings = tuple(Timing(ms, ms, ms, 10) for ms in times)
    return Measurement(timings, noise_floor, np.array([times] * 2))


@dataclass
class Chain:
    """A network of layers with costs; its files are the names of the layers in float."""

    float_ms: Sequence[float]
    change_ms: Sequence[float]
    base_ms: float = 10.0
    most_at_once: int = 0
    drift: float = 1.0
    written: list[bool] = field(default_factory=list)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(f"layer{i:02d}" for i in range(len(self.float_ms)))

    def write(self, path: Path, float_layers: Collection[str] = (), *, draft: bool = False) -> Path:
        self.written.append(draft)
        path.write_text(json.dumps([name in set(float_layers) for name in self.layers]))
        return path

    def ms(self, chosen: Sequence[bool]) -> float:
        layers = sum(ms for ms, left in zip(self.float_ms, chosen, strict=True) if left)
        changes = sum(
            ms
            for ms, (a, b) in zip(self.change_ms, itertools.pairwise(chosen), strict=True)
            if a != b
        )
        return self.base_ms + layers + changes

    def measure(self, files: Sequence[Path]) -> Measurement:
        """The machine gets slower from one measurement to the next."""
        self.most_at_once = max(self.most_at_once, len(files))
        self.drift *= 1.1
        return measurement([self.drift * self.ms(json.loads(x.read_text())) for x in files])

    def fastest(self) -> float:
        return min(self.ms(x) for x in itertools.product([False, True], repeat=len(self.layers)))


def random_chain(seed: int, layers: int) -> Chain:
    generator = np.random.default_rng(seed)
    float_ms = generator.normal(0.1, 0.5, layers)
    return Chain(list(float_ms), list(generator.uniform(0, 0.4, layers - 1)))


def fp32_of(chain: Chain, folder: Path) -> Path:
    return chain.write(folder / "fp32.onnx", chain.layers)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_choice_of_a_chain_is_that_of_all_choices(seed: int) -> None:
    chain = random_chain(seed, 9)
    costs = ChainCosts(chain.base_ms, np.array(chain.float_ms), np.array(chain.change_ms))
    assert chain.ms(best_choice(costs)) == pytest.approx(chain.fastest())


def test_two_files_a_border_tell_every_cost() -> None:
    chain = random_chain(0, 12)
    borders = range(1, 12)
    up_to = np.array([chain.ms([i < k for i in range(12)]) for k in borders])
    after = np.array([chain.ms([i >= k for i in range(12)]) for k in borders])
    found = chain_costs(up_to, after, chain.ms([False] * 12), chain.ms([True] * 12))
    np.testing.assert_allclose(found.float_ms, chain.float_ms, atol=1e-9)
    np.testing.assert_allclose(found.change_ms, chain.change_ms, atol=1e-9)


def test_a_margin_asks_more_of_every_change() -> None:
    costs = ChainCosts(10.0, np.array([1.0, -1.0, 1.0]), np.array([0.2, 0.2]))
    assert best_choice(costs) == (False, True, False)
    assert best_choice(costs, margin_ms=0.4) == (False, False, False)
    tie = ChainCosts(10.0, np.array([1.0, -0.4, 1.0]), np.array([0.2, 0.2]))
    assert best_choice(tie) == (False, False, False)


@pytest.mark.parametrize("seed", range(8))
def test_the_mixed_file_is_the_fastest_of_all_that_could_be_written(
    seed: int, tmp_path: Path
) -> None:
    chain = random_chain(seed, 11)
    fp32 = fp32_of(chain, tmp_path)
    layers, latencies = paying_layers(chain, fp32, chain.measure, folder=tmp_path)
    chosen = [name in layers for name in chain.layers]
    found = {x.layer: (x.saved_ms, x.change_ms) for x in latencies.layer_costs}
    assert tuple(found) == chain.layers
    scale = latencies.int8_ms / chain.ms([False] * 11)  # the machine got slower
    expected = np.array([*zip(chain.float_ms, [*chain.change_ms, 0.0], strict=True)])
    ratios = np.array(list(found.values()))[:, 0] / expected[:, 0]
    assert ratios == pytest.approx(ratios[0])
    assert 0 < ratios[0] <= scale
    kept = {
        "mixed": chain.ms(chosen),
        "int8": chain.ms([False] * 11),
        "fp32": chain.ms([True] * 11),
    }
    assert kept[latencies.fastest] == pytest.approx(chain.fastest())
    assert (latencies.fastest == "mixed") == bool(layers)
    assert chain.most_at_once <= AT_ONCE + 2
    assert [path.name for path in tmp_path.iterdir()] == ["fp32.onnx"]
    assert chain.written.count(True) == 21  # two drafts a border, and plain int8


@pytest.mark.parametrize(
    ("float_ms", "change_ms", "fastest"),
    [
        ([0.5] * 6, 0.1, "int8"),  # every layer gains
        ([-0.5] * 6, 0.1, "fp32"),  # none does
        ([0.1, 0.1, -0.3, 0.1, 0.1, 0.1], 0.5, "int8"),  # one loses less than two changes cost
        ([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0], 0.5, "mixed"),
    ],
)
def test_the_fastest_of_the_three_wins(
    float_ms: list[float], change_ms: float, fastest: str, tmp_path: Path
) -> None:
    chain = Chain(float_ms, [change_ms] * 5)
    layers, found = paying_layers(chain, fp32_of(chain, tmp_path), chain.measure, folder=tmp_path)
    assert found.fastest == fastest
    assert layers == (chain.layers[:3] if fastest == "mixed" else ())


def test_layers_that_are_float_anyway_stay_so(tmp_path: Path) -> None:
    chain = Chain([1.0, -1.0, 1.0, 1.0, -1.0, 1.0], [0.1] * 5)
    fixed = ("layer03",)
    seen: list[list[bool]] = []

    def measure(files: Sequence[Path]) -> Measurement:
        seen.extend(json.loads(file.read_text()) for file in files)
        return chain.measure(files)

    fp32 = fp32_of(chain, tmp_path)
    layers, _ = paying_layers(chain, fp32, measure, folder=tmp_path, always_float=fixed)
    assert all(chosen[3] for chosen in seen)
    assert layers == ("layer01", "layer04")


@pytest.mark.parametrize("count", [0, 1])
def test_a_network_of_one_layer_has_nothing_to_mix(count: int, tmp_path: Path) -> None:
    chain = Chain([-0.5] * count, [])
    layers, found = paying_layers(chain, fp32_of(chain, tmp_path), chain.measure, folder=tmp_path)
    assert layers == ()
    assert found.mixed_ms is None
    assert found.fastest == ("fp32" if count else "int8")


@pytest.mark.parametrize(
    ("fp32_ms", "int8_ms", "mixed_ms", "noise_floor", "fastest"),
    [
        (1.0, 0.8, 0.7, 0.01, "mixed"),
        (1.0, 0.8, 0.795, 0.01, "int8"),  # no more than the noise
        (1.0, 1.2, 1.005, 0.01, "mixed"),  # as fast as fp32 within the noise, and smaller
        (1.0, 1.2, 1.05, 0.01, "fp32"),
        (1.0, 1.2, 1.08, 0.5, "fp32"),  # a busy machine excuses no more than 5 %
        (1.0, 0.9, None, 0.01, "int8"),
    ],
)
def test_the_noise_decides_for_the_smaller_file(
    fp32_ms: float, int8_ms: float, mixed_ms: float | None, noise_floor: float, fastest: str
) -> None:
    assert Latencies(fp32_ms, int8_ms, mixed_ms, noise_floor).fastest == fastest


def quantized_layers(path: Path, layers: Sequence[str]) -> list[bool]:
    """Which layers of a file read their weights through a DequantizeLinear."""
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    nodes = {node.name: node for node in graph.node}
    return [makers.get(nodes[name].input[1]) == "DequantizeLinear" for name in layers]


def test_a_real_file_keeps_in_float_what_a_device_says_is_slower(
    trained: Trained, tmp_path: Path
) -> None:
    stages = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(7)]
    network = nn.Sequential(nn.Conv2d(1, 4, 1), *stages, nn.Flatten(), nn.Linear(256, 10))
    write_onnx(network, (1, 8, 8), tmp_path / "fp32.onnx", batch=None)
    layers = layer_names(onnx.load(tmp_path / "fp32.onnx").graph)
    slow = [2 <= i < 7 for i in range(len(layers))]
    chain = Chain([-1.0 if x else 1.0 for x in slow], [0.25] * (len(layers) - 1), base_ms=40.0)

    def measure(files: Sequence[Path]) -> Measurement:
        made = [[not x for x in quantized_layers(file, layers)] for file in files]
        return measurement([chain.ms(chosen) for chosen in made])

    method = StaticQuantization(calibration_images=16)
    report = quantize_file(
        tmp_path / "fp32.onnx", tmp_path / "int8.onnx", trained.data, method, measure=measure
    )
    expected = tuple(name for name, x in zip(layers, slow, strict=True) if x)
    assert report.layers == layers
    assert report.quick_layers == report.float_layers == expected
    assert report.pays
    assert quantized_layers(tmp_path / "int8.onnx", layers) == [not x for x in slow]
    assert report.latencies == Latencies(chain.ms([True] * len(layers)), 40.0, 35.5, 0.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.onnx", "int8.onnx"]


def test_all_layers_in_float_is_the_float_graph(trained: Trained, tmp_path: Path) -> None:
    export_onnx(trained.network, tmp_path / "fp32.onnx", card=trained.card)
    calibrated = calibrate(
        tmp_path / "fp32.onnx", trained.data, StaticQuantization(calibration_images=8)
    )
    calibrated.write(tmp_path / "float.onnx", calibrated.layers)
    kinds = [node.op_type for node in onnx.load(tmp_path / "float.onnx").graph.node]
    assert kinds == [node.op_type for node in onnx.load(tmp_path / "fp32.onnx").graph.node]
