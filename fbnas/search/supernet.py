"""Supernet: every block of every layer, with shared weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fbnas.space.architecture import Architecture
from fbnas.space.blocks import build_block
from fbnas.space.network import (
    Network,
    build_classifier,
    build_head,
    build_network,
    build_stem,
    initialise_,
)
from fbnas.space.search_space import Layer, SearchSpace

Path = tuple[int, ...]  # one block index per layer


class MixedBlock(nn.Module):
    """All blocks that one layer offers.

    x_{l+1} = sum_i m_{l,i} b_{l,i}(x_l)   (Wu et al. 2019, equation 4)
    """

    def __init__(self, layer: Layer, names: Sequence[str]) -> None:
        super().__init__()
        self.index = {names.index(name): name for name in layer.blocks}
        self.branches = nn.ModuleDict(
            {
                name: build_block(name, layer.in_channels, layer.out_channels, layer.stride)
                for name in layer.blocks
            }
        )

    def branch(self, choice: int) -> nn.Module:
        """Return the block with index `choice` in the space's list of blocks."""
        return self.branches[self.index[choice]]

    def forward(self, features: Tensor, gate: Tensor | int) -> Tensor:
        """`gate`: a block index, or one weight per block of the space, (blocks,)."""
        if isinstance(gate, int):
            return self.branch(gate)(features)
        choices = list(self.index)
        if not gate.requires_grad:  # a zero gate then carries neither value nor gradient
            weights = gate.tolist()
            choices = [i for i in choices if weights[i] != 0.0] or choices[:1]
        mixed = gate[choices[0]] * self.branch(choices[0])(features)
        for i in choices[1:]:
            mixed = mixed + gate[i] * self.branch(i)(features)
        return mixed


class Supernet(nn.Module):
    """Stem, mixed blocks, head, classifier.

    Args:
        space: what each layer may choose.
        classes: number of scores.
    """

    def __init__(self, space: SearchSpace, classes: int = 1000) -> None:
        super().__init__()
        self.space = space
        self.classes = classes
        self.stem = build_stem(space)
        self.layers = nn.ModuleList(MixedBlock(layer, space.blocks) for layer in space.layers)
        self.head = build_head(space)
        self.classifier = build_classifier(space, classes)
        initialise_(self)

    def forward(self, images: Tensor, gates: Tensor | Sequence[int]) -> Tensor:
        """Compute the scores, (n, classes).

        Args:
            images: (n, input_channels, R, R).
            gates: (layers, blocks) weights, all branches computed and mixed; or a path, one block
                index per layer, only those computed.

        Raises:
            ValueError: gates of another shape.
        """
        if len(gates) != len(self.layers) or (
            isinstance(gates, Tensor) and gates.shape[1:] != (len(self.space.blocks),)
        ):
            shape = tuple(gates.shape) if isinstance(gates, Tensor) else f"{len(gates)} indices"
            raise ValueError(
                f"gates are {shape}; expected ({len(self.layers)}, {len(self.space.blocks)}) or a "
                f"path of {len(self.layers)} block indices."
            )
        features = self.stem(images)
        for layer, gate in zip(self.layers, gates, strict=True):
            features = layer(features, gate)
        return self.classifier(self.head(features))

    def network(self, architecture: Architecture) -> Network:
        """Return the architecture's network with a copy of the shared weights."""
        path = architecture.path(self.space)
        network = build_network(
            self.space, Architecture(architecture.blocks, self.space.name), self.classes
        )
        parts = [(network.stem, self.stem), (network.head, self.head)]
        parts += [(network.classifier, self.classifier)]
        for block, mixed, choice in zip(network.layers, self.layers, path, strict=True):
            assert isinstance(mixed, MixedBlock)
            parts.append((block, mixed.branch(choice)))
        with torch.no_grad():
            for target, source in parts:
                target.load_state_dict(source.state_dict())
        return network.train(self.training).to(next(self.parameters()).device)
