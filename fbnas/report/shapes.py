"""The shapes of a space's layers, from its YAML alone, so that the report needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbnas.errors import InputError
from fbnas.report.words import TIMES

Shape = tuple[int, int, int, int, int]  # in_channels, out_channels, stride, height, width


@dataclass(frozen=True)
class Layer:
    """A searchable position; `height` and `width` are those of its input, in pixels."""

    index: int
    stage: int
    shape: Shape

    def __str__(self) -> str:
        return describe(self.shape)


@dataclass(frozen=True)
class Space:
    """What the page shows of a search space."""

    name: str
    resolution: int
    input_channels: int
    stem_channels: int
    wavelet: bool  # the stem sees the halves of a wavelet split
    head: int
    blocks: tuple[str, ...]
    layers: tuple[Layer, ...]
    final_size: int


def describe(shape: Shape) -> str:
    """Write a shape for people: 16 → 24, stride 2, 112x112."""
    in_channels, out_channels, stride, height, width = shape
    return f"{in_channels} → {out_channels}, stride {stride}, {height}{TIMES}{width}"


def read_space(content: dict[str, Any], source: Path) -> Space:
    """Compute every layer's shape from a space's mapping, as `SearchSpace.to_dict` writes it.

    Raises:
        InputError: a key is missing or of the wrong kind.
    """
    try:
        side = _reduced(content["resolution"], content["stem"]["stride"])
        channels = content["stem"]["channels"]
        layers: list[Layer] = []
        for number, stage in enumerate(content["stages"]):
            for position in range(stage["layers"]):
                stride = stage["stride"] if position == 0 else 1
                shape = (channels, stage["channels"], stride, side, side)
                layers.append(Layer(len(layers), number, shape))
                side, channels = _reduced(side, stride), stage["channels"]
        return Space(
            name=str(content.get("name", "unnamed")),
            resolution=content["resolution"],
            input_channels=content.get("input_channels", 3),
            stem_channels=content["stem"]["channels"],
            wavelet=bool(content["stem"].get("wavelet", False)),
            head=content["head"],
            blocks=tuple(content["blocks"]),
            layers=tuple(layers),
            final_size=side,
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{source}: {error} is missing or of the wrong kind; expected a space as fbnas writes "
            "it. Run the command that made this folder again."
        ) from error


def _reduced(side: int, stride: int) -> int:
    return -(-side // stride)  # every block pads by K // 2, which leaves ceil(side / stride)
