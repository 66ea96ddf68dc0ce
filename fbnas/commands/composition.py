"""From a command line to a resolved mapping, through Hydra; and what --help prints.

Every group takes a shipped name or the path of a YAML file: files of the user's own are laid into
a temporary folder on Hydra's search path, so that they compose like shipped ones.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fbnas.errors import InputError, closest
from fbnas.files import read_yaml
from fbnas.shipped import configs_folder, looks_like_path, shipped_names


def compose(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved configuration of a command.

    Raises:
        InputError: an override that is no `key=value`, an unknown key or name (with the closest),
            or a value that is required and missing.
    """
    groups = groups_of(command)
    with tempfile.TemporaryDirectory() as folder:
        staged = [_stage(override, groups, Path(folder)) for override in overrides]
        search_path = f"hydra.searchpath=[file://{folder}]"
        try:
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(configs_folder().absolute()), version_base="1.3"):
                config = hydra_compose(command, [*staged, search_path])
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(_explain(error, command, overrides)) from error
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise InputError(
                f"fbnas {command} needs {missing[0]}=...; {_comment(command, missing[0])}"
                f"See: fbnas {command} --help"
            )
        try:
            resolved = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException as error:
            raise InputError(f"{str(error).splitlines()[0]}; mend the override.") from error
    assert isinstance(resolved, dict)
    return {"command": command, **{str(key): value for key, value in resolved.items()}}


def groups_of(command: str) -> list[str]:
    """Return the groups of configs that a command composes."""
    defaults = read_yaml(configs_folder() / f"{command}.yaml").get("defaults", [])
    return [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]


def _stage(override: str, groups: Sequence[str], folder: Path) -> str:
    """Check one override's form; lay a file of the user's own where Hydra finds it."""
    key, equals, value = override.partition("=")
    if override.startswith("-"):
        raise InputError(f"'{override}' is no option; expected key=value, for example seed=1.")
    if not equals or not key:
        raise InputError(f"'{override}' is not understood; expected key=value, for example seed=1.")
    if key not in groups or value == "null":
        return override
    if looks_like_path(value):
        return f"{key}={_copy(key, Path(value).expanduser(), folder)}"
    if value not in shipped_names(key):
        if Path(value).is_file():
            return f"{key}={_copy(key, Path(value), folder)}"
        guess = closest(value, shipped_names(key))
        hint = f"Did you mean '{guess}'? " if guess else ""
        raise InputError(
            f"Unknown {key} '{value}'. {hint}Shipped: {', '.join(shipped_names(key))}; or give the "
            "path of a YAML file."
        )
    return override


def _copy(group: str, path: Path, folder: Path) -> str:
    if not path.is_file():
        raise InputError(
            f"{path}: no such {group} file; expected a YAML file or one of the shipped names: "
            f"{', '.join(shipped_names(group))}."
        )
    content = read_yaml(path)
    if group == "space":
        content.setdefault("name", path.stem)
        modules = content.get("modules") or []
        content["modules"] = [str((path.parent / module).absolute()) for module in modules]
    name = f"own_{path.stem}"
    (folder / group).mkdir(parents=True, exist_ok=True)
    (folder / group / f"{name}.yaml").write_text(_header(path) + yaml.safe_dump(content))
    return name


def _header(path: Path) -> str:
    """Return Hydra's `# @package` line of a file, which a YAML reader drops."""
    return "".join(f"{x}\n" for x in path.read_text().splitlines() if x.startswith("# @package"))


def _explain(error: Exception, command: str, overrides: Sequence[str]) -> str:
    """Word Hydra's complaint in one line, with the closest known key."""
    text = " ".join(str(error).split())
    known = list(_keys(command))
    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException:
            return f"'{override}' is not understood; expected key=value with a YAML value, quoted."
        key = override.partition("=")[0].lstrip("+~")
        if key not in known and re.search(rf"\b{re.escape(key.split('.')[-1])}\b", text):
            guess = closest(key, known)
            hint = f" Did you mean '{guess}'?" if guess else ""
            return f"fbnas {command} has no option '{key}'.{hint} See: fbnas {command} --help"
    return f"{text} (fbnas {command} --help)"


def _keys(command: str) -> Iterator[str]:
    """All keys that a command knows: its own, and those of every file of its groups."""
    own = read_yaml(configs_folder() / f"{command}.yaml")
    yield from (key for key in own if key != "defaults")
    for group in groups_of(command):
        yield group
        for name in shipped_names(group):
            content = OmegaConf.create(read_yaml(configs_folder() / group / f"{name}.yaml"))
            assert isinstance(content, DictConfig)
            yield from (f"{group}.{key}" for key in _flat(content) if group != "experiment")


def _flat(content: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield f"{prefix}{key!s}"
        if isinstance(value, DictConfig):
            yield from _flat(value, f"{prefix}{key!s}.")


def _comment(command: str, key: str) -> str:
    """Return what the config says of a key, as a sentence."""
    group, _, name = key.rpartition(".")
    files = [configs_folder() / f"{command}.yaml"]
    files += [configs_folder() / group / f"{n}.yaml" for n in shipped_names(group)] if group else []
    for file in files:
        for line in file.read_text().splitlines():
            found = re.match(rf"{re.escape(name)}:[^#]*#\s*(.*)", line)
            if found and "???" in line:
                return f"{found.group(1)}. "
    return ""


def describe(command: str) -> str:
    """Return what `fbnas COMMAND --help` prints: the command's own config, explained by itself."""
    lines = (configs_folder() / f"{command}.yaml").read_text().splitlines()
    head = [
        line.lstrip("# ").rstrip() if line == "#" else line[2:] for line in lines if line[:1] == "#"
    ]
    options = [x for x in lines if re.match(r"[a-z_]+:", x) and not x.startswith("defaults:")]
    text = [*head, "", "Options (key=value), with their defaults:"]
    text += [f"  {line.replace('???', '(required)')}" for line in options]
    groups = groups_of(command)
    if groups:
        text += ["", "Groups (GROUP=NAME, or GROUP=PATH of a YAML file; GROUP.KEY=VALUE):"]
    for group in groups:
        text.append(f"  {group}={' | '.join(shipped_names(group))}")
    for group, name in _defaults(command):
        file = (configs_folder() / group / f"{name}.yaml").read_text().splitlines()
        text += ["", f"{group}={name}:"]
        text += [f"  {group}.{line}" for line in file if re.match(r"[a-z_]+:", line)]
    return "\n".join(text)


def _defaults(command: str) -> Iterator[tuple[str, str]]:
    for entry in read_yaml(configs_folder() / f"{command}.yaml").get("defaults", []):
        if isinstance(entry, dict):
            group, name = next(iter(entry.items()))
            if name is not None:
                yield group, name
