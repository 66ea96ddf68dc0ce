"""int8 arithmetic imitated in torch: values rounded to their grids while all is computed in fp32.

The grids are those of ONNX Runtime's static QDQ form: weights w = s q, q whole, |q| <= 2^(b-1) - 1,
with s from the largest weight of an output channel, or w = s (q - z) with s and z from the range of
a whole tensor; activations x = s (q - z), 0 <= q <= 255, with
s and z from a range that holds zero. Gradients pass straight through the rounding, and are zero
where an activation leaves its range (Bengio et al. 2013, arXiv 1308.3432; Jacob et al. 2018, arXiv
1712.05877, section 3).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.latency.ranges import PERCENTILE, Range, watched_ranges
from fbnas.modes import modes_kept
from fbnas.space.blocks import ChannelShuffle

LEVELS = 255  # of an activation's grid, less one
BITS = range(2, 9)  # of weights

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.Hardswish)
LAYOUT = (  # they move values, which stay on their grid
    ChannelShuffle,
    nn.ChannelShuffle,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.MaxPool2d,
    nn.AdaptiveMaxPool2d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.Dropout,
    nn.Dropout2d,
)


@dataclass(frozen=True)
class QuantizedForm:
    """All that a network, whose weights lie on their grids, needs to run in int8.

    Args:
        weight_bits: of convolutions and linear layers; stored in int8, whatever they are.
        per_channel: a scale for every output channel of the weights.
        weights: symmetric, or asymmetric, with a zero point, one for a whole tensor.
        inputs: of the modules whose input is rounded, (lowest, highest) value.
        outputs: of the modules whose output is rounded.
        method: what made it, for the reader of the file.
    """

    weight_bits: int
    per_channel: bool
    inputs: dict[str, Range]
    outputs: dict[str, Range]
    method: str = ""
    weights: str = "symmetric"

    @property
    def grids(self) -> "WeightGrids":
        """What weights are rounded to."""
        return WeightGrids(self.weight_bits, self.per_channel, self.weights == "symmetric")

    def save(self, path: Path | str) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path | str) -> "QuantizedForm":
        """Read it back.

        Raises:
            InputError: no such file, or not one of a quantized form.
        """
        content = read_json(path)
        try:
            inputs, outputs = (
                {name: (float(low), float(high)) for name, (low, high) in content[key].items()}
                for key in ("inputs", "outputs")
            )
            return cls(
                int(content["weight_bits"]),
                bool(content["per_channel"]),
                inputs,
                outputs,
                str(content.get("method", "")),
                str(content.get("weights", "symmetric")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path}: {error} is missing or of the wrong kind; expected what fbnas compress "
                "method=qat writes. Compress again."
            ) from error


@dataclass(frozen=True)
class Points:
    """Names of the modules whose input or output is rounded."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class WeightGrids:
    """The grids of weights (out, ...): of so many bits, for each w[o] or all of w.

    Symmetric: s = max |w| / (2^(bits - 1) - 1), z = 0. Asymmetric, for all of w: s = (max(w, 0) -
    min(w, 0)) / (2^bits - 1), z = round(-min(w, 0) / s) - 2^(bits - 1). s = 1 where all are zero.
    """

    bits: int
    per_channel: bool = True
    symmetric: bool = True

    @property
    def lowest(self) -> int:
        """Of the whole numbers q; the highest is 2^(bits - 1) - 1."""
        return -(2 ** (self.bits - 1)) + int(self.symmetric)

    @property
    def highest(self) -> int:
        """Of the whole numbers q."""
        return 2 ** (self.bits - 1) - 1

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return step s and zero point z (int32) of a weight: (out,), or () for the whole."""
        weight = weight.detach()
        over = list(range(1, weight.ndim)) if self.per_channel else list(range(weight.ndim))
        if self.symmetric:
            scale = weight.abs().amax(over) / self.highest
        else:
            low = weight.amin(over).clamp(max=0)
            scale = (weight.amax(over).clamp(min=0) - low) / (self.highest - self.lowest)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.zeros_like(scale) if self.symmetric else self.lowest - low / scale
        return scale, zero.round().to(torch.int32)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return s (q - z), q = round(w / s) + z between the ends; the gradient is that of w."""
        scale, zero = self.of(weight)
        ends = self.lowest, self.highest
        if not self.per_channel:
            return torch.fake_quantize_per_tensor_affine(weight, scale, zero, *ends)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, *ends)


def activation_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (int32) of a range that is widened to hold zero.

    s = (high - low) / 255, z = round(-low / s).
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / LEVELS).clamp(min=1e-12)
    return scale, (-low / scale).round().clamp(0, LEVELS).to(torch.int32)


def rounded_activation(values: Tensor, ends: Tensor) -> Tensor:
    """Round to the grid of a range (2,): lowest and highest."""
    scale, zero = activation_grid(ends[0], ends[1])
    if torch.jit.is_tracing():  # so that the grid is a constant of the traced graph
        return torch.fake_quantize_per_tensor_affine(
            values, scale.item(), int(zero.item()), 0, LEVELS
        )
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, LEVELS)


def quantized_points(model: nn.Module, input_shape: tuple[int, int, int]) -> Points:
    """Find where activations are rounded, by one pass of images.

    Rounded is every new tensor that a module returns, but for one that the activation or batch
    normalisation behind takes up, and one that only has its values moved; and the input of a
    convolution or linear layer that no module before it rounds, as the network's own is.
    """
    return _Survey(model, input_shape).points()


class _Survey:
    """Which module made and took which tensor in one pass."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
        self.model = model
        self.leaves: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self.maker: dict[int, str] = {}  # of each tensor, by its id
        self.kept: list[Tensor] = []  # so that no id is used twice
        self.fed: dict[nn.Module, int] = {}
        names = {module: name for name, module in model.named_modules()}
        hooks = [
            hook
            for module, name in names.items()
            for hook in (
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._noting(name)),
            )
        ]
        tensor = next(model.parameters())
        try:
            with torch.no_grad(), modes_kept(model):
                model.eval()(torch.zeros(2, *input_shape, device=tensor.device))
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self.kept.append(args[0])
            self.fed[module] = id(args[0])

    def _noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            self.kept.append(output)
            leaf = next(module.children(), None) is None
            if leaf and args and isinstance(args[0], Tensor):
                self.leaves.append((name, module, args[0], output))
            self.maker.setdefault(id(output), name)  # the innermost module returns it first

        return note

    def points(self) -> Points:
        moved, taken, acting = dict[int, int](), set[int](), dict[int, str]()
        for name, module, source, output in self.leaves:
            if isinstance(module, LAYOUT):
                if output is not source:
                    moved[id(output)] = id(source)
            elif isinstance(module, (*ACTIVATIONS, nn.modules.batchnorm._BatchNorm)):
                if output is source:  # in place: the tensor is what it makes of it
                    acting[id(output)] = name
                else:
                    taken.add(id(source))
        makers = {**self.maker, **acting}
        rounded = {key: name for key, name in makers.items() if key not in taken | moved.keys()}
        inputs = [
            name
            for name, module, source, _ in self.leaves
            if isinstance(module, nn.Conv2d | nn.Linear) and _origin(source, moved) not in rounded
        ]
        return Points(tuple(dict.fromkeys(inputs)), tuple(dict.fromkeys(rounded.values())))


def _origin(tensor: Tensor, moved: dict[int, int]) -> int:
    key = id(tensor)
    while key in moved:
        key = moved[key]
    return key


@torch.no_grad()
def observed_ranges(
    model: nn.Module,
    points: Points,
    batches: Sequence[np.ndarray],
    *,
    ranges: str = "minmax",
    percentile: float = PERCENTILE,
) -> tuple[dict[str, Range], dict[str, Range]]:
    """Return the ranges of inputs and outputs over batches of images (n, c, h, w), in eval mode.

    Args:
        ranges, percentile: as of `watched_ranges`.
    """
    device, noted = next(model.parameters()).device, dict[tuple[str, str], np.ndarray]()

    def note(kind: str, name: str, values: Tensor) -> None:
        seen = values.detach().float().cpu().flatten().numpy().copy()  # others change it in place
        earlier = noted.get((kind, name))  # of a module that is called twice
        noted[kind, name] = seen if earlier is None else np.concatenate([earlier, seen])

    def watch(images: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        noted.clear()
        model(torch.from_numpy(images).to(device))
        return dict(noted)

    modules, hooks = dict(model.named_modules()), []
    for name in points.inputs:
        hooks.append(
            modules[name].register_forward_pre_hook(
                lambda _, args, name=name: note(_INPUT, name, args[0])
            )
        )
    for name in points.outputs:
        hooks.append(
            modules[name].register_forward_hook(
                lambda _, __, output, name=name: note(_OUTPUT, name, output)
            )
        )
    try:
        with modes_kept(model):
            model.eval()
            found = watched_ranges(watch, batches, ranges=ranges, percentile=percentile)
    finally:
        for hook in hooks:
            hook.remove()
    inputs = {name: ends for (kind, name), ends in found.items() if kind == _INPUT}
    return inputs, {name: ends for (kind, name), ends in found.items() if kind == _OUTPUT}


@contextmanager
def rounding_activations(
    model: nn.Module, form: QuantizedForm, *, momentum: float = 0.0, symmetrically: bool = False
) -> Iterator[Callable[[], QuantizedForm]]:
    """Round activations in place while the block runs; yields what tells the present grids' ranges.

    Ranges are buffers (2,) of the modules, so that they travel with copies and checkpoints.

    Args:
        momentum: of ranges that follow what passes in training mode, range <- (1 - momentum) *
            range + momentum * (lowest, highest) of the batch; 0: they stay.
        symmetrically: grids are those of the ranges widened by `symmetric`.
    """
    with _attached(model, form, momentum, symmetrically) as attached:
        yield lambda: QuantizedForm(
            form.weight_bits,
            form.per_channel,
            {name: _read(module, _INPUT) for kind, name, module in attached if kind == _INPUT},
            {name: _read(module, _OUTPUT) for kind, name, module in attached if kind == _OUTPUT},
            form.method,
            form.weights,
        )


def as_deployed(network: nn.Module, form: QuantizedForm) -> nn.Module:
    """Return a copy in eval mode that computes what the int8 file of the network computes.

    Raises:
        InputError: the form is of another network.
    """
    network = copy.deepcopy(network).cpu().float().eval()
    missing = {*form.inputs, *form.outputs} - dict(network.named_modules()).keys()
    if missing:
        raise InputError(
            f"The quantized form names {sorted(missing)[0]}, which the network has not; expected "
            "the form that was written with it (quantization.json beside network.yaml)."
        )
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_(form.grids.rounded(module.weight))
    _attach(network, form)
    return network


@contextmanager
def rounding_weights(
    model: nn.Module, grids: WeightGrids, *, kept: dict[nn.Module, Tensor]
) -> Iterator[None]:
    """Round the weights of convolutions and linear layers while the block trains them in place.

    They end as plain weights on their grids.

    Args:
        kept: masks of the weights that are not to stay zero; rounding makes new zeros, which may
            leave it again.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        on_grid = _OnGrid(grids, kept.get(layer))
        parametrize.register_parametrization(layer, "weight", on_grid)
    try:
        yield
    finally:
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class _OnGrid(nn.Module):
    """A weight as its nearest values of the grid; those masked stay zero."""

    mask: Tensor | None

    def __init__(self, grids: WeightGrids, mask: Tensor | None) -> None:
        super().__init__()
        self.grids = grids
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight if self.mask is None else weight * self.mask
        return self.grids.rounded(weight)


_INPUT, _OUTPUT = "input", "output"
_Attached = Sequence[tuple[str, str, nn.Module]]


@contextmanager
def _attached(
    model: nn.Module, form: QuantizedForm, momentum: float, symmetrically: bool
) -> Iterator[_Attached]:
    attached, hooks = _attach(model, form, momentum, symmetrically)
    try:
        yield attached
    finally:
        for hook in hooks:
            hook.remove()
        for kind, _, module in attached:
            delattr(module, _buffer(kind))
            for how in (_MOMENTUM, _SYMMETRIC):
                if hasattr(module, how):
                    delattr(module, how)


def _attach(
    model: nn.Module, form: QuantizedForm, momentum: float = 0.0, symmetrically: bool = False
) -> tuple[_Attached, list[Any]]:
    modules, device = dict(model.named_modules()), next(model.parameters()).device
    attached: list[tuple[str, str, nn.Module]] = []
    hooks: list[Any] = []
    for kind, ranges in ((_INPUT, form.inputs), (_OUTPUT, form.outputs)):
        for name, ends in ranges.items():
            module = modules[name]
            module.register_buffer(_buffer(kind), torch.tensor(ends, device=device))
            setattr(module, _MOMENTUM, momentum)
            setattr(module, _SYMMETRIC, symmetrically)
            attached.append((kind, name, module))
            hooks.append(
                module.register_forward_pre_hook(_round_input)
                if kind == _INPUT
                else module.register_forward_hook(_round_output)
            )
    return attached, hooks


_MOMENTUM, _SYMMETRIC = "range_momentum", "range_symmetric"


def _buffer(kind: str) -> str:
    return f"{kind}_range"


def _read(module: nn.Module, kind: str) -> Range:
    low, high = _ends(module, kind).tolist()
    return low, high


def _ends(module: nn.Module, kind: str) -> Tensor:
    """The range (2,) of the grid that is rounded to; the buffer, or that as `symmetric` widens it.

    In torch, so that nothing waits for the device.
    """
    ends: Tensor = getattr(module, _buffer(kind))
    if not getattr(module, _SYMMETRIC):
        return ends
    reach = ends.abs().max()
    return torch.stack([torch.where(ends[0] >= 0, 0 * reach, -reach * 128 / 127), reach])


# Functions of the module that they are called with, not of one that they know: a copy of the
# network, as the moving average of its weights is, has ranges of its own.
def _round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_followed(module, args[0], _INPUT), *args[1:])


def _round_output(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return _followed(module, output, _OUTPUT)


def _followed(module: nn.Module, values: Tensor, kind: str) -> Tensor:
    momentum = getattr(module, _MOMENTUM)
    if module.training and momentum:
        with torch.no_grad():
            seen = torch.stack(values.detach().float().aminmax())
            getattr(module, _buffer(kind)).lerp_(seen, momentum)
    return rounded_activation(values, _ends(module, kind))
