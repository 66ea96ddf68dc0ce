"""Zeros are where the definition puts them, and stay there whatever comes after."""

import copy
import csv
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from digits_network import Trained, fit
from onnx import numpy_helper
from torch import nn

from fbnas.compression import (
    ChannelPruning,
    LayerScan,
    LayerSparsity,
    Sparsity,
    compress_,
    held,
    shared,
    weighted,
)
from fbnas.compression.layer_scan import threshold_at, within
from fbnas.compression.magnitude import gradual, kind_of, prunable, sparsity_of, zero_smallest_
from fbnas.errors import InputError
from fbnas.export import export_onnx
from fbnas.report.sparsity_scan import draw_scan, read_scan
from fbnas.space import load_network, save_network
from fbnas.space.depthwise import DepthwiseConv2d

SHAPE = (3, 8, 8)


def small(seed: int = 0) -> nn.Sequential:
    """A convolution, a grouped one, two depthwise ones and a linear layer, of other spreads."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        DepthwiseConv2d(16, 16, 5, padding=2, groups=16, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


def zeros(network: nn.Module) -> list[torch.Tensor]:
    return [module.weight.detach() == 0 for module in weighted(network)]


def step_of(network: nn.Module) -> None:
    """Train a little with momentum and decay, which would move every weight that may move."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(4, *SHAPE)).square().sum().backward()
        optimizer.step()


def test_global_zeroes_exactly_the_smallest_of_all_pruned_weights() -> None:
    network = small()
    before = {i: network[i].weight.detach().clone() for i in (0, 1, 7)}
    whole = {i: network[i].weight.detach().clone() for i in (3, 4)}
    report = compress_(network, Sparsity(sparsity=0.7, steps=1), input_shape=SHAPE)
    magnitudes = torch.cat([weight.abs().flatten() for weight in before.values()])
    count = round(0.7 * len(magnitudes))
    limit = magnitudes.sort().values[count]
    for i, weight in before.items():
        assert torch.equal(network[i].weight, torch.where(weight.abs() < limit, 0.0, weight))
    for i, weight in whole.items():  # depthwise filters stay whole unless they are asked for
        assert torch.equal(network[i].weight, weight)
    assert sum(change.zeros for change in report.changes) == count
    assert [(change.layer, change.kind) for change in report.changes] == [
        ("0", "convolution"),
        ("1", "convolution"),
        ("7", "linear"),
    ]
    assert min(change.threshold for change in report.changes) == pytest.approx(float(limit))
    assert report.before.nonzero - report.after.nonzero == count


def test_layer_zeroes_the_same_fraction_of_each_also_among_equal_weights() -> None:
    network = small()
    with torch.no_grad():
        network[7].weight.fill_(0.5)
    kinds = ("convolution", "depthwise", "linear")
    report = compress_(
        network, Sparsity(sparsity=0.75, scope="layer", steps=1, kinds=kinds), input_shape=SHAPE
    )
    assert [change.zeros for change in report.changes] == [
        round(0.75 * module.weight.numel()) for module in weighted(network)
    ]
    assert [change.kind for change in report.changes].count("depthwise") == 2


def test_a_layer_may_have_a_sparsity_of_its_own() -> None:
    network, tuned = small(), list[float]()

    def tune(model: nn.Module) -> None:
        tuned.append(float((model[7].weight == 0).double().mean()))

    method = Sparsity(sparsity=0.5, steps=3, layers={"7": 0.9})
    report = compress_(network, method, input_shape=SHAPE, train=tune)
    found = {change.layer: change for change in report.changes}
    assert found["7"].zeros == round(0.9 * found["7"].weights)
    others = [change for name, change in found.items() if name != "7"]
    zeros, weights = (sum(getattr(x, what) for x in others) for what in ("zeros", "weights"))
    assert zeros == round(0.5 * weights)
    assert tuned == sorted(tuned)
    assert tuned[0] == pytest.approx(0.9 * (1 - (2 / 3) ** 3), abs=0.01)
    everything = dict.fromkeys(("0", "1", "7"), 0.25)
    report = compress_(small(), Sparsity(layers=everything, steps=1), input_shape=SHAPE)
    assert all(x.zeros == round(0.25 * x.weights) for x in report.changes)
    with pytest.raises(InputError, match=r"Unknown layer to prune: '77'"):
        compress_(small(), Sparsity(layers={"77": 0.5}), input_shape=SHAPE)
    with pytest.raises(InputError, match=r"sparsity of layer 7 is 1\.5; expected a fraction"):
        Sparsity(layers={"7": 1.5})


def test_no_layer_loses_more_than_max_sparsity_and_the_total_is_met_elsewhere() -> None:
    network = small()
    with torch.no_grad():
        network[1].weight.mul_(1e-3)
    method = Sparsity(sparsity=0.6, steps=1, max_sparsity=0.8)
    report = compress_(network, method, input_shape=SHAPE)
    found = {change.layer: change for change in report.changes}
    assert found["1"].zeros == int(0.8 * found["1"].weights)
    total = sum(change.weights for change in report.changes)
    assert sum(change.zeros for change in report.changes) == round(0.6 * total)


def test_small_layers_are_left_and_none_at_all_is_refused() -> None:
    network = small()
    report = compress_(network, Sparsity(steps=1, min_weights=100), input_shape=SHAPE)
    assert [change.layer for change in report.changes] == ["0", "1"]
    with pytest.raises(InputError, match="no layer of kind linear with at least 81 weights"):
        prunable(network, kinds=["linear"], min_weights=81)


def test_a_channel_per_group_is_depthwise_and_two_are_not() -> None:
    assert kind_of(nn.Conv2d(8, 16, 3, groups=8)) == "depthwise"
    assert kind_of(nn.Conv2d(8, 16, 3, groups=4)) == "convolution"
    assert kind_of(nn.Conv2d(1, 16, 3)) == "convolution"


def test_the_schedule_is_the_cubic_one_of_zhu_and_gupta() -> None:
    found = gradual(0.1, 0.9, 4)
    assert found == pytest.approx([0.9 - 0.8 * left**3 for left in (0.75, 0.5, 0.25, 0)])
    assert gradual(0, 0.5, 1) == [0.5]


def test_each_step_prunes_then_tunes_and_what_was_zero_stays_zero() -> None:
    network, seen = small(), []

    def train(model: nn.Module) -> int:
        seen.append([torch.as_tensor(z) for z in zeros(model)])
        step_of(model)
        return len(seen)

    method = Sparsity(sparsity=0.8, steps=3)
    report = compress_(network, method, input_shape=SHAPE, train=train)
    layers = [0, 1, 4]  # of the weighted ones, those that are pruned
    total = sum(seen[0][i].numel() for i in layers)
    counts = [sum(int(found[i].sum()) for i in layers) for found in seen]
    assert counts == [round(total * 0.8 * (1 - left**3)) for left in (2 / 3, 1 / 3, 0)]
    for earlier, later in zip(seen, [*seen[1:], zeros(network)], strict=True):
        assert all(bool((b | ~a).all()) for a, b in zip(earlier, later, strict=True))
    assert report.trained == 3
    assert sparsity_of(prunable(network, kinds=method.kinds)) == pytest.approx(0.8, abs=1 / total)


def test_weights_that_are_zero_already_count_and_never_come_back() -> None:
    network = small()
    compress_(network, Sparsity(sparsity=0.5, steps=1), input_shape=SHAPE)
    before = zeros(network)
    compress_(network, Sparsity(sparsity=0.3, steps=2), input_shape=SHAPE, train=step_of)
    assert all(torch.equal(a, b) for a, b in zip(before, zeros(network), strict=True))
    compress_(network, Sparsity(sparsity=0.6, steps=1, scope="layer"), input_shape=SHAPE)
    assert all(bool((b | ~a).all()) for a, b in zip(before, zeros(network), strict=True))


def test_few_weights_left_are_no_shared_weights() -> None:
    layer = nn.Linear(40, 10)
    zero_smallest_({"": layer}, 0.95)
    assert shared(layer.weight) is None
    with held(layer):
        assert layer.parametrizations.weight.original.shape == (10, 40)
    with torch.no_grad():
        layer.weight.copy_((layer.weight * 10).round().clamp(-1, 1))
        layer.weight[0] = 1.0
    found = shared(layer.weight)
    assert found is not None
    assert torch.equal(found[0][found[1]], layer.weight)


def test_the_scan_reads_its_threshold_off_where_the_line_leaves_the_tolerance() -> None:
    points = [(0.0, 0.9), (0.5, 0.89), (0.8, 0.83), (0.9, 0.88)]
    assert within(points, 0.87) == pytest.approx(0.5 + 0.3 * 0.02 / 0.06)
    assert within(points, 0.5) == 0.9
    weight = torch.tensor([[0.0, -0.4, 0.1], [0.3, -0.2, 0.5]])
    assert threshold_at(weight, 0.5) == pytest.approx(0.3)  # three of six magnitudes are under it
    assert threshold_at(torch.zeros(4), 1.0) > 0


def test_sensitivity_scans_each_layer_alone_and_scales_its_thresholds_to_the_total(
    trained: Trained, tmp_path: Path
) -> None:
    network = copy.deepcopy(trained.network)
    before = {name: layer.weight.detach().clone() for name, layer in prunable(network).items()}
    method = Sparsity(sparsity=0.6, scope="sensitivity", steps=1, scan=(0.5, 0.8, 0.95))
    report = compress_(network, method, data=trained.data, folder=tmp_path)
    changes: list[LayerSparsity] = list(report.changes)
    layers = prunable(network, kinds=method.kinds)
    assert [change.layer for change in changes] == list(layers)
    assert sum(c.zeros for c in changes) == round(0.6 * sum(c.weights for c in changes))

    probe = copy.deepcopy(trained.network)  # one point of one layer, by hand
    scans = {change.layer: change.scan for change in changes}
    name = "layers.2.expand.0"
    weight = probe.get_submodule(name).weight
    limit = weight.detach().abs().flatten().sort().values[round(0.8 * weight.numel())]
    with torch.no_grad():
        weight[weight.abs() < limit] = 0
    scan = scans[name]
    assert isinstance(scan, LayerScan)
    alone = compress_(probe, Sparsity(sparsity=0, steps=1), data=trained.data).before.accuracy
    assert dict(scan.points)[0.8] == pytest.approx(alone)
    assert scan.points[0] == (0.0, pytest.approx(report.before.accuracy))

    ratios = []  # zeroed magnitudes over the layer's threshold, and kept ones
    for change in changes:
        assert change.scan is not None
        relative = before[change.layer].abs() / change.scan.threshold
        zeroed = layers[change.layer].weight == 0
        kept = relative[~zeroed]
        capped = change.zeros == int(method.max_sparsity * change.weights)
        ratios.append(
            (float(relative[zeroed].max()), float("inf") if capped else float(kept.min()))
        )
    assert max(low for low, _ in ratios) <= min(high for _, high in ratios) * (1 + 1e-6)

    rows = list(csv.DictReader((tmp_path / "sparsity_scan.csv").read_text().splitlines()[1:]))
    assert len(rows) == 4 * len(changes)
    drawn, tolerance = read_scan(tmp_path / "sparsity_scan.csv")
    assert tolerance == method.tolerance
    for layer in drawn:
        scanned = scans[layer.name]
        assert scanned is not None
        assert layer.points == tuple(
            (s, pytest.approx(accuracy, rel=1e-5)) for s, accuracy in scanned.points
        )
        assert layer.threshold_std == pytest.approx(scanned.threshold / scanned.std, rel=1e-4)
    said = draw_scan(tmp_path)
    page = (tmp_path / "sparsity_scan.html").read_text()
    assert len(re.findall("<polyline class", page)) == len(changes)
    assert "<script" not in page
    assert any(re.match(r"  linear: 0\.\d+, one layer", line) for line in said)
    assert any(re.match(r"  convolution: median of \d+ layers 0\.", line) for line in said)
    table = list(csv.DictReader((tmp_path / "sparsity.csv").open()))
    assert [int(row["zeros"]) for row in table] == [change.zeros for change in changes]


def test_nothing_is_drawn_where_nothing_was_scanned_and_a_damaged_scan_is_refused(
    tmp_path: Path,
) -> None:
    assert draw_scan(tmp_path) == []
    (tmp_path / "sparsity_scan.csv").write_text("layer,sparsity\n")
    with pytest.raises(InputError, match="expected the sparsity_scan.csv"):
        draw_scan(tmp_path)


def test_masks_survive_tuning_files_export_and_other_methods(
    trained: Trained, tmp_path: Path
) -> None:
    network = copy.deepcopy(trained.network)
    rates = iter((0.02, 0.02, 0.02))

    def train(model: nn.Module) -> None:
        fit(model, trained.data, epochs=1, rate=next(rates))

    report = compress_(network, Sparsity(sparsity=0.7, steps=2), train=train, data=trained.data)
    assert report.after.accuracy > report.before.accuracy - 0.05
    counted = report.after.nonzero
    asked = sum(c.zeros for c in report.changes)
    assert report.before.nonzero - counted == asked
    before = zeros(network)

    save_network(tmp_path, network, trained.card)
    loaded, _ = load_network(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, zeros(loaded), strict=True))

    export_onnx(network, tmp_path / "x.onnx", card=trained.card)
    stored = [numpy_helper.to_array(x) for x in onnx.load(tmp_path / "x.onnx").graph.initializer]
    weights = [x for x in stored if x.ndim in (2, 4)]
    assert sum(x.size - np.count_nonzero(x) for x in weights) == asked

    kept = compress_(network, ChannelPruning(ratio=0.25), train=train, data=trained.data)
    pruned = list(prunable(network, kinds=("convolution", "linear")).values())
    share = sum(int((layer.weight == 0).sum()) for layer in pruned) / sum(
        layer.weight.numel() for layer in pruned
    )
    assert 0.5 < share < 0.8  # channels of small weights left, with their zeros
    assert kept.after.nonzero < counted
    held_after = zeros(network)
    compress_(network, Sparsity(sparsity=0.9, steps=1), data=trained.data)
    assert all(bool((b | ~a).all()) for a, b in zip(held_after, zeros(network), strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1\.0; expected a fraction"),
        ({"scope": "globl"}, "Did you mean 'global'"),
        ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ({"scan_images": 0}, "scan_images is 0"),
        ({"max_sparsity": 0.5}, r"max_sparsity is 0\.5; expected from sparsity, 0\.8, to 1"),
        ({"tolerance": 0}, "tolerance is 0; expected more than 0"),
        ({"scan": [0.5, 1.0]}, "scan is .*; expected a list of sparsities"),
        ({"scan": []}, "expected a list of sparsities"),
        ({"kinds": ["conv"]}, "Unknown kind of layer 'conv'"),
        ({"kinds": "linear"}, "kinds is 'linear'; expected a list"),
        ({"kinds": []}, r"kinds is \[\]; expected a list"),
        ({"min_weights": -1}, "min_weights is -1"),
    ],
)
def test_settings_of_sparsity_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Sparsity(**settings)


def test_a_scan_without_images_is_refused() -> None:
    with pytest.raises(InputError, match="compress_ got no data"):
        compress_(small(), Sparsity(scope="sensitivity"), input_shape=SHAPE)
