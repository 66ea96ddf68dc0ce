"""Supernet: every block of every layer, with shared weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbnas.search.alignment import align_
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

    def forward(
        self,
        features: Tensor,
        gate: Tensor | int,
        values: Sequence[float] | None = None,
        among: Sequence[int] | None = None,
    ) -> Tensor:
        """Mix the blocks.

        Args:
            features: (n, c, h, w).
            gate: a block index; or one weight per block of the space, (blocks,); or such weights
                for each image, (n, blocks).
            values: the weights (blocks,) as numbers, where the caller has them; reading them from a
                GPU waits for it.
            among: indices of the blocks that may be computed; all that the layer offers by default.
        """
        if isinstance(gate, int):
            return self.branch(gate)(features)
        choices = list(self.index) if among is None else list(among)
        if gate.dim() == 2:
            return _weighted(self, features, gate.T[:, :, None, None, None], choices)
        values = gate.tolist() if values is None else values
        used = [i for i in choices if values[i] != 0.0] or choices[:1]
        mixed = _weighted(self, features, gate, used)
        silent = [i for i in choices if i not in used] if gate.requires_grad else []
        if not silent:
            return mixed
        # A gate of zero passes nothing on and nothing back: its block is computed without a graph,
        # for the gate's own gradient, which is a third of the work.
        with torch.no_grad():
            outputs = [self.branch(i)(features) for i in silent]
        return _Silent.apply(mixed, gate, silent, *outputs)


def _weighted(block: MixedBlock, features: Tensor, gate: Tensor, choices: Sequence[int]) -> Tensor:
    """The sum of gate * output over the choices; `gate` holds a factor per block of the space."""
    mixed = gate[choices[0]] * block.branch(choices[0])(features)
    for i in choices[1:]:
        mixed = mixed + gate[i] * block.branch(i)(features)
    return mixed


class _Silent(torch.autograd.Function):
    """mixed + sum_i gate_i * output_i with gates that are zero: the value is `mixed` itself.

    d/d gate_i = <gradient, output_i>; the outputs are constants.
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, gate: Tensor, silent: list[int], *outputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*outputs)
        ctx.gate, ctx.silent = (len(gate), gate.dtype), silent
        return mixed.view_as(mixed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        length, dtype = ctx.gate
        # put together from pieces: an index into a tensor on a GPU would make the CPU wait for it
        slopes = [gradient.new_zeros((), dtype=dtype)] * length
        for i, output in zip(ctx.silent, ctx.saved_tensors, strict=True):
            slopes[i] = (gradient * output).sum(dtype=dtype)
        return gradient, torch.stack(slopes), *[None] * (1 + len(ctx.silent))


class Supernet(nn.Module):
    """Stem, mixed blocks, head, classifier.

    Args:
        space: what each layer may choose.
        classes: number of scores.
        classifier: makes the last layers, for tasks other than classification.
    """

    def __init__(
        self,
        space: SearchSpace,
        classes: int = 1000,
        *,
        classifier: Callable[[SearchSpace, int], nn.Module] = build_classifier,
    ) -> None:
        super().__init__()
        self.space = space
        self.classes = classes
        self.stem = build_stem(space)
        self.layers = nn.ModuleList(MixedBlock(layer, space.blocks) for layer in space.layers)
        self.head = build_head(space)
        self.build_classifier = classifier
        self.classifier = classifier(space, classes)
        initialise_(self)
        for layer, mixed in zip(space.layers, self.layers, strict=True):
            if not layer.keeps_shape:
                assert isinstance(mixed, MixedBlock)
                align_(mixed.branches.values())

    def forward(
        self,
        images: Tensor,
        gates: Tensor | Sequence[int],
        among: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Compute the scores, (n, classes).

        Args:
            images: (n, input_channels, R, R).
            gates: a path, one block index per layer, only those computed; or weights, (layers,
                blocks) or per image (n, layers, blocks), with which all branches are mixed. Weights
                on the CPU are read without waiting for a GPU.
            among: the block indices of each layer that may be computed; all by default.

        Raises:
            ValueError: gates of another shape.
        """
        features = self.stem(images)
        if not isinstance(gates, Tensor):
            self._check((len(gates),), f"{len(gates)} indices")
            for layer, choice in zip(self.layers, gates, strict=True):
                features = layer(features, choice)
            return self.classifier(self.head(features))
        per_image = gates.dim() == 3 and len(gates) == len(images)
        self._check(gates.shape[1:] if per_image else gates.shape, str(tuple(gates.shape)))
        values = None if per_image else gates.detach().tolist()
        # all at once: their gradient comes back in one piece, for which the CPU waits once
        rows = gates.to(images.device, non_blocking=True).unbind(1 if per_image else 0)
        for i, layer in enumerate(self.layers):
            allowed = None if among is None else among[i]
            features = layer(features, rows[i], None if values is None else values[i], allowed)
        return self.classifier(self.head(features))

    def _check(self, shape: Sequence[int], words: str) -> None:
        expected = (len(self.layers), len(self.space.blocks))
        if tuple(shape) != expected[: len(shape)] or not 1 <= len(shape) <= 2:
            raise ValueError(
                f"gates are {words}; expected {expected} or a path of {len(self.layers)} block "
                f"indices, or (images, {expected[0]}, {expected[1]})."
            )

    def network(self, architecture: Architecture) -> Network:
        """Return the architecture's network with a copy of the shared weights."""
        path = architecture.path(self.space)
        network = build_network(
            self.space,
            Architecture(architecture.blocks, self.space.name),
            self.classes,
            classifier=self.build_classifier,
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
