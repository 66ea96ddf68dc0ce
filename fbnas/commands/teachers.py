"""Teachers of distillation: networks of other folders, of a search, or the one being compressed."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fbnas.commands.parts import check_class_names, network_folder
from fbnas.errors import InputError
from fbnas.search import read_result, read_supernet
from fbnas.space import Architecture, SearchSpace, load_network
from fbnas.space.heads import Heads
from fbnas.space.network import block_params
from fbnas.training.data import Data, Subset, batches
from fbnas.training.distillation import Ensemble
from fbnas.training.evaluation import recalibrate_bn

SUPERNET, UNCOMPRESSED = "supernet", "uncompressed"
CALIBRATION_IMAGES = 512  # for batch normalisation, as before a validation
BATCH = 64


@dataclass(frozen=True)
class Sources:
    """What the words for teachers stand for.

    search: folder that `supernet` means. uncompressed: the network before compression.
    """

    search: Path | None = None
    uncompressed: nn.Module | None = None


def teacher_of(given: Any, data: Data, sources: Sources) -> nn.Module | None:
    """Build the teacher of `teacher=`: a folder, a word, or a list of them for their mean.

    Raises:
        InputError: a folder with neither network nor search, other classes, or a word that stands
            for nothing here.
    """
    if given is None:
        return None
    if isinstance(given, list):
        return Ensemble([_one(str(name), data, sources) for name in given])
    return _one(str(given), data, sources)


def check_teacher(key: str, given: Any, *, words: tuple[str, ...]) -> None:
    """Refuse a teacher that is neither a word nor there, before anything is read.

    Raises:
        InputError: it is not, or the list is empty.
    """
    names = given if isinstance(given, list) else [] if given is None else [given]
    if given == []:
        raise InputError(f"{key}=[]; expected null for none, or at least one teacher.")
    for name in map(str, names):
        if name not in words and not Path(name).exists():
            raise InputError(
                f"{key}={name}: no such folder; expected that of a trained network or of a search, "
                f"or {' or '.join(words)}."
            )


def search_beside(config: Mapping[str, Any]) -> Path | None:
    """Return the search that `supernet` means for `fbnas train`, None where there is none.

    It is that of `supernet=`, or the one whose folder the architecture's file lies in.
    """
    if config.get("supernet"):
        return _search_in(Path(config["supernet"]))
    for folder in Path(config["architecture"]).absolute().parents[:3]:
        found = _search_in(folder)
        if found is not None:
            return found
    return None


def _search_in(folder: Path) -> Path | None:
    for place in (folder, folder / "search"):
        if (place / "theta.json").is_file():
            return place
    return None


def _one(name: str, data: Data, sources: Sources) -> nn.Module:
    if name == UNCOMPRESSED and sources.uncompressed is not None:
        return deepcopy(sources.uncompressed)
    if name == SUPERNET and sources.search is not None:
        return largest_of(sources.search, data)
    if name in (SUPERNET, UNCOMPRESSED) and not Path(name).exists():
        raise InputError(
            f"teacher={name} stands for nothing here; expected the folder of a trained network or "
            "of a search."
        )
    if (Path(name) / "theta.json").is_file():
        return largest_of(Path(name), data)
    network, card = load_network(network_folder(name))
    check_heads(name, card.heads, data.heads)
    check_class_names(data, card.class_names, card.heads)
    return _shown_as_trained(network, card.mean, card.std, data)


def check_heads(teacher: str, theirs: Heads, ours: Heads) -> None:
    """Refuse a teacher of other heads: it answers other questions.

    Raises:
        InputError: what heads both have.
    """
    if list(theirs) != list(ours):
        raise InputError(
            f"teacher={teacher} has {_named(theirs)}, and the data has {_named(ours)}; expected a "
            "teacher with the same heads."
        )


def _named(heads: Heads) -> str:
    return f"the heads {', '.join(heads)}" if heads else "one head"


def largest_of(folder: Path, data: Data) -> nn.Module:
    """Return the network of a search's shared weights that has the most parameters.

    Its statistics of batch normalisation, which in a supernet are of a mixture of networks, are
    estimated anew on training images.

    Raises:
        InputError: the search was for other classes or images.
    """
    space, _, classes = read_result(folder)
    if (classes, space.input_channels) != (data.classes, data.channels):
        raise InputError(
            f"{folder} was searched for {classes} classes and {space.input_channels} channels, the "
            f"data has {data.classes} and {data.channels}; expected a search on such data."
        )
    network = read_supernet(folder, space, classes).network(largest_architecture(space))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    shown = Subset(data.train, order[:CALIBRATION_IMAGES])
    recalibrate_bn(
        network, network, batches(shown, BATCH, mean=data.mean, std=data.std, drop_last=True)
    )
    return network.eval()


def largest_architecture(space: SearchSpace) -> Architecture:
    """Return the architecture with the most parameters."""
    params, _ = block_params(space)
    chosen = params.nan_to_num(-1).argmax(1).tolist()
    return Architecture(tuple(space.blocks[choice] for choice in chosen), space.name)


def _shown_as_trained(
    network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], data: Data
) -> nn.Module:
    """Let a network that was shown images by another mean and std see them so again."""
    if (mean, std) == (tuple(data.mean), tuple(data.std)):
        return network
    our_mean, our_std, mean_, std_ = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std, mean, std)
    )
    factor, shift = our_std / std_, (our_mean - mean_) / std_

    def normalise(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * factor.to(args[0].device) + shift.to(args[0].device),)

    network.register_forward_pre_hook(normalise)
    return network
