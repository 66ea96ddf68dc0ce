"""Where layers are called in a network, and what follows each: read from one forward pass."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fbnas.modes import modes_kept

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


@dataclass(frozen=True)
class Call:
    """A convolution or linear layer where it is called.

    norm: the batch normalisation that alone takes its output, in a network that computes with its
    running statistics; None where there is none. relu: whether that, or the layer's output, goes
    into a ReLU and nowhere else. source: a number of what it reads, the same for layers that read
    the same. once: whether this is the layer's only call.
    """

    name: str
    layer: nn.Conv2d | nn.Linear
    norm_name: str
    norm: nn.BatchNorm2d | None
    relu: bool
    source: int
    once: bool


def layer_calls(model: nn.Module, input_shape: tuple[int, int, int]) -> list[Call]:
    """Return the calls of convolutions and linear layers, in the order of execution.

    Args:
        input_shape: (c, h, w) of one image.
    """
    recorder = _Recorder()
    names = {module: name for name, module in model.named_modules()}
    hooks = [hook for module in names for hook in recorder.watch(module)]
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), modes_kept(model), recorder:
            outputs = model.eval()(torch.zeros(2, *input_shape, device=device))
            recorder.uses(outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [_call(recorder, names, *call) for call in recorder.calls if _is_layer(call[0])]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


def _call(
    recorder: "_Recorder", names: dict[nn.Module, str], layer: Any, source: int, output: int
) -> Call:
    norm, value = None, output
    following = recorder.only_use(value)
    if following is not None and _is_frozen_norm(following.module, recorder):
        norm, value = following.module, following.written
        following = recorder.only_use(value)
    return Call(
        name=names[layer],
        layer=layer,
        norm_name="" if norm is None else names[norm],
        norm=norm,  # type: ignore[arg-type]
        relu=following is not None and following.function in RELUS,
        source=source,
        once=recorder.times_called(layer) == 1,
    )


def _is_frozen_norm(module: nn.Module | None, recorder: "_Recorder") -> bool:
    return (
        isinstance(module, nn.BatchNorm2d)
        and module.running_mean is not None
        and recorder.times_called(module) == 1
    )


@dataclass(frozen=True)
class _Operation:
    """A function that made a tensor, in which module, and the number of what it made."""

    function: Callable[..., Any] | None
    module: nn.Module | None
    written: int


class _Recorder(TorchFunctionMode):
    """Numbers every tensor that an operation makes and notes which operations read it.

    An operation in place gives its tensor a new number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[nn.Module, int, int]] = []  # module, input and output
        self._within: list[tuple[nn.Module, int]] = []
        self._numbers: dict[int, int] = {}  # by the tensor's id
        self._kept: list[Tensor] = []  # so that no id comes twice
        self._readers: dict[int, list[_Operation]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        read = [self._number(x) for x in _tensors((args, kwargs))]
        result = function(*args, **(kwargs or {}))
        made = list(_tensors(result))
        if made:
            module = self._within[-1][0] if self._within else None
            operation = _Operation(function, module, self._new(made[0]))
            for other in made[1:]:
                self._new(other)
            for number in set(read):
                self._readers.setdefault(number, []).append(operation)
        return result

    def watch(self, module: nn.Module) -> tuple[Any, Any]:
        """Follow when the module is entered and left."""

        def enter(module: nn.Module, inputs: Any) -> None:
            source = next(_tensors(inputs), None)
            self._within.append((module, -1 if source is None else self._number(source)))

        def leave(module: nn.Module, _: Any, outputs: Any) -> None:
            _, source = self._within.pop()
            made = next(_tensors(outputs), None)
            self.calls.append((module, source, -1 if made is None else self._number(made)))

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def uses(self, outputs: Any) -> None:
        """Count the network's outputs as read."""
        for output in _tensors(outputs):
            self._readers.setdefault(self._number(output), []).append(_Operation(None, None, -1))

    def only_use(self, value: int) -> _Operation | None:
        """Return what reads a value, where that is one operation."""
        readers = self._readers.get(value, [])
        return readers[0] if len(readers) == 1 else None

    def times_called(self, module: nn.Module) -> int:
        return sum(called is module for called, _, _ in self.calls)

    def _number(self, tensor: Tensor) -> int:
        return self._numbers[id(tensor)] if id(tensor) in self._numbers else self._new(tensor)

    def _new(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        self._numbers[id(tensor)] = len(self._kept)
        return len(self._kept)


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, list | tuple):
        for part in content:
            yield from _tensors(part)
    elif isinstance(content, dict):
        yield from _tensors(list(content.values()))
