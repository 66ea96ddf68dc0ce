"""SearchSpace: the macro-architecture and the blocks each searchable layer may choose from."""

import importlib.util
import sys
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbnas.errors import InputError, check_known
from fbnas.files import read_yaml
from fbnas.shipped import find
from fbnas.space.blocks import BLOCKS, build_block, output_shape

NINE_BLOCKS = (
    "k3_e1",
    "k3_e1_g2",
    "k3_e3",
    "k3_e6",
    "k5_e1",
    "k5_e1_g2",
    "k5_e3",
    "k5_e6",
    "skip",
)


@dataclass(frozen=True)
class Stem:
    """The first convolution: 3x3, BN, ReLU.

    With `wavelet` it sees the image's low- and high-frequency halves at half resolution, four times
    the channels, and the stride, then even, counts that too.
    """

    channels: int
    stride: int
    wavelet: bool = False

    @property
    def block(self) -> str:
        """Its name in latency tables."""
        return "wavelet_stem" if self.wavelet else "stem"


@dataclass(frozen=True)
class Stage:
    """Layers of equal width; the first one has the stage's stride."""

    channels: int
    layers: int
    stride: int


@dataclass(frozen=True)
class Layer:
    """A searchable position; `height` and `width` are those of its input, in pixels."""

    index: int
    stage: int
    in_channels: int
    out_channels: int
    stride: int
    height: int
    width: int
    blocks: tuple[str, ...]

    @property
    def keeps_shape(self) -> bool:
        """Whether skip is the identity here."""
        return self.stride == 1 and self.in_channels == self.out_channels

    def __str__(self) -> str:
        return (
            f"{self.in_channels} -> {self.out_channels}, stride {self.stride}, "
            f"{self.height}x{self.width}"
        )


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen. Built from a YAML file by `load`, from a mapping by `from_dict`.

    Raises:
        InputError: a value that makes no network; the line names the value and the way out.
    """

    name: str
    resolution: int
    stem: Stem
    stages: tuple[Stage, ...]
    head: int
    blocks: tuple[str, ...] = NINE_BLOCKS
    skip_on_reduction: bool = True
    modules: tuple[str, ...] = ()
    input_channels: int = 3
    layers: tuple[Layer, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_values(self)
        for path in self.modules:
            _import_blocks(Path(path))
        check_known("block", self.blocks, BLOCKS)
        object.__setattr__(self, "layers", _layers(self))
        _check_shapes(self)

    @classmethod
    def load(cls, name_or_path: str | Path) -> "SearchSpace":
        """Load a shipped space by name, or a space file by path.

        Raises:
            InputError: no such space, a bad file, or a space that makes no network.
        """
        path = find("space", name_or_path)
        content = read_yaml(path)
        content.setdefault("name", path.stem)
        try:
            return cls.from_dict(content, folder=path.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, content: dict[str, Any], *, folder: Path | None = None) -> "SearchSpace":
        """Build a space from a mapping as in a space file; `modules` are relative to `folder`."""
        known = [f.name for f in fields(cls) if f.init]
        check_known("key of a space", content, known)
        for key in ("resolution", "stem", "stages", "head"):
            if content.get(key) is None:
                raise InputError(f"the space has no `{key}`; expected keys: {', '.join(known)}.")
        values = dict(content)
        values["stem"] = _part(Stem, content["stem"], "stem")
        if not isinstance(content["stages"], (list, tuple)) or not content["stages"]:
            raise InputError(
                "`stages` is empty; expected a list such as [{channels: 16, layers: 1, stride: 1}]."
            )
        values["stages"] = tuple(
            _part(Stage, stage, f"stage {i}") for i, stage in enumerate(content["stages"])
        )
        for key in ("blocks", "modules"):
            if not isinstance(content.get(key) or [], (list, tuple)):
                raise InputError(
                    f"`{key}` is {content[key]!r}; expected a list, as in [{content[key]}]."
                )
        values["blocks"] = tuple(content.get("blocks") or NINE_BLOCKS)
        values["modules"] = tuple(
            str(((folder or Path()) / module).absolute()) for module in content.get("modules") or ()
        )
        values.setdefault("name", "unnamed")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `from_dict` reads back to an equal space."""
        return {
            "name": self.name,
            "resolution": self.resolution,
            "input_channels": self.input_channels,
            "stem": {k: v for k, v in vars(self.stem).items() if k != "wavelet" or v},
            "stages": [vars(stage).copy() for stage in self.stages],
            "head": self.head,
            "blocks": list(self.blocks),
            "skip_on_reduction": self.skip_on_reduction,
            "modules": list(self.modules),
        }

    @property
    def final_size(self) -> int:
        """Side of the last feature map, in pixels."""
        last = self.layers[-1]
        return _reduced(last.height, last.stride)

    @property
    def final_channels(self) -> int:
        """Channels of the last searchable layer's output."""
        return self.stages[-1].channels

    @cached_property
    def offered(self) -> Tensor:
        """(layers, blocks) bool: whether a layer offers a block."""
        return torch.tensor([[b in layer.blocks for b in self.blocks] for layer in self.layers])

    def at(self, resolution: int | None) -> "SearchSpace":
        """Return the space for images of another resolution; None is its own.

        What may be chosen, and the shapes of weights, are the same.

        Raises:
            InputError: a resolution that makes no network.
        """
        return self if resolution is None else replace(self, resolution=resolution)

    def __len__(self) -> int:
        return len(self.layers)


def _reduced(side: int, stride: int) -> int:
    return -(-side // stride)  # every block pads by K // 2, which leaves ceil(side / stride)


def _part(kind: type, content: Any, where: str) -> Any:
    known = [f.name for f in fields(kind)]
    needed = [f.name for f in fields(kind) if f.default is MISSING]
    if not isinstance(content, dict) or not set(needed) <= set(content) <= set(known):
        optional = [name for name in known if name not in needed]
        also = f" and, if wanted, {', '.join(optional)}" if optional else ""
        raise InputError(
            f"{where} is {content}; expected exactly the keys {', '.join(needed)}{also}."
        )
    return kind(**content)


def _check_values(space: SearchSpace) -> None:
    numbers = {
        "resolution": space.resolution,
        "input_channels": space.input_channels,
        "head": space.head,
        "stem.channels": space.stem.channels,
        "stem.stride": space.stem.stride,
    }
    for i, stage in enumerate(space.stages):
        numbers |= {f"stages[{i}].{key}": value for key, value in vars(stage).items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{key} is {value!r}; expected a whole number of at least 1.")
    if not isinstance(space.stem.wavelet, bool):
        raise InputError(f"stem.wavelet is {space.stem.wavelet!r}; expected true or false.")
    if space.stem.wavelet and (space.resolution % 2 or space.stem.stride % 2):
        raise InputError(
            f"stem.wavelet halves the image: resolution is {space.resolution} and stem.stride "
            f"{space.stem.stride}; expected both to be even."
        )
    for block in space.blocks:
        if space.blocks.count(block) > 1:
            raise InputError(f"block '{block}' is listed twice; list each block once.")


def _import_blocks(path: Path) -> None:
    """Run a user's module once, so that its `register_block` calls take effect."""
    name = f"fbnas_user_blocks_{path.stem}_{abs(hash(str(path.absolute())))}"
    if name in sys.modules:
        return
    if not path.is_file():
        raise InputError(
            f"{path}: no such module; `modules` lists Python files that register blocks."
        )
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # it is the user's code: anything may go wrong in it
        del sys.modules[name]
        raise InputError(
            f"{path}: the module cannot be imported ({type(error).__name__}: {error}); mend it."
        ) from error


def _layers(space: SearchSpace) -> tuple[Layer, ...]:
    side = _reduced(space.resolution, space.stem.stride)
    channels = space.stem.channels
    layers: list[Layer] = []
    for number, stage in enumerate(space.stages):
        for position in range(stage.layers):
            stride = stage.stride if position == 0 else 1
            reduction = stride != 1 or channels != stage.channels
            leave_out = {"skip"} if reduction and not space.skip_on_reduction else set()
            layers.append(
                Layer(
                    index=len(layers),
                    stage=number,
                    in_channels=channels,
                    out_channels=stage.channels,
                    stride=stride,
                    height=side,
                    width=side,
                    blocks=tuple(b for b in space.blocks if b not in leave_out),
                )
            )
            side = _reduced(side, stride)
            channels = stage.channels
    return tuple(layers)


def _check_shapes(space: SearchSpace) -> None:
    for layer in space.layers:
        if layer.height == 1 and layer.stage < len(space.stages):
            raise InputError(
                f"the feature map is 1x1 before stage {layer.stage} (of {len(space.stages)}, "
                "counted from 0), where a KxK convolution sees only padding; expected at least "
                f"2x2: lower the strides or raise the resolution ({space.resolution})."
            )
        if not layer.blocks:
            raise InputError(f"layer {layer.index} ({layer}) offers no block; add one to `blocks`.")
    shapes = {
        (x.in_channels, x.out_channels, x.stride, x.height, x.blocks): x for x in space.layers
    }
    for layer in shapes.values():
        for name in layer.blocks:
            _check_block(name, layer)


def _check_block(name: str, layer: Layer) -> None:
    side = _reduced(layer.height, layer.stride)
    expected = (layer.out_channels, side, side)
    try:
        with torch.device("meta"):
            block = build_block(name, layer.in_channels, layer.out_channels, layer.stride)
        found = output_shape(block, layer.in_channels, layer.height)
    except InputError as error:
        raise InputError(f"block '{name}' in layer {layer.index} ({layer}): {error}") from error
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"block '{name}' cannot be built or run in layer {layer.index} ({layer}): {reason}"
        ) from error
    if found != expected:
        raise InputError(
            f"block '{name}' in layer {layer.index} ({layer}) returns {found}; expected "
            f"{expected} as (channels, height, width)."
        )
