"""Channels leave where a device gets faster, on one whose latency is a staircase by formula."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digits_network import Trained, accuracy, fit
from torch import Tensor, nn

from fbnas.compression import ChannelStep, LatencyOutcome, LatencyPruning, Tools, compress_
from fbnas.compression.channel_steps import LayerCosts, placed_layers, shapes_to_time, timed, useful
from fbnas.compression.latency_pruning import Planner, Try
from fbnas.compression.pruning import ChannelPruning, rank, without
from fbnas.errors import InputError
from fbnas.latency.table import OVERHEAD, LatencyTable
from fbnas.space import Architecture, SearchSpace, Stage, Stem, build_network

SHAPE = (3, 8, 8)
IDLE_MS = 0.01


class Device:
    """Takes `tile` channels at once: as long for one of them as for all.

    whole: what a whole network saves of what its layers save.
    """

    def __init__(self, tile: int = 16, *, whole: float = 1.0) -> None:
        self.tile, self.whole, self.timed = tile, whole, 0

    def __call__(self, networks: Sequence[nn.Module]) -> list[float]:
        self.timed += len(networks)
        layers = [self.layers_ms(network) for network in networks]
        scales = [1.0 if hasattr(x, "activation") else self.whole for x in networks]
        most = layers[0] * (1 - self.whole)  # the first of several is the network as it was
        return [
            IDLE_MS + scale * ms + (most if scale < 1 else 0.0)
            for ms, scale in zip(layers, scales, strict=True)
        ]

    def layers_ms(self, network: nn.Module) -> float:
        total = 0.0

        def add(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            total += self.layer_ms(module, output)

        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        hooks = [layer.register_forward_hook(add) for layer in layers]
        with torch.no_grad():
            network.eval()(torch.zeros(1, *getattr(network, "input_shape", SHAPE)))
        for hook in hooks:
            hook.remove()
        return total

    def layer_ms(self, layer: nn.Module, output: Tensor) -> float:
        def tiles(channels: int) -> int:
            return math.ceil(channels / self.tile)

        if isinstance(layer, nn.Linear):
            return 1e-4 * tiles(layer.in_features) * tiles(layer.out_features)
        area = math.prod(layer.kernel_size) * math.prod(output.shape[2:])
        if layer.groups > 1:
            return 1e-4 * area * tiles(layer.out_channels)
        return 1e-4 * area * tiles(layer.in_channels) * tiles(layer.out_channels)


def plain(side: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1, groups=48),
        nn.Conv2d(48, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, 96, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(side),
        nn.Flatten(),
        nn.Linear(96 * side**2, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    ).eval()


def fbnet() -> nn.Module:
    space = SearchSpace(
        name="wide", resolution=8, stem=Stem(32, 1),
        stages=(Stage(32, 2, 1), Stage(64, 3, 2)), head=128,
    )  # fmt: skip
    torch.manual_seed(0)
    blocks = ("k3_e3", "k5_e1_g2", "k3_e6", "skip", "k3_e1_g2")
    return build_network(space, Architecture(blocks, space.name), classes=10).eval()


def flattened() -> nn.Module:
    """Each channel of the last convolution is four features of a linear layer."""
    return plain(2)


NETWORKS = {"plain": plain, "fbnet": fbnet}


def method(**options: object) -> LatencyPruning:
    return LatencyPruning(**{"importance": "magnitude", "granularity": 4, "widths": 40, **options})


def outcome(changes: Sequence[object]) -> tuple[LatencyOutcome, list[ChannelStep]]:
    return changes[0], list(changes[1:])


def test_only_the_tops_of_the_steps_are_useful() -> None:
    stairs = {width: float(math.ceil(width / 16)) for width in range(4, 65, 4)}
    assert useful(stairs) == (64, 48, 32, 16)
    assert useful({64: 4.0, 60: 3.9, 56: 3.5, 48: 3.0}, noise_ms=0.2) == (64, 56, 48)
    assert useful({64: 4.0, 56: 4.5, 48: 4.0, 40: 3.9}) == (64, 40)  # some widths are slower
    assert useful({8: 1.0}) == (8,)
    slope = {64: 1.0, 56: 0.95, 48: 0.9, 40: 0.85, 32: 0.8, 24: 0.75}
    assert useful(slope, noise_ms=0.12) == (64, 40)  # small gains add up


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("tile", [8, 16])
def test_the_latency_asked_for_is_met_by_useful_widths_alone(name: str, tile: int) -> None:
    model, device = NETWORKS[name](), Device(tile)
    own_ms = device([model])[0]
    report = compress_(model, method(latency=0.6), input_shape=SHAPE, measure=device)
    found, sets = outcome(report.changes)
    assert found.own_ms == pytest.approx(own_ms)
    assert device([model])[0] == pytest.approx(found.latency_ms)
    assert found.latency_ms <= (0.6 + 0.02) * own_ms
    assert report.after.latency_ms == pytest.approx(found.latency_ms)
    assert sum(change.after < change.before for change in sets) > 1
    for change in sets:
        assert change.after in change.useful
        assert change.after == change.before or change.after % tile == 0
        assert all(width % 4 == 0 for width in change.timed_ms)
        slower = [w for w in change.timed_ms if w % tile and w != change.before]
        assert not set(slower) & set(change.useful)
        assert all(str(width) in change.reason for width in slower)
    assert model(torch.zeros(1, *SHAPE)).shape == (1, 10)


@pytest.mark.parametrize("make", [plain, flattened, fbnet])
def test_single_layers_predict_whole_networks_of_any_widths(make: Callable[[], nn.Module]) -> None:
    model, device, tools = make(), Device(8), Tools(SHAPE)
    ranked = rank(model, ChannelPruning(), tools)[1]
    full = {found.name: found.channels for found in ranked}
    widths = {found.name: range(found.channels, 7, -8) for found in ranked}
    layers = placed_layers(model, ranked, SHAPE)
    table, own_ms = timed(shapes_to_time(layers, widths, full), model, device)
    costs = LayerCosts(table, layers, widths, full)
    planner = Planner.of(ranked, widths, costs, own_ms=own_ms)
    generator = torch.Generator().manual_seed(0)
    assert costs.network_ms(full) == pytest.approx(own_ms)
    for _ in range(5):
        chosen = {
            name: offered[int(torch.randint(0, len(offered), (1,), generator=generator))]
            for name, offered in widths.items()
        }
        narrowed = without(model, planner.sets(chosen), tools)
        assert device([narrowed])[0] == pytest.approx(costs.network_ms(chosen))
        assert planner.predicted(chosen, 1.0) == pytest.approx(costs.network_ms(chosen))


def planner_of(model: nn.Module, device: Device, seed: int) -> Planner:
    ranked = rank(model, ChannelPruning(importance="random", seed=seed), Tools(SHAPE))[1]
    full = {found.name: found.channels for found in ranked}
    widths = {found.name: range(found.channels, 15, -8) for found in ranked}
    layers = placed_layers(model, ranked, SHAPE)
    table, own_ms = timed(shapes_to_time(layers, widths, full), model, device)
    return Planner.of(ranked, widths, LayerCosts(table, layers, widths, full), own_ms=own_ms)


def test_plans_lose_little_more_than_the_best_of_all() -> None:
    excess = []
    for seed, fraction in itertools.product(range(4), (0.4, 0.6, 0.8)):
        planner = planner_of(plain(), Device(16), seed)
        budget = fraction * planner.own_ms
        plan = planner.within(budget, 1.0)
        assert planner.predicted(plan, 1.0) <= budget + 1e-12
        every = itertools.product(*planner.useful.values())
        plans = [dict(zip(planner.useful, widths, strict=True)) for widths in every]
        able = [each for each in plans if planner.predicted(each, 1.0) <= budget]
        best = min(planner.lost(each) for each in able)
        excess.append(planner.lost(plan) / best - 1)
        for name, width in plan.items():  # nothing could be given back
            wider = [w for w in planner.useful[name] if w > width]
            assert all(planner.predicted(plan | {name: w}, 1.0) > budget for w in wider)
    assert min(excess) >= -1e-9
    assert sum(excess) / len(excess) < 0.1


def test_a_plan_is_corrected_where_layers_promise_too_much() -> None:
    device = Device(4, whole=0.6)
    report = compress_(plain(), method(latency=0.7), input_shape=SHAPE, measure=device)
    found, _ = outcome(report.changes)
    assert len(found.tries) > 1
    assert found.tries[0].fraction > 0.72
    assert found.latency_ms / found.own_ms == pytest.approx(0.7, abs=0.021)
    assert found.chosen == found.tries[-1].number
    assert found.tries[0].predicted_ms / found.own_ms <= 0.7


def test_what_was_measured_is_kept_for_a_resumed_command(tmp_path: Path) -> None:
    device, first = Device(8), plain()
    once = compress_(first, method(latency=0.5), input_shape=SHAPE, measure=device, folder=tmp_path)

    def other(networks: Sequence[nn.Module]) -> list[float]:
        assert len(networks) == 2  # before and after, as compress_ reports them
        return [2.0, 1.0]

    second = plain()
    again = compress_(
        second, method(latency=0.5), input_shape=SHAPE, measure=other, folder=tmp_path
    )
    assert again.changes == once.changes
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
    report = json.loads((tmp_path / "latency_pruning.json").read_text())
    assert report["latency_ms"] == once.changes[0].latency_ms
    assert [each["layer"] for each in report["sets"]] == [each.layer for each in once.changes[1:]]
    assert all(each["reason"] for each in report["sets"])


def test_a_table_of_layers_serves_instead_of_a_device(tmp_path: Path) -> None:
    compress_(plain(), method(latency=0.5), input_shape=SHAPE, measure=Device(), folder=tmp_path)
    path = tmp_path / "channel_steps.csv"
    table = LatencyTable.load(path)
    assert OVERHEAD in table
    model = plain()
    report = compress_(model, method(latency=0.6, table=str(path)), input_shape=SHAPE)
    found, sets = outcome(report.changes)
    assert found.tries[0].measured_ms is None
    assert found.latency_ms <= 0.6 * found.own_ms
    assert found.latency_ms == pytest.approx(Device()([model])[0])
    assert all(change.after in change.useful for change in sets)
    LatencyTable(table.header, table.entries[:-1]).save(path)
    with pytest.raises(InputError, match=r"channel_steps\.csv has no row .*leave table= out"):
        compress_(plain(), method(latency=0.6, table=str(path)), input_shape=SHAPE)


def test_a_latency_out_of_reach_is_refused_and_nothing_is_changed() -> None:
    model = plain()
    with pytest.raises(InputError, match=r"latency is 0\.1 of .* ms; 0\.\d+ is the least"):
        compress_(model, method(latency=0.1, max_ratio=0.5), input_shape=SHAPE, measure=Device())
    assert torch.equal(model[0].weight, plain()[0].weight)


def test_something_has_to_measure() -> None:
    with pytest.raises(InputError, match="nothing to measure with; expected measure="):
        compress_(plain(), method(), input_shape=SHAPE)


def test_few_widths_are_spread_evenly() -> None:
    device = Device(8)
    report = compress_(
        plain(), method(latency=0.7, widths=4, max_ratio=0.7), input_shape=SHAPE, measure=device
    )
    for change in report.changes[1:]:
        assert len(change.timed_ms) <= 4
        assert min(change.timed_ms) >= 0.3 * change.before


def test_on_digits_the_latency_is_met_and_accuracy_comes_back(trained: Trained) -> None:
    model = copy.deepcopy(trained.network)
    report = compress_(
        model,
        LatencyPruning(latency=0.7, granularity=4),
        input_shape=trained.card.input_shape,
        train=lambda pruned: fit(pruned, trained.data, epochs=3, rate=0.02),
        data=trained.data,
        measure=Device(8),
    )
    sets = report.changes[1:]
    assert report.after.latency_ms <= 0.72 * report.before.latency_ms
    assert all(change.after in change.useful for change in sets)
    assert all(0 <= change.lost < 1 for change in sets)
    assert accuracy(model, trained.data) > accuracy(trained.network, trained.data) - 0.03


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latency": 1.0}, r"latency is 1\.0; expected a fraction of the network's own"),
        ({"tolerance": -0.1}, r"tolerance is -0\.1; expected a fraction"),
        ({"granularity": 0}, "granularity is 0; expected a whole number of at least 1"),
        ({"widths": 1}, "widths is 1; expected a whole number of at least 2"),
        ({"corrections": -1}, "corrections is -1; expected a whole number of at least 0"),
        ({"max_ratio": 1.0}, r"max_ratio is 1\.0; expected a fraction"),
        ({"importance": "tailor"}, "Did you mean 'taylor'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        LatencyPruning(**settings)


def test_a_plan_that_was_tried_is_told_in_words() -> None:
    tried = Try(2, {"head.0": 112}, 0.06434, 0.06375, 0.6928, 0.0073)
    assert str(tried) == (
        "plan 2: predicted 0.06434 ms, measured 0.06375 ms, 0.69 of the network's own"
    )
    assert str(replace(tried, measured_ms=None)).startswith("plan 2: predicted 0.06434 ms, 0.69")
