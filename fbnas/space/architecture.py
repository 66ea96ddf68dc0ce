"""Architecture: one block per layer, the small text file that the whole product turns around."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fbnas.errors import InputError, unknown
from fbnas.files import read_yaml, write_yaml
from fbnas.shipped import find
from fbnas.space.search_space import SearchSpace


@dataclass(frozen=True)
class Architecture:
    """One block name per layer, the space it belongs to, and where it comes from.

    `provenance` holds what is known of its origin: log_probability, predicted_latency_ms, source.
    `head` and `resolution` are None where they are the space's.
    """

    blocks: tuple[str, ...]
    space: str = ""
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    head: int | None = None
    resolution: int | None = None

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Architecture":
        """Load a shipped architecture by name ("fbnet_c"), or an architecture file by path.

        Raises:
            InputError: no such architecture, or a file without a list of block names.
        """
        path = find("architecture", name_or_path)
        content = read_yaml(path)
        blocks = content.pop("blocks", None)
        if isinstance(blocks, str):
            blocks = blocks.split()
        if (
            not isinstance(blocks, list)
            or not all(isinstance(b, str) for b in blocks)
            or not blocks
        ):
            raise InputError(f"{path}: `blocks` is {blocks!r}; expected a list of block names.")
        space = content.pop("space", "")
        numbers = {"head": "a number of channels", "resolution": "a number of pixels"}
        for key, expected in numbers.items():
            value = content.get(key)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{path}: `{key}` is {value!r}; expected {expected}.")
        head, resolution = (content.pop(key, None) for key in numbers)
        return cls(tuple(blocks), str(space or ""), content, head, resolution)

    def save(self, path: str | Path) -> None:
        """Write the architecture as YAML; `load` reads it back to an equal one."""
        own = {"head": self.head, "resolution": self.resolution}
        stated = {key: value for key, value in own.items() if value is not None}
        write_yaml(
            path, {"space": self.space, **stated, "blocks": list(self.blocks), **self.provenance}
        )

    def path(self, space: SearchSpace) -> list[int]:
        """Return one block index per layer of `space`.

        Raises:
            InputError: another number of layers, or a block that its layer does not offer.
        """
        if len(self.blocks) != len(space.layers):
            other = self.space not in ("", space.name)
            way_out = f"space={self.space}, which it names" if other else "a block for each layer"
            raise InputError(
                f"The architecture has {len(self.blocks)} blocks, space {space.name} has "
                f"{len(space.layers)} layers; expected {way_out}."
            )
        for layer, name in zip(space.layers, self.blocks, strict=True):
            if name not in space.blocks:
                raise unknown(
                    f"block in layer {layer.index} of space {space.name}:", name, layer.blocks
                )
            if name not in layer.blocks:
                raise InputError(
                    f"Layer {layer.index} ({layer}) of space {space.name} does not offer {name}; "
                    f"it offers {', '.join(layer.blocks)}."
                )
        return [space.blocks.index(name) for name in self.blocks]

    @classmethod
    def from_path(cls, space: SearchSpace, path: list[int], **provenance: Any) -> "Architecture":
        """Build the architecture that `path`, one block index per layer, describes."""
        return cls(tuple(space.blocks[i] for i in path), space.name, provenance)

    @classmethod
    def random(cls, space: SearchSpace, generator: torch.Generator | None = None) -> "Architecture":
        """Draw one block per layer uniformly from those offered there."""
        choice = torch.multinomial(space.offered.double(), 1, generator=generator).squeeze(1)
        return cls.from_path(space, choice.tolist(), source="random")

    def __str__(self) -> str:
        return " ".join(self.blocks)
