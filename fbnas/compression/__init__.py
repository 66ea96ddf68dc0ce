"""Smaller and quicker networks: `compress_(model, method)`, one file per method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fbnas.compression.pruning import ChannelPruning, ChannelSet, prune_
from fbnas.compression.quantization import (
    QuantizationReport,
    StaticQuantization,
    calibration_images,
    quantize_file,
)
from fbnas.errors import InputError
from fbnas.space.network import Count, count

__all__ = [
    "ChannelPruning",
    "ChannelSet",
    "CompressionReport",
    "QuantizationReport",
    "StaticQuantization",
    "calibration_images",
    "compress_",
    "quantize_file",
]


@dataclass(frozen=True)
class CompressionReport:
    """Parameters and multiply-adds before and after, and what was done to each part."""

    before: Count
    after: Count
    changes: tuple[ChannelSet, ...]
    trained: Any = None  # what `train` returned


HANDLERS: dict[type, Callable[..., tuple[ChannelSet, ...]]] = {ChannelPruning: prune_}


def compress_(
    model: nn.Module,
    method: Any,
    *,
    input_shape: tuple[int, int, int] | None = None,
    train: Callable[[nn.Module], Any] | None = None,
) -> CompressionReport:
    """Compress a network in place; the type of `method` chooses how.

        compress_(network, ChannelPruning(ratio=0.25), train=tune)

    Args:
        input_shape: (c, h, w) of one image; a network of `build_network` knows its own.
        train: fine-tunes the compressed network in place.

    Raises:
        InputError: no handler for this type of method, or no input shape.
    """
    if isinstance(method, StaticQuantization):
        raise InputError(
            "StaticQuantization compresses an exported file, not a module; expected "
            "export_onnx(network, FILE), then quantize_file(FILE, OUT, data)."
        )
    if type(method) not in HANDLERS:
        known = ", ".join(handled.__name__ for handled in HANDLERS)
        raise InputError(
            f"Unknown compression method {type(method).__name__}. Known: {known}; "
            "StaticQuantization goes to quantize_file."
        )
    if input_shape is None:
        input_shape = getattr(model, "input_shape", None)
    if input_shape is None:
        raise InputError("compress_ got no input_shape; expected (channels, height, width).")
    before = count(model, input_shape)
    changes = HANDLERS[type(method)](model, method, input_shape=input_shape)
    trained = train(model) if train is not None else None
    return CompressionReport(before, count(model, input_shape), changes, trained)
