"""Pruned networks compute what the network without its removed channels computes."""

import copy
from pathlib import Path

import pytest
import torch
from digits_network import Trained, accuracy, fit
from random_images import random_images
from torch import Tensor, nn

from fbnas.compression import ChannelPruning, ChannelSet, CompressionReport, Tools, compress_
from fbnas.compression.pruning import IMPORTANCES, prune_
from fbnas.errors import InputError
from fbnas.space import (
    BLOCKS,
    Architecture,
    Network,
    NetworkCard,
    SearchSpace,
    Stage,
    Stem,
    build_network,
    count,
    load_network,
    save_network,
)

SPACE = SearchSpace(
    name="pruned",
    resolution=16,
    stem=Stem(16, 1),
    stages=(Stage(16, 2, 1), Stage(32, 3, 2)),
    head=64,
)
SHAPE = (3, 16, 16)
NOISE = random_images(3, 16, count=32)
# Every block where the shape stays, where it changes, and beside others in one residual stream.
CHAINS = [(name,) * 5 for name in sorted(BLOCKS)] + [
    ("skip", "k5_e1_g2", "skip", "k3_e6", "k3_e1_g2"),
    ("k3_e1", "skip", "k5_e1_g2", "skip", "k5_e3"),
]


def network_of(blocks: tuple[str, ...], seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = build_network(SPACE, Architecture(blocks, SPACE.name), classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def channel_counts(network: nn.Module) -> list[int]:
    return [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]


def alive_mask(channels: int, generator: torch.Generator) -> Tensor:
    """Half of the channels, the same places in each quarter: what groups and shuffle allow."""
    quarter = channels // 4
    alive = torch.zeros(quarter, dtype=torch.bool)
    alive[torch.randperm(quarter, generator=generator)[: quarter // 2]] = True
    return alive.repeat(4)


def silence_(conv_bn: nn.Module, alive: Tensor) -> None:
    conv_bn[0].weight.data[~alive] = 0
    conv_bn[1].weight.data[~alive] = 0
    conv_bn[1].bias.data[~alive] = 0


def silence_half_(network: Network) -> None:
    """Make half of the channels of every conv dead; the shuffle itself says where they go."""
    generator = torch.Generator().manual_seed(2)
    streams = [alive_mask(stage.channels, generator) for stage in SPACE.stages]
    silence_(network.stem, streams[0])
    silence_(network.head, alive_mask(64, generator))
    for layer, block in zip(SPACE.layers, network.layers, strict=True):
        if isinstance(block, nn.Sequential):  # skip where the shape changes
            silence_(block, streams[layer.stage])
        if not hasattr(block, "expand"):
            continue
        alive = alive_mask(block.expand[0].out_channels, generator)
        silence_(block.expand, alive)
        silence_(block.depthwise, block.shuffle(alive.float().view(1, -1, 1, 1)).flatten().bool())
        silence_(block.project, streams[layer.stage])


@pytest.mark.parametrize(
    ("blocks", "importance"),
    [*((blocks, "bn_scale") for blocks in CHAINS)]
    + [(blocks, name) for blocks in CHAINS[9:] for name in ("taylor", "hessian")],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_dead_channels_leave_without_a_trace(blocks: tuple[str, ...], importance: str) -> None:
    network = network_of(blocks)
    silence_half_(network)
    before = channel_counts(network)
    with torch.no_grad():
        expected = network(images())
        method = ChannelPruning(ratio=0.5, importance=importance, round_to=4)
        compress_(network, method, input_shape=SHAPE, data=NOISE)
        found = network(images())
    assert expected.std() > 0
    assert channel_counts(network) == [channels // 2 for channels in before]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def silence_removed_(network: Network, changes: tuple[ChannelSet, ...]) -> None:
    """Silence in the whole network what the report says was removed from the pruned one."""
    for change in changes:
        alive = torch.ones(change.before, dtype=torch.bool)
        alive[list(change.removed)] = False
        if change.layer == "head.0":
            silence_(network.head, alive)
            continue
        part, number = change.layer.split(".")[:2]
        layer = SPACE.layers[0 if part == "stem" else int(number)]
        if "depthwise" in change.layer:
            block = network.layers[layer.index]
            silence_(block.depthwise, alive)
            places = torch.arange(change.before).float().view(1, -1, 1, 1)
            source = block.shuffle(places).flatten().long()
            silence_(block.expand, alive[source.argsort()])
            continue
        for other, block in zip(SPACE.layers, network.layers, strict=True):
            if other.stage == layer.stage and not isinstance(block, nn.Identity):
                silence_(block.project if hasattr(block, "project") else block, alive)
        if layer.stage == 0:
            silence_(network.stem, alive)


@pytest.mark.parametrize("blocks", CHAINS, ids=" ".join)
def test_pruning_equals_silencing_the_removed_channels(blocks: tuple[str, ...]) -> None:
    network = network_of(blocks)
    pruned = copy.deepcopy(network)
    method = ChannelPruning(ratio=0.4, importance="random", round_to=4)
    report = compress_(pruned, method, input_shape=SHAPE)
    silence_removed_(network, report.changes)
    assert report.after.params < report.before.params
    with torch.no_grad():
        expected = network(images())
        torch.testing.assert_close(pruned(images()), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0


@pytest.mark.parametrize("global_", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("importance", sorted(IMPORTANCES))
@pytest.mark.parametrize("blocks", CHAINS[:9:4] + CHAINS[9:], ids=" ".join)
def test_pruned_network_is_smaller_and_keeps_its_promises(
    blocks: tuple[str, ...], importance: str, global_: bool
) -> None:
    network = network_of(blocks)
    method = ChannelPruning(ratio=0.4, importance=importance, round_to=8, global_=global_)
    report = compress_(network, method, input_shape=SHAPE, data=NOISE)
    assert network(images(2)).shape == (2, 10)
    assert network.classifier.linear.out_features == 10
    assert network.stem[0].in_channels == 3
    assert report.after.params < report.before.params
    assert report.after.macs < report.before.macs
    assert report.after.count == count(network, SHAPE)
    assert all(channels % 8 == 0 for channels in channel_counts(network))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.in_channels % module.groups == module.out_channels % module.groups == 0


@pytest.mark.parametrize("blocks", CHAINS, ids=" ".join)
def test_pruned_network_survives_its_files(blocks: tuple[str, ...], tmp_path: Path) -> None:
    network = network_of(blocks)
    compress_(network, ChannelPruning(ratio=0.5), input_shape=SHAPE)
    card = NetworkCard(
        SPACE, Architecture(blocks, SPACE.name), tuple("abcdefghij"), (0.5,) * 3, (0.2,) * 3
    )
    save_network(tmp_path, network, card)
    loaded, loaded_card = load_network(tmp_path)
    assert loaded_card == card
    assert torch.equal(loaded(images()), network(images()))
    assert count(loaded, SHAPE) == count(network, SHAPE)


def test_modes_of_modules_are_left_alone() -> None:
    network = network_of(CHAINS[0]).train()
    network.head.eval()
    prune_(network, ChannelPruning(), Tools(SHAPE))
    assert network.stem.training
    assert not network.head[1].training


def test_pruned_network_trains() -> None:
    network = network_of(CHAINS[-1]).train()
    compress_(network, ChannelPruning(), input_shape=SHAPE)
    network(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())


def test_global_ranking_spares_the_wide_and_important() -> None:
    network = network_of(("k3_e6",) * 5)
    with torch.no_grad():
        network.layers[1].depthwise[1].weight.data[:48] *= 0.01
        network.layers[1].expand[0].weight.data[:48] *= 0.01
        network.layers[1].expand[1].weight.data[:48] *= 0.01
        network.layers[1].project[0].weight.data[:, :48] *= 0.01
    method = ChannelPruning(ratio=0.2, global_=True, max_ratio=0.6)
    report = compress_(network, method, input_shape=SHAPE)
    removed = {change.layer: change.removed for change in report.changes}
    assert set(range(40)) <= set(removed["layers.1.depthwise.0"])
    assert all(change.after >= 0.4 * change.before - 8 for change in report.changes)


def test_widths_that_cannot_be_reached_are_left() -> None:
    network = network_of(("k3_e1",) * 5)
    before = channel_counts(network)
    report = compress_(network, ChannelPruning(ratio=0.5, round_to=128), input_shape=SHAPE)
    assert channel_counts(network) == before
    assert all(change.removed == () for change in report.changes)
    report = compress_(network, ChannelPruning(ratio=0, round_to=8), input_shape=SHAPE)
    assert report.before == report.after


def test_random_importance_follows_its_seed() -> None:
    def removed(seed: int) -> list[tuple[int, ...]]:
        method = ChannelPruning(importance="random", seed=seed)
        report = compress_(network_of(CHAINS[0]), method, input_shape=SHAPE)
        return [change.removed for change in report.changes]

    assert removed(0) == removed(0)
    assert removed(0) != removed(1)


def test_fine_tuning_brings_the_accuracy_back(trained: Trained) -> None:
    network = copy.deepcopy(trained.network)
    report = compress_(
        network,
        ChannelPruning(ratio=0.25),
        input_shape=trained.card.input_shape,
        train=lambda pruned: fit(pruned, trained.data, epochs=3, rate=0.02),
    )
    assert report.after.macs < 0.8 * report.before.macs
    assert accuracy(network, trained.data) > accuracy(trained.network, trained.data) - 0.03


def test_the_type_of_the_method_chooses_and_unknown_ones_are_refused() -> None:
    assert isinstance(
        compress_(network_of(CHAINS[0]), ChannelPruning(), input_shape=SHAPE), CompressionReport
    )
    with pytest.raises(
        InputError, match=r"Unknown compression method dict\. Known: ChannelPruning"
    ):
        compress_(network_of(CHAINS[0]), {"ratio": 0.5}, input_shape=SHAPE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 1.0}, r"ratio is 1\.0; expected a fraction"),
        ({"max_ratio": -0.1}, r"max_ratio is -0\.1; expected a fraction"),
        ({"round_to": 0}, "round_to is 0; expected a whole number"),
        ({"images": 0}, "images is 0; expected a whole number"),
        ({"importance": "magnitud"}, "Did you mean 'magnitude'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ChannelPruning(**settings)


def test_bn_scale_leaves_what_has_none_and_refuses_a_network_without_any() -> None:
    def conv(ends: tuple[int, int], *after: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(*ends, 3, padding=1), *after, nn.ReLU()]

    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    mixed = nn.Sequential(*conv((3, 16), nn.BatchNorm2d(16)), *conv((16, 16)), *tail)
    method = ChannelPruning(ratio=0.5, importance="bn_scale")
    compress_(mixed, method, input_shape=(3, 8, 8))
    assert [m.out_channels for m in mixed if isinstance(m, nn.Conv2d)] == [8, 16]
    plain = nn.Sequential(*conv((3, 16)), *conv((16, 16)), *tail)
    with pytest.raises(InputError, match="no batch normalisation .* expected importance=magn"):
        compress_(plain, method, input_shape=(3, 8, 8))
