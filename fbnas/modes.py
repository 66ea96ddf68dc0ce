"""Training and eval mode of every module of a network, kept while something else needs another."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def modes_kept(network: "nn.Module") -> Iterator[None]:
    """Put every module back into its own mode: one that is frozen in eval mode stays so.

    `network.train(mode)` afterwards would not: it gives all modules the same.
    """
    modes = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
