"""Ranges of activations: against the values themselves and the definition of each choice."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fbnas.latency.lowering import Scheme, write_onnx
from fbnas.latency.ranges import BINS, SMOOTH, STRIDE, activation_ranges, entropy_bins


def shown(count: int = 4) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = [7] * (count - 1) + [3]
    return [generator.standard_normal((n, 3, 8, 8)).astype(np.float32) for n in sizes]


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).eval()


@pytest.fixture(scope="module")
def model(network: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("ranges") / "fp32.onnx"
    write_onnx(network, (3, 8, 8), path, batch=None)
    return onnx.load(path)


def activations(network: nn.Sequential) -> list[np.ndarray]:
    """The input and what every module says to it, in order."""
    found = [torch.cat([torch.from_numpy(images) for images in shown()])]
    with torch.no_grad():
        for module in network:
            found.append(module(found[-1]))
    return [values.numpy() for values in found]


def test_minmax_is_what_was_seen_of_every_tensor(
    network: nn.Sequential, model: onnx.ModelProto
) -> None:
    found = list(activation_ranges(model, shown()).items())
    names = {name for node in model.graph.node for name in node.output} | {"images"}
    assert {name for name, _ in found} == names
    expected = {(float(x.min()), float(x.max())) for x in activations(network)}
    for _, seen in found:
        assert any(seen == pytest.approx(other, abs=1e-5) for other in expected)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_encloses_that_part_of_the_values(
    network: nn.Sequential, model: onnx.ModelProto, percentile: float
) -> None:
    found = activation_ranges(model, shown(), ranges="percentile", percentile=percentile)
    images = activations(network)[0]
    low, high = found["images"]
    width = 1.001 * float(images.max() - images.min()) / BINS
    tail = (100 - percentile) / 200
    assert (images < low).mean() <= tail < (images < low + width).mean()
    assert (images > high).mean() <= tail < (images > high - width).mean()
    for name, (low, high) in activation_ranges(model, shown()).items():
        assert low <= found[name][0] < found[name][1] <= high


def slow_entropy_bins(counts: np.ndarray, levels: int) -> int:
    """The definition, one threshold and one bin after the other."""
    counts = counts.astype(float)
    counts[0] = counts[1]
    best, kept = np.inf, len(counts)
    for i in range(len(counts), levels - 1, -STRIDE):
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        members: dict[int, list[int]] = {}
        for bin_ in range(i):
            members.setdefault(bin_ * levels // i, []).append(bin_)
        q = np.zeros(i)
        for bins in members.values():
            filled = [b for b in bins if counts[b] > 0]
            for b in filled:
                q[b] = sum(counts[f] for f in filled) / len(filled)
        if not q.any():
            continue
        p, q = p / p.sum(), q / q.sum()
        if p[-1] > 0 == q[-1]:
            q[-1] = SMOOTH
        divergence = sum(p[b] * np.log(p[b] / q[b]) for b in range(i) if p[b] > 0)
        if divergence < best - 1e-12:
            best, kept = divergence, i
    return kept


@pytest.mark.parametrize("levels", [16, 32])
@pytest.mark.parametrize("shape", ["normal", "outliers", "one_sided", "sparse", "flat"])
def test_entropy_keeps_the_bins_of_the_least_divergence(shape: str, levels: int) -> None:
    generator = np.random.default_rng(0)
    values = {
        "normal": np.abs(generator.standard_normal(20000)),
        "outliers": np.abs(np.append(generator.standard_normal(20000), [40.0, 41.0])),
        "one_sided": np.maximum(generator.standard_normal(20000), 0),
        "sparse": np.abs(generator.standard_normal(60)),
        "flat": generator.random(20000),
    }[shape]
    counts = np.histogram(values, 256, range=(0, values.max()))[0]
    found = entropy_bins(counts, levels)
    assert found == slow_entropy_bins(counts, levels)
    if shape == "outliers":
        assert found < 64  # of 256: 40 is cut off, 4 is not


def test_entropy_of_activations_lies_within_what_was_seen_and_cuts_an_outlier(
    model: onnx.ModelProto,
) -> None:
    calibration = shown()
    calibration[0][0, 0, 0, 0] = 1000.0
    seen = activation_ranges(model, calibration)
    found = activation_ranges(model, calibration, ranges="entropy")
    for name, (low, high) in seen.items():
        assert low <= found[name][0] <= found[name][1] <= high
    assert found["images"][1] < 130  # of 1000; at least 128 of 2048 bins are kept


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy"])
def test_a_tensor_that_never_changes_has_a_range(ranges: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        network[0].weight.zero_()
        network[0].bias.fill_(-1.0)
    write_onnx(network, (3, 8, 8), tmp_path / "dead.onnx", batch=None)
    found = activation_ranges(onnx.load(tmp_path / "dead.onnx"), shown(), ranges=ranges)
    assert sum(low == high == 0.0 for low, high in found.values()) >= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranges": "entrpy"}, "Did you mean 'entropy'"),
        ({"activations": "symetric"}, "Did you mean 'symmetric'"),
        ({"weights": "both"}, "Unknown symmetry of weights"),
        ({"weights": "asymmetric"}, "expected per_channel=false"),
        ({"percentile": 40.0}, "percentile is 40; expected above 50"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheme(**options)
