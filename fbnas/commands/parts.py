"""What several commands build from their configuration."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from fbnas.commands.folder import WRITTEN
from fbnas.errors import InputError, check_known
from fbnas.export import input_size, read_metadata, sidecar
from fbnas.files import read_json, read_yaml
from fbnas.latency.devices import device_from
from fbnas.latency.profiling import AnyDevice
from fbnas.search import SearchSettings, build_objective
from fbnas.shipped import configs_folder, find, shipped_names
from fbnas.space import Architecture, NetworkCard, SearchSpace
from fbnas.space.heads import Heads
from fbnas.training.data import Data, load_data
from fbnas.training.heads import join_data
from fbnas.training.settings import TrainingSettings

log = logging.getLogger(__name__)

Config = Mapping[str, Any]


def space_of(config: Config) -> SearchSpace:
    """Build the space that `space=` composed."""
    return SearchSpace.from_dict(dict(config["space"]))


def check_parts(config: Config) -> None:
    """Refuse what can be refused without reading data, tables or weights.

    Raises:
        InputError: a part of the configuration makes none, or what a command reads is not there.
    """
    if config.get("space"):
        space_of(config)
    if "device" in config:
        device_of(config)
    if "search" in config:
        SearchSettings.from_dict(config["search"])
    if "training" in config:
        TrainingSettings.from_dict(config["training"])
    if "objective" in config:
        build_objective(**config["objective"])
    if config.get("architecture"):
        find("architecture", config["architecture"])
    for key in ("table", "model", "backbone", "supernet", "run"):
        given = config.get(key)
        for name in given if isinstance(given, list) else [given]:
            written = WRITTEN.get(config["command"]) == key
            if name and not written and not Path(name).exists():
                raise InputError(f"{key}={name}: no such file or folder; give one that is there.")


def space_for(config: Config, architecture: Architecture) -> SearchSpace:
    """Build the space of `space=`, or the one that the architecture names, at its resolution.

    Raises:
        InputError: neither is given, or it is not to be found.
    """
    return _named_space(config, architecture).at(architecture.resolution)


def _named_space(config: Config, architecture: Architecture) -> SearchSpace:
    if config.get("space"):
        return space_of(config)
    for folder in Path(config["architecture"]).absolute().parents[:3]:
        for candidate in (folder / "space.yaml", folder / "search" / "space.yaml"):
            if candidate.is_file():
                space = SearchSpace.load(candidate)
                if space.name == architecture.space:
                    return space
    if architecture.space in shipped_names("space"):
        return SearchSpace.load(architecture.space)
    named = f"'{architecture.space}', which is not shipped" if architecture.space else "no space"
    raise InputError(
        f"{config['architecture']} names {named}; expected space=NAME or space=PATH as well."
    )


def data_for(config: Config, space: SearchSpace | None = None) -> Data:
    """Load the data of `data=`, checked against the space, or that of all `heads=` as one.

    The images of heads are brought to the space's resolution and channels.
    """
    if not config.get("heads"):
        return _load(config["data"], space)
    brought: dict[str, Any] = {"resize": True}
    if space is not None:
        brought |= {"resolution": space.resolution, "channels": space.input_channels}
    parts = {}
    for name, options in config["heads"].items():
        try:
            parts[name] = _load({**options, **brought}, space)
        except InputError as error:
            raise InputError(f"heads.{name}: {error}") from error
    return join_data(parts)


def _load(options: Mapping[str, Any], space: SearchSpace | None) -> Data:
    known = [name for name in signature(load_data).parameters if name != "space"]
    check_known("option of data:", options, known)
    return load_data(**options, space=space)


def check_target_ms(target_ms: float | None) -> None:
    """Refuse a budget that is none; None stands for no budget.

    Raises:
        InputError: it is not positive.
    """
    if target_ms is not None and not target_ms > 0:
        raise InputError(f"target_ms={target_ms}; expected a positive number of milliseconds.")


def check_fraction(fraction: float) -> None:
    """Refuse a target_fraction that lies not between the fastest and the slowest network.

    Raises:
        InputError: it is not between 0 and 1.
    """
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not number or not 0 < fraction < 1:
        raise InputError(f"target_fraction={fraction!r}; expected a number between 0 and 1.")


def device_of(config: Config) -> AnyDevice:
    """Build the device of `device=`."""
    return device_from(dict(config["device"]))


def card_for(space: SearchSpace, architecture: Architecture, data: Data) -> NetworkCard:
    """Say what a network's files say about it."""
    return NetworkCard(space, architecture, data.class_names, data.mean, data.std, data.heads)


def network_folder(model: str | Path, option: str = "model") -> Path:
    """Return the folder that holds a network's files, given it, a file in it, or a run.

    Args:
        option: by which it was given, for the error.

    Raises:
        InputError: there is no network.
    """
    path = Path(model)
    if path.is_file() and path.name in ("network.yaml", "weights.safetensors", "weights.packed"):
        path = path.parent
    if (path / "network.yaml").is_file():
        return path
    if (path / "result.json").is_file():
        chosen = read_json(path / "result.json").get("network")
        if chosen and (path / chosen / "network.yaml").is_file():
            return path / chosen
    raise InputError(
        f"{option}={model}: no network there; expected the folder of fbnas train, compress or run "
        "(network.yaml, and weights.safetensors or weights.packed)."
    )


def with_heads(config: Config, heads: Heads, place: Path) -> dict[str, Any]:
    """Return the configuration with the data of each of a network's heads, in their order.

    It is that of `heads=`, or else what the network was trained on. Without heads all stays.

    Args:
        place: the folder of the network, or of its file, with the config.yaml of what made it.

    Raises:
        InputError: data of other heads, of one head alone where there are several, or none known.
    """
    given = config.get("heads")
    if not heads:
        if given:
            raise InputError(
                f"heads={', '.join(given)}, and {config['model']} has one head; expected data=..."
            )
        return dict(config)
    names = ", ".join(heads)
    if not given and config.get("data") not in (None, _data_by_default(config["command"])):
        raise InputError(
            f"data= is of one data set and {config['model']} has the heads {names}; expected "
            "heads={...} with the data of each, or neither: then that of the training is taken."
        )
    given = given or _recorded_heads(place)
    if set(given) != set(heads):
        known = f"heads={', '.join(given)}" if given else f"{place / 'config.yaml'} names no data"
        raise InputError(
            f"{known}, and {config['model']} has the heads {names}; expected heads={{...}} with a "
            "data set for each of them, as a name, a YAML file or its options."
        )
    return {**config, "heads": {name: given[name] for name in heads}, "data": None}


def _data_by_default(command: str) -> dict[str, Any] | None:
    defaults = read_yaml(configs_folder() / f"{command}.yaml")["defaults"]
    name = next(entry["data"] for entry in defaults if "data" in entry)
    return read_yaml(configs_folder() / "data" / f"{name}.yaml") if name else None


def _recorded_heads(place: Path) -> dict[str, Any]:
    """Return the data of each head as the command that wrote into a folder was given it."""
    path = place / "config.yaml"
    heads = (read_yaml(path) if path.is_file() else {}).get("heads") or {}
    return {
        name: given if isinstance(given, Mapping) else recorded_data(given)
        for name, given in heads.items()
    }


def recorded_data(folder: str | Path) -> dict[str, Any]:
    """Return the options of the data that the network in a folder was trained on.

    Raises:
        InputError: none are written there.
    """
    network = network_folder(folder)
    for path in (network / "config.yaml", network.parent / "config.yaml"):  # the latter of a run
        data = read_yaml(path).get("data") if path.is_file() else None
        if data:
            return dict(data)
    raise InputError(
        f"{network}: no config.yaml that states the data; expected the folder of fbnas train, "
        "compress or run."
    )


def with_heads_of_file(config: Config, model: Path) -> dict[str, Any]:
    """Do the same for a model file, which states its heads itself."""
    return with_heads(config, read_metadata(model).get("heads") or {}, model.parent)


def data_of(config: Config, card: NetworkCard) -> Data:
    """Load the data of a trained network, with the mean and std that it was trained with.

    Raises:
        InputError: data of other classes.
    """
    data = data_for(config, card.space)
    check_class_names(data, card.class_names, card.heads)
    return replace(data, mean=card.mean, std=card.std)


def check_class_names(data: Data, names: tuple[str, ...], heads: Heads | None = None) -> None:
    """Refuse data whose classes are not `names`, or not those of these heads.

    Raises:
        InputError: what the data has and what was expected.
    """
    for name, class_names in (heads or {}).items():
        found = data.heads[name]
        if tuple(found) != tuple(class_names):
            raise InputError(
                f"the data of head {name} has {len(found)} classes ({', '.join(found[:3])}, ...), "
                f"it was trained for {len(class_names)} ({', '.join(class_names[:3])}, ...); give "
                "its data."
            )
    if tuple(data.class_names) != tuple(names):
        raise InputError(
            f"{data.name} has {data.classes} classes ({', '.join(data.class_names[:3])}, ...), the "
            f"network was trained for {len(names)} ({', '.join(names[:3])}, ...); give its data."
        )


def data_of_file(config: Config, model: Path) -> Data:
    """Load the data as a model file wants it: with the mean and std that it states.

    Of a file with several heads it is that of all, as `with_heads` has it in the configuration.

    An ONNX file that fbnas did not write states none: its input gives the size of the images, and
    the data's own mean and std are taken, which is said. Other files state them in FILE.json.

    Raises:
        InputError: not a model file, one without FILE.json, or data of other classes.
    """
    stated = read_metadata(model)
    if "preprocessing" not in stated and model.suffix != ".onnx":
        raise InputError(
            f"{sidecar(model)} is missing or says nothing of preprocessing; expected what fbnas "
            "export writes beside such a file: keep the two together, or export again."
        )
    size = stated.get("preprocessing") or input_size(model)
    shape = {key: size[key] for key in ("resolution", "channels") if key in size}
    if config["heads"]:
        data = data_for({"heads": {name: x | shape for name, x in config["heads"].items()}})
    else:
        data = data_for({"data": config["data"] | shape})
    if "preprocessing" not in stated:
        log.warning("%s states no preprocessing: taking the data's own mean and std", model)
        return data
    check_class_names(data, tuple(stated["class_names"]), stated.get("heads"))
    mean, std = (tuple(stated["preprocessing"][key]) for key in ("mean", "std"))
    return replace(data, mean=mean, std=std)


def search_folder(run: str | Path) -> Path:
    """Return the folder of a finished search, given it or a run that contains one.

    Raises:
        InputError: there is none.
    """
    path = Path(run)
    for folder in (path, path / "search"):
        if (folder / "theta.json").is_file():
            return folder
    raise InputError(f"run={run}: no theta.json there; expected the folder of a finished search.")
