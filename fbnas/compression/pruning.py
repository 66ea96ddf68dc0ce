"""Structured pruning: whole channels leave the network, which stays an ordinary, smaller network.

Which layers share a channel is traced by Torch-Pruning's dependency graph (Fang et al. 2023,
arXiv 2301.12900). It takes a channel shuffle for the identity, so the permutation is added to its
graph here, and channels that grouped convolutions and shuffles tie together are ranked and removed
as one.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fbnas.compression.method import Applied, Method, Tools
from fbnas.errors import InputError, unknown
from fbnas.space.blocks import ChannelShuffle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelPruning(Method):
    """Remove the least important channels.

    Args:
        ratio: the fraction of channels to remove, 0 <= ratio < 1: of each set of coupled layers,
            or with `global_` of the whole network.
        importance: magnitude (L2 norm of all weights of a channel), l1 (L1 norm), bn_scale (batch
            normalisation's weights; Liu et al. 2017, arXiv 1708.06519) or random (a baseline).
        round_to: kept channels are the nearest multiple of it (the larger one when in doubt), which
            vector units profit from. A set of layers narrower than that is left alone.
        global_: rank the channels of the whole network against each other.
        max_ratio: with `global_`, no set of layers loses more than this fraction.
        seed: of the random importance.
    """

    NAME: ClassVar[str] = "channel_pruning"
    SECTION: ClassVar[str] = "pruning"

    ratio: float = 0.25
    importance: str = "magnitude"
    round_to: int = 8
    global_: bool = False
    max_ratio: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("ratio", self.ratio), ("max_ratio", self.max_ratio)):
            if not 0 <= value < 1:
                raise InputError(f"{name} is {value}; expected a fraction, 0 <= {name} < 1.")
        if self.round_to < 1:
            raise InputError(f"round_to is {self.round_to}; expected a whole number of at least 1.")
        if self.importance not in IMPORTANCES:
            raise unknown("importance", self.importance, IMPORTANCES)

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Remove the channels, then fine-tune."""
        changes = prune_(model, self, input_shape=tools.input_shape)
        return Applied(changes, tools.tune(model))


@dataclass(frozen=True)
class ChannelSet:
    """Layers that share their channels, and what is to become of these.

    `removed` are channels of `layer`, the one that names the set.
    """

    layer: str
    before: int
    removed: tuple[int, ...]

    @property
    def after(self) -> int:
        """Channels that stay."""
        return self.before - len(self.removed)


@dataclass(frozen=True)
class _Ranked:
    """A set of coupled layers with its units: channels that may only leave together."""

    root: nn.Module
    name: str
    channels: int
    units: tuple[tuple[int, ...], ...]
    importance: Tensor  # (units,), mean 1 over the set

    @property
    def unit_size(self) -> int:
        return len(self.units[0])


def prune_(
    model: nn.Module, method: ChannelPruning, *, input_shape: tuple[int, int, int]
) -> tuple[ChannelSet, ...]:
    """Prune in place; returns what was done to each set of coupled layers.

    The network's input and output keep their widths. BN statistics are those of before: fine-tune,
    or re-estimate them, before judging the network.

    Args:
        input_shape: (c, h, w) of one image.
    """
    modes = {module: module.training for module in model.modules()}
    graph = _dependency_graph(model, input_shape)
    ranked = list(_ranked_sets(graph, method))
    sets = plan(ranked, method)
    for found, planned in zip(ranked, sets, strict=True):
        if planned.removed:
            prune_out = graph.get_pruner_of_module(found.root).prune_out_channels
            graph.get_pruning_group(found.root, prune_out, list(planned.removed)).prune()
            logger.info("%s: %d -> %d channels", planned.layer, planned.before, planned.after)
    for module, training in modes.items():
        module.training = training
    return sets


def plan(ranked: Sequence[_Ranked], method: ChannelPruning) -> tuple[ChannelSet, ...]:
    """Choose the channels to remove, without touching the network."""
    threshold = _global_threshold(ranked, method.ratio) if method.global_ else None
    sets = []
    for found in ranked:
        if threshold is None:
            wanted = found.channels * (1 - method.ratio)
        else:
            wanted = float((found.importance >= threshold).sum()) * found.unit_size
            wanted = max(wanted, found.channels * (1 - method.max_ratio))
        kept = _nearest_width(found, wanted, method.round_to) if method.ratio else found.channels
        order = found.importance.argsort(stable=True)[: (found.channels - kept) // found.unit_size]
        removed = sorted(channel for unit in order.tolist() for channel in found.units[unit])
        sets.append(ChannelSet(found.name, found.channels, tuple(removed)))
    return tuple(sets)


def _global_threshold(ranked: Sequence[_Ranked], ratio: float) -> float:
    """Return the importance under which `ratio` of all channels lie."""
    if not ranked:
        return 0.0
    channels = torch.cat([r.importance.repeat_interleave(r.unit_size) for r in ranked])
    return float(channels.quantile(ratio))


def _nearest_width(found: _Ranked, wanted: float, round_to: int) -> int:
    widths = [
        width
        for width in range(found.channels % found.unit_size, found.channels + 1, found.unit_size)
        if width > 0 and width % round_to == 0
    ]
    return min(widths, key=lambda width: (abs(width - wanted), -width), default=found.channels)


def _ranked_sets(graph: Any, method: ChannelPruning) -> Iterator[_Ranked]:
    score = IMPORTANCES[method.importance](method.seed)
    names = {module: name for name, module in graph.model.named_modules()}
    for group in graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)):
        if _reaches_output(graph, group):
            continue
        channels = len(group[0].idxs)
        units = _units(graph, group)
        if len({len(unit) for unit in units}) != 1:
            continue  # no number of units keeps every group of channels equally wide
        importance = score(group).detach().cpu()
        by_unit = torch.stack([importance[list(unit)].mean() for unit in units])
        root = group[0].dep.target.module
        yield _Ranked(root, names[root], channels, units, by_unit / by_unit.mean())


def _reaches_output(graph: Any, group: Any) -> bool:
    return any(
        graph.is_out_channel_pruning_fn(item.dep.handler) and not item.dep.target.outputs
        for item in group
    )


def _units(graph: Any, group: Any) -> tuple[tuple[int, ...], ...]:
    """Partition a set's channels into those that may only leave together.

    Channels at the same place in each group of a grouped convolution are tied, so that the groups
    stay equally wide; channels that a shuffle interleaves are tied, so that the smaller shuffle
    brings each kept channel to where the kept weights expect it.
    """
    parent = list(range(len(group[0].idxs)))

    def find(channel: int) -> int:
        while parent[channel] != channel:
            channel = parent[channel]
        return channel

    for item in group:
        module = item.dep.target.module
        if isinstance(module, ChannelShuffle):
            places = [index // module.groups for index in item.idxs]
        elif isinstance(module, nn.Conv2d) and module.groups not in (1, module.out_channels):
            outgoing = graph.is_out_channel_pruning_fn(item.dep.handler)
            width = (module.out_channels if outgoing else module.in_channels) // module.groups
            places = [index % width for index in item.idxs]
        else:
            continue
        first: dict[int, int] = {}
        for place, channel in zip(places, item.root_idxs, strict=True):
            parent[find(channel)] = find(first.setdefault(place, channel))
    units: dict[int, list[int]] = {}
    for channel in range(len(parent)):
        units.setdefault(find(channel), []).append(channel)
    return tuple(tuple(unit) for unit in units.values())


def _dependency_graph(model: nn.Module, input_shape: tuple[int, int, int]) -> Any:
    """Trace which layers share channels, with the permutation of every channel shuffle."""
    import torch_pruning

    class ShufflePruner(torch_pruning.BasePruningFunc):
        """A shuffle has nothing to prune: it reads its width from its input."""

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> None:
            return None

        get_in_channels = get_out_channels

    device = next(model.parameters()).device
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(
            model,
            torch.zeros(1, *input_shape, device=device),
            customized_pruners={ChannelShuffle: ShufflePruner()},
            verbose=False,
        )
    widths = _shuffle_widths(model, input_shape)
    for module, node in graph.module2node.items():
        if isinstance(module, ChannelShuffle):
            _map_shuffle_(node, module.groups, widths[module])
    return graph


def _shuffle_widths(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[nn.Module, int]:
    widths: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        widths[module] = output.shape[1]

    shuffles = [m for m in model.modules() if isinstance(m, ChannelShuffle)]
    hooks = [module.register_forward_hook(note) for module in shuffles]
    with torch.no_grad():
        model(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return widths


def _map_shuffle_(node: Any, groups: int, channels: int) -> None:
    """Put the shuffle between a node and its inputs: c of group g comes to c * groups + g."""
    source = torch.arange(channels).view(groups, -1).t().flatten()  # (output place) -> input place
    into = _Permutation(source.argsort().tolist())
    back = _Permutation(source.tolist())
    for before in node.inputs:
        for dependency in before.dependencies:
            if dependency.target is node:
                dependency.index_mapping[0] = into
        for dependency in node.dependencies:
            if dependency.target is before:
                dependency.index_mapping[0] = back


@dataclass(frozen=True)
class _Permutation:
    places: list[int]

    def __call__(self, indices: list[Any]) -> list[Any]:
        return [index._replace(idx=self.places[index.idx]) for index in indices]


def _magnitude(_: int) -> Callable[[Any], Tensor]:
    from torch_pruning.pruner.importance import GroupMagnitudeImportance

    return GroupMagnitudeImportance(p=2)


def _l1(_: int) -> Callable[[Any], Tensor]:
    from torch_pruning.pruner.importance import GroupMagnitudeImportance

    return GroupMagnitudeImportance(p=1)


def _bn_scale(_: int) -> Callable[[Any], Tensor]:
    from torch_pruning.pruner.importance import BNScaleImportance

    return BNScaleImportance()


def _random(seed: int) -> Callable[[Any], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda group: torch.rand(len(group[0].idxs), generator=generator)


IMPORTANCES: dict[str, Callable[[int], Callable[[Any], Tensor]]] = {
    "magnitude": _magnitude,
    "l1": _l1,
    "bn_scale": _bn_scale,
    "random": _random,
}
