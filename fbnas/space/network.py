"""From a space and an architecture to a network, its counts, and its files."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.files import atomic_write, read_yaml, write_yaml
from fbnas.modes import modes_kept
from fbnas.space.architecture import Architecture
from fbnas.space.blocks import ConvBN, InvertedResidual, WaveletSplit, build_block
from fbnas.space.search_space import SearchSpace
from fbnas.space.structure import restructure_


class Network(nn.Module):
    """Stem, one block per layer, head, classifier: (n, c, R, R) images to (n, classes) scores.

    `input_shape`: (c, R, R) of one image.
    """

    def __init__(
        self,
        stem: nn.Module,
        layers: list[nn.Module],
        head: nn.Module,
        classifier: nn.Module,
        *,
        input_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.stem = stem
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for layer in self.layers:
            features = layer(features)
        return self.classifier(self.head(features))


def build_stem(space: SearchSpace) -> nn.Module:
    """3x3 conv, BN, ReLU: (n, input_channels, R, R) to (n, stem.channels, R / s, R / s)."""
    stem, channels = space.stem, space.input_channels
    if not stem.wavelet:
        return ConvBN(channels, stem.channels, kernel=3, stride=stem.stride)
    convolution = ConvBN(4 * channels, stem.channels, kernel=3, stride=stem.stride // 2)
    return nn.Sequential(OrderedDict(split=WaveletSplit(channels), convolution=convolution))


def build_head(space: SearchSpace) -> nn.Module:
    """1x1 conv, BN, ReLU: the last layer's channels to `space.head`."""
    return ConvBN(space.final_channels, space.head)


def build_classifier(space: SearchSpace, classes: int) -> nn.Module:
    """Average pool over the whole map, fully connected: (n, head, s, s) to (n, classes)."""
    return nn.Sequential(
        OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(space.head, classes),
        )
    )


def build_network(
    space: SearchSpace,
    architecture: Architecture,
    classes: int = 1000,
    *,
    classifier: Callable[[SearchSpace, int], nn.Module] = build_classifier,
) -> Network:
    """Build the network of an architecture, freshly initialised.

    Args:
        classifier: makes the last layers, for tasks other than classification.

    An architecture that states its own `head` (the published ones do) or `resolution` overrides the
    space's.

    Raises:
        InputError: the architecture does not fit the space.
    """
    architecture.path(space)
    space = with_head_of(space.at(architecture.resolution), architecture)
    layers = [
        build_block(name, layer.in_channels, layer.out_channels, layer.stride)
        for name, layer in zip(architecture.blocks, space.layers, strict=True)
    ]
    network = Network(
        build_stem(space),
        layers,
        build_head(space),
        classifier(space, classes),
        input_shape=(space.input_channels, space.resolution, space.resolution),
    )
    return initialise_(network)


def with_head_of(space: SearchSpace, architecture: Architecture) -> SearchSpace:
    """Return the space with the head width that the architecture states, if it states one."""
    if architecture.head is None or architecture.head == space.head:
        return space
    return replace(space, head=architecture.head)


def initialise_(module: nn.Module) -> Any:
    """Initialise in place: He normal (fan out) for convolutions, N(0, 0.01) for linear layers.

    std = sqrt(2 / (K * K * C_out / groups)): torch's own initialiser leaves the groups out, and so
    begins depthwise weights so small that a step of SGD throws them far. The last normalisation of
    a residual block begins at zero, so that every block begins as the identity: a supernet on
    sampled paths, whose layers otherwise see other features each step, then learns several times
    as fast (digits, 24 epochs, one seed: 57 % instead of 18 % of the training images).
    Sources: He et al. 2015 (arXiv 1502.01852); Goyal et al. 2017 (arXiv 1706.02677), section 5.1.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = math.prod(part.kernel_size) * part.out_channels // part.groups
            nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.01)
            nn.init.zeros_(part.bias)
        elif isinstance(part, InvertedResidual) and part.residual:
            norm = part.project[1]
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.zeros_(norm.weight)
    return module


@dataclass(frozen=True)
class Count:
    """Parameters and multiply-adds of convolutions and linear layers; no batch normalisation."""

    params: int
    macs: int


def count(network: nn.Module, input_shape: tuple[int, int, int]) -> Count:
    """Count parameters and multiply-adds for one image of `input_shape` (c, h, w).

    The rule that reproduces the published FBNets: weights and biases of convolutions and of the
    fully connected layer; multiply-adds of the same; nothing else.
    """
    params = macs = 0

    def add(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal params, macs
        assert isinstance(module, nn.Conv2d | nn.Linear)
        bias = 0 if module.bias is None else module.bias.numel()
        params += module.weight.numel() + bias
        positions = output.shape[2] * output.shape[3] if isinstance(module, nn.Conv2d) else 1
        macs += module.weight.numel() * positions

    counted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(add) for module in counted]
    device = next(network.parameters()).device
    try:
        with torch.no_grad(), modes_kept(network):
            network.eval()(torch.zeros(1, *input_shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return Count(params, macs)


def block_params(space: SearchSpace, classes: int = 1000) -> tuple[Tensor, int]:
    """Return the parameters of every block: those of a network are base + their sum over layers.

    They are counted by the rule of `count`, with the space's own head.

    Returns:
        (layers, blocks) float64, nan where a block is not offered; base: stem, head and classifier.
    """
    found: dict[tuple[str, int, int, int], int] = {}
    params = torch.full((len(space.layers), len(space.blocks)), torch.nan).double()
    with torch.device("meta"):
        base = _params(build_stem(space), space.input_channels, space.resolution)
        base += _params(build_head(space), space.final_channels, space.final_size)
        base += _params(build_classifier(space, classes), space.head, space.final_size)
        for layer in space.layers:
            for name in layer.blocks:
                ends = (name, layer.in_channels, layer.out_channels, layer.stride)
                if ends not in found:
                    found[ends] = _params(build_block(*ends), layer.in_channels, layer.height)
                params[layer.index, space.blocks.index(name)] = found[ends]
    return params, base


def _params(module: nn.Module, channels: int, side: int) -> int:
    has_any = next(module.parameters(), None) is not None
    return count(module, (channels, side, side)).params if has_any else 0


@dataclass(frozen=True)
class NetworkCard:
    """What a network's files say about it: how it is built, what it was shown, what it answers.

    `mean` and `std` are per channel, for images scaled to [0, 1]. `heads`: of several the names of
    each one's classes, in the order of the scores; `class_names` are then those of all.
    """

    space: SearchSpace
    architecture: Architecture
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return (self.space.input_channels, self.space.resolution, self.space.resolution)


def save_network(folder: str | Path, network: nn.Module, card: NetworkCard) -> None:
    """Write `network.yaml` and `weights.safetensors` into `folder`."""
    folder = Path(folder)
    save_weights(network, folder / "weights.safetensors")
    heads = {name: list(names) for name, names in card.heads.items()}
    write_yaml(
        folder / "network.yaml",
        {
            "space": card.space.to_dict(),
            "blocks": list(card.architecture.blocks),
            "head": card.architecture.head,
            "provenance": card.architecture.provenance,
            **({"heads": heads} if heads else {"class_names": list(card.class_names)}),
            "preprocessing": {"mean": list(card.mean), "std": list(card.std)},
        },
    )


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the weights alone, which `load_weights_` reads."""
    from safetensors.torch import save

    tensors = {
        key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()
    }
    atomic_write(path, save(tensors))


def load_network(
    folder: str | Path, tensors: dict[str, Tensor] | None = None
) -> tuple[Network, NetworkCard]:
    """Read a network back, in eval mode; a compressed one as its stored weights are.

    Args:
        tensors: its weights, where they are not those of `weights.safetensors`.

    Raises:
        InputError: no network there, or files that do not belong together.
    """
    folder = Path(folder)
    content = read_yaml(folder / "network.yaml")
    try:
        space = SearchSpace.from_dict(content["space"])
        architecture = Architecture(
            tuple(content["blocks"]),
            space.name,
            content.get("provenance") or {},
            content.get("head"),
        )
        heads = {
            str(head): tuple(map(str, names))
            for head, names in (content.get("heads") or {}).items()
        }
        names = tuple(chain(*heads.values())) or tuple(map(str, content["class_names"]))
        mean, std = (tuple(content["preprocessing"][key]) for key in ("mean", "std"))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'network.yaml'}: {error} is missing or of the wrong kind; expected a file "
            "written by fbnas train or compress."
        ) from error
    network = build_network(space, architecture, classes=len(names))
    if tensors is None:
        load_weights_(network, folder / "weights.safetensors")
    else:
        load_tensors_(network, tensors, str(folder))
    return network.eval(), NetworkCard(space, architecture, names, mean, std, heads)


def load_weights_(network: nn.Module, path: Path) -> None:
    """Load a safetensors file in place, giving the modules the structure and widths that it holds.

    Raises:
        InputError: no such file, damaged, or of another network.
    """
    load_tensors_(network, read_weights(path), str(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read what `save_weights` wrote.

    Raises:
        InputError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a network's weights.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path}: the weights are damaged ({error}); expected a safetensors file. Write it "
            "again with the command that made it."
        ) from error


def load_tensors_(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load tensors in place by their names, resizing the modules to the widths that they have.

    Args:
        source: where they come from, for errors.

    Raises:
        InputError: they are of another network.
    """
    restructure_(network, tensors)
    _fold_as_stored_(network, tensors)
    for name, module in network.named_modules():
        _resize_(module, {k: tensors.get(f"{name}.{k}") for k in ("weight", "bias")})
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{source}: the weights belong to another network: {reason}") from error


def _fold_as_stored_(network: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Take away the batch normalisations that a file has not, where its layers have biases for it.

    Their place is taken by an identity, as `fold_bn_` of compression leaves it.
    """
    modules = dict(network.named_modules())
    gone = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        and f"{name}.running_mean" not in stored
    ]
    biased = [
        module
        for name, module in modules.items()
        if getattr(module, "bias", module) is None and f"{name}.bias" in stored
    ]
    if len(gone) == len(biased):  # or it is a file of another network, which is refused
        for name in gone:
            network.set_submodule(name, nn.Identity())
        for module in biased:
            module.bias = nn.Parameter(torch.empty(len(module.weight)))


def _resize_(module: nn.Module, stored: dict[str, Tensor | None]) -> None:
    weight = stored["weight"]
    parameter = getattr(module, "weight", None)
    if weight is None or parameter is None or weight.shape == parameter.shape:
        return
    if weight.ndim != parameter.ndim:  # of another kind of layer: load_state_dict says so
        return
    if isinstance(module, nn.Conv2d):
        if module.groups == module.in_channels and module.groups > 1:  # depthwise
            module.groups = weight.shape[0]
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = weight.shape[0]
        module.running_mean = torch.zeros(weight.shape[0])
        module.running_var = torch.ones(weight.shape[0])
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    module.weight = nn.Parameter(torch.empty_like(weight))
    if stored["bias"] is not None:
        module.bias = nn.Parameter(torch.empty_like(stored["bias"]))
