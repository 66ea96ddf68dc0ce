"""Several heads on one backbone: trained on a frozen one, or joined from folders."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fbnas.commands.parts import data_for, data_of, network_folder, recorded_data, with_heads
from fbnas.compression import load_any
from fbnas.errors import InputError
from fbnas.space import Network, NetworkCard
from fbnas.space.heads import FrozenBackbone, join_heads, renew_classifier_
from fbnas.training.data import Data

log = logging.getLogger(__name__)


def head_on(config: Mapping[str, Any]) -> tuple[FrozenBackbone, NetworkCard, Data]:
    """Return a trained backbone with a fresh head for the classes of `data=`, or with `heads=`.

    The images are normalised as the backbone knows them, not by their own mean and std.

    Raises:
        InputError: options that a head has no use for.
    """
    for key in ("architecture", "supernet", "teacher", "space"):
        if config.get(key):
            raise InputError(
                f"backbone={config['backbone']} says what the network is, and a head is trained "
                f"without a teacher; expected no {key} beside it."
            )
    network, card = load_any(network_folder(config["backbone"], "backbone"))
    data = replace(data_for(config, card.space), mean=card.mean, std=card.std)
    torch.manual_seed(config["seed"])
    renew_classifier_(network, data.classes)
    card = replace(card, class_names=data.class_names, heads=data.heads)
    return FrozenBackbone(network), card, data


def joined(folders: Mapping[str, Any]) -> tuple[Network, NetworkCard]:
    """Read networks of one backbone as one with several heads, by their names.

    Raises:
        InputError: a folder without a network or with one of several heads, or other backbones.
    """
    networks: dict[str, Network] = {}
    cards: dict[str, NetworkCard] = {}
    for name, folder in folders.items():
        networks[name], cards[name] = load_any(network_folder(folder, f"heads.{name}"))
        if cards[name].heads:
            raise InputError(
                f"heads.{name}={folder} has heads of its own, {', '.join(cards[name].heads)}; "
                "expected a network of one head."
            )
    network = join_heads(networks)
    heads = {name: card.class_names for name, card in cards.items()}
    names = tuple(class_name for class_names in heads.values() for class_name in class_names)
    return network, replace(next(iter(cards.values())), class_names=names, heads=heads)


def with_data(config: dict[str, Any], card: NetworkCard, source: Path | None) -> dict[str, Any]:
    """Return the configuration with the data of a network, or of each of its heads.

    It is that of `data=` or `heads=`, or what the network was trained on. Of networks joined from
    the folders of `heads=` that stays as it is.

    Raises:
        InputError: none is given nor recorded, or that of other heads.
    """
    if source is None:
        return config
    config = with_heads(config, card.heads, source)
    if card.heads or config.get("data"):
        return config
    return {**config, "data": recorded_data(source)}


def data_of_network(
    config: dict[str, Any], card: NetworkCard, source: Path | None, *, needed: bool
) -> tuple[dict[str, Any], Data | None]:
    """Return a network's data, and before it the configuration as `with_data` has it.

    Where that of its training is not there any more, that is told, and the configuration stays.

    Args:
        source: folder of the network; None of one joined from the folders of `heads=`.
        needed: whether nothing can be done without it.

    Raises:
        InputError: it is not there and needed, or what is given does not fit the network.
    """
    given = source is not None and (config["heads"] or config.get("data"))
    try:
        if source is not None:
            stated = with_data(config, card, source)
            return stated, data_of(stated, card)
        of_folders = {name: recorded_data(folder) for name, folder in config["heads"].items()}
        return config, data_of({"heads": of_folders}, card)
    except InputError as error:
        if needed or given:
            raise
        log.warning("%s So no images are used.", error)
        return config, None
