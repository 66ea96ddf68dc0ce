"""Structured pruning: whole channels leave the network, which stays an ordinary, smaller network.

Which layers share a channel is traced by Torch-Pruning's dependency graph (Fang et al. 2023,
arXiv 2301.12900). It takes a channel shuffle for the identity, so the permutation is added to its
graph here, and channels that grouped convolutions and shuffles tie together are ranked and removed
as one.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fbnas.compression.method import Applied, Method, Tools
from fbnas.compression.saliency import channel_sums, hessian, is_depthwise, taylor
from fbnas.errors import InputError, unknown
from fbnas.modes import modes_kept
from fbnas.space.blocks import ChannelShuffle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChannelPruning(Method):
    """Remove the least important channels.

    Args:
        ratio: the fraction of channels to remove, 0 <= ratio < 1: of each set of coupled layers,
            or with `global_` of the whole network.
        importance: magnitude (L2 norm of all weights of a channel), l1 (L1 norm), bn_scale (batch
            normalisation's weights; Liu et al. 2017, arXiv 1708.06519), taylor (what the squared
            loss changes by without them, to first order; Molchanov et al. 2019, arXiv 1906.10771),
            hessian (what the loss rises by, to second order: Optimal Brain Damage, LeCun et al.
            1990) or random (a baseline).
        round_to: kept channels are the nearest multiple of it (the larger one when in doubt), which
            vector units profit from. A set of layers narrower than that is left alone.
        global_: rank the channels of the whole network against each other.
        max_ratio: with `global_`, no set of layers loses more than this fraction.
        seed: of the random importance.
        images: training images that taylor and hessian look at, drawn by the seed of all.
    """

    NAME: ClassVar[str] = "channel_pruning"
    SECTION: ClassVar[str] = "pruning"

    ratio: float = 0.25
    importance: str = "magnitude"
    round_to: int = 8
    global_: bool = False
    max_ratio: float = 0.75
    seed: int = 0
    images: int = 256

    def __post_init__(self) -> None:
        for name, value in (("ratio", self.ratio), ("max_ratio", self.max_ratio)):
            if not 0 <= value < 1:
                raise InputError(f"{name} is {value}; expected a fraction, 0 <= {name} < 1.")
        for name, number in (("round_to", self.round_to), ("images", self.images)):
            if number < 1:
                raise InputError(f"{name} is {number}; expected a whole number of at least 1.")
        if self.importance not in IMPORTANCES:
            raise unknown("importance", self.importance, IMPORTANCES)

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Remove the channels, then fine-tune."""
        changes = prune_(model, self, tools)
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
class Member:
    """A layer of a set: how many of its output and input channels a channel of the set is."""

    name: str
    outputs: int = 0
    inputs: int = 0


@dataclass(frozen=True)
class Ranked:
    """A set of coupled layers with its units: channels that may only leave together."""

    name: str  # of its first layer
    channels: int
    units: tuple[tuple[int, ...], ...]
    importance: Tensor  # (units,), of a channel of each: mean 1 over the set, or in units of loss
    members: tuple[Member, ...] = field(default=(), repr=False)

    @property
    def unit_size(self) -> int:
        return len(self.units[0])

    def least(self, count: int) -> tuple[int, ...]:
        """Return the `count` least important channels, or as many as whole units allow."""
        order = self.importance.argsort(stable=True)[: count // self.unit_size]
        return tuple(sorted(channel for unit in order.tolist() for channel in self.units[unit]))


def prune_(
    model: nn.Module,
    method: ChannelPruning,
    tools: Tools,
    *,
    full: Mapping[str, int] | None = None,
) -> tuple[ChannelSet, ...]:
    """Prune in place; returns what was done to each set of coupled layers.

    The network's input and output keep their widths. BN statistics are those of before: fine-tune,
    or re-estimate them, before judging the network.

    Args:
        full: channels by name of the set that the ratios are fractions of; those that are there
            where it says nothing.

    Raises:
        InputError: taylor and hessian, and there are no images.
    """
    with modes_kept(model):
        graph, ranked = rank(model, method, tools)
        sets = plan(ranked, method, full=full)
        remove_(graph, sets)
    return sets


def rank(model: nn.Module, method: ChannelPruning, tools: Tools) -> tuple[Any, tuple[Ranked, ...]]:
    """Return the dependency graph and the sets of coupled layers, their channels judged.

    Raises:
        InputError: taylor and hessian, and there are no images.
    """
    with modes_kept(model):
        graph = _dependency_graph(model, tools.input_shape)
        return graph, tuple(_ranked_sets(graph, method, tools))


def remove_(graph: Any, sets: Sequence[ChannelSet]) -> None:
    """Remove the planned channels from the network of the graph."""
    for planned in sets:
        if planned.removed:
            root = graph.model.get_submodule(planned.layer)
            prune_out = graph.get_pruner_of_module(root).prune_out_channels
            graph.get_pruning_group(root, prune_out, list(planned.removed)).prune()
            logger.info("%s: %d -> %d channels", planned.layer, planned.before, planned.after)


def plan(
    ranked: Sequence[Ranked], method: ChannelPruning, *, full: Mapping[str, int] | None = None
) -> tuple[ChannelSet, ...]:
    """Choose the channels to remove, without touching the network; `full` as in `prune_`."""
    widths = [(full or {}).get(found.name, found.channels) for found in ranked]
    threshold = _global_threshold(ranked, method.ratio, widths) if method.global_ else None
    sets = []
    for found, width in zip(ranked, widths, strict=True):
        if threshold is None:
            wanted = width * (1 - method.ratio)
        else:
            wanted = float((found.importance >= threshold).sum()) * found.unit_size
            wanted = max(wanted, width * (1 - method.max_ratio))
        kept = _nearest_width(found, wanted, method.round_to) if method.ratio else found.channels
        removed = found.least(found.channels - kept)
        sets.append(ChannelSet(found.name, found.channels, removed))
    return tuple(sets)


def without(model: nn.Module, sets: Sequence[ChannelSet], tools: Tools) -> nn.Module:
    """Return a copy of a network without the planned channels."""
    smaller = deepcopy(model)
    with modes_kept(smaller):
        remove_(_dependency_graph(smaller, tools.input_shape), sets)
    return smaller


def become_(model: nn.Module, other: nn.Module) -> None:
    """Make every module of a network what it is in a changed copy, sharing the copy's tensors."""
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        inside = vars(mine)["_modules"]
        vars(mine).update(vars(theirs))
        vars(mine)["_modules"] = inside


def _global_threshold(ranked: Sequence[Ranked], ratio: float, widths: Sequence[int]) -> float:
    """Return the importance under which those channels lie that leave `ratio` of `widths`."""
    if not ranked:
        return 0.0
    channels = torch.cat([r.importance.repeat_interleave(r.unit_size) for r in ranked])
    gone = 1 - len(channels) / sum(widths)
    return float(channels.quantile(max(ratio - gone, 0.0) / (1 - gone)))


def widths_of(found: Ranked, multiple: int) -> list[int]:
    """Return the widths, multiples of a number, that whole units leave of a set, narrowest first.

    The set's own width is one of them only where it is such a multiple.
    """
    size = found.unit_size
    return [
        width
        for width in range(found.channels % size, found.channels + 1, size)
        if width > 0 and width % multiple == 0
    ]


def _nearest_width(found: Ranked, wanted: float, round_to: int) -> int:
    widths = widths_of(found, round_to)
    return min(widths, key=lambda width: (abs(width - wanted), -width), default=found.channels)


def _ranked_sets(graph: Any, method: ChannelPruning, tools: Tools) -> Iterator[Ranked]:
    score = IMPORTANCES[method.importance](graph, method, tools)
    names = {module: name for name, module in graph.model.named_modules()}
    for group in graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)):
        if _reaches_output(graph, group):
            continue
        channels = len(group[0].idxs)
        units = _units(graph, group)
        if len({len(unit) for unit in units}) != 1:
            continue  # no number of units keeps every group of channels equally wide
        scored = score(group)
        if scored is None:
            continue  # bn_scale, where a set has no batch normalisation
        importance = scored.detach().cpu()
        by_unit = torch.stack([importance[list(unit)].mean() for unit in units])
        if method.importance not in IN_UNITS_OF_LOSS and by_unit.mean() > 0:
            by_unit = by_unit / by_unit.mean()
        root = group[0].dep.target.module
        yield Ranked(names[root], channels, units, by_unit, _members(graph, group, names))


def _members(graph: Any, group: Any, names: Mapping[nn.Module, str]) -> tuple[Member, ...]:
    """Return the convolutions and linear layers of a set, each once."""
    channels = len(group[0].idxs)
    outputs: dict[nn.Module, int] = {}
    inputs: dict[nn.Module, int] = {}
    for item in group:
        module = item.dep.target.module
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        outgoing = graph.is_out_channel_pruning_fn(item.dep.handler)
        if outgoing or is_depthwise(module):
            outputs[module] = len(item.idxs) // channels
        if not outgoing or is_depthwise(module):
            inputs[module] = len(item.idxs) // channels
    return tuple(
        Member(names[module], outputs.get(module, 0), inputs.get(module, 0))
        for module in dict.fromkeys([*outputs, *inputs])
    )


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


Score = Callable[[Any], Tensor | None]  # from a group to a number per channel; None: it has none


def _magnitude(graph: Any, method: ChannelPruning, tools: Tools) -> Score:
    from torch_pruning.pruner.importance import GroupMagnitudeImportance

    return GroupMagnitudeImportance(p=2)


def _l1(graph: Any, method: ChannelPruning, tools: Tools) -> Score:
    from torch_pruning.pruner.importance import GroupMagnitudeImportance

    return GroupMagnitudeImportance(p=1)


def _bn_scale(graph: Any, method: ChannelPruning, tools: Tools) -> Score:
    from torch_pruning.pruner.importance import BNScaleImportance

    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in graph.model.modules()):
        raise InputError(
            "importance is bn_scale, and the network has no batch normalisation (qat and "
            "fixed_point fold it); expected importance=magnitude, l1, taylor or hessian."
        )
    return BNScaleImportance()


def _random(graph: Any, method: ChannelPruning, tools: Tools) -> Score:
    generator = torch.Generator().manual_seed(method.seed)
    return lambda group: torch.rand(len(group[0].idxs), generator=generator)


def _taylor(graph: Any, method: ChannelPruning, tools: Tools) -> Score:
    found = taylor(graph.model, tools, images=method.images, seed=tools.seed)

    def score(group: Any) -> Tensor:
        return torch.stack([channel_sums(graph, group, x).square() for x in found]).mean(0).float()

    return score


def _hessian(graph: Any, method: ChannelPruning, tools: Tools) -> Score:
    found = hessian(graph.model, tools, images=method.images, seed=tools.seed)
    return lambda group: channel_sums(graph, group, found).float()


IMPORTANCES: dict[str, Callable[[Any, ChannelPruning, Tools], Score]] = {
    "magnitude": _magnitude,
    "l1": _l1,
    "bn_scale": _bn_scale,
    "taylor": _taylor,
    "hessian": _hessian,
    "random": _random,
}
IN_UNITS_OF_LOSS = ("taylor", "hessian")  # so that sets can be compared as they are
