"""WHAT may be chosen: blocks, search spaces, architectures and the networks built from them."""

from fbnas.space.architecture import Architecture
from fbnas.space.blocks import BLOCKS, build_block, register_block
from fbnas.space.network import (
    Count,
    Network,
    NetworkCard,
    block_params,
    build_network,
    count,
    load_network,
    load_tensors_,
    save_network,
)
from fbnas.space.search_space import Layer, SearchSpace, Stage, Stem

__all__ = [
    "BLOCKS",
    "Architecture",
    "Count",
    "Layer",
    "Network",
    "NetworkCard",
    "SearchSpace",
    "Stage",
    "Stem",
    "block_params",
    "build_block",
    "build_network",
    "count",
    "load_network",
    "load_tensors_",
    "register_block",
    "save_network",
]
