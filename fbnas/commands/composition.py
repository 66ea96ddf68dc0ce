"""From a command line to a resolved mapping, through Hydra; and what --help prints.

Every group takes a shipped name or the path of a YAML file: files of the user's own are laid into
a temporary folder on Hydra's search path, so that they compose like shipped ones.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fbnas.commands.values import check_values
from fbnas.errors import InputError, closest
from fbnas.files import read_yaml
from fbnas.shipped import configs_folder, find, looks_like_path, shipped_names

GROUPS = (
    "space",
    "data",
    "device",
    "search",
    "objective",
    "training",
    "compression",
    "fabric",
    "experiment",
    "launcher",
)
NO_PATH = re.compile(r"[\[{'\"]|(choice|range|interval|glob)\(")  # but a list, a quote, a sweep
OPTIONAL_IN_SPACE = {"input_channels": 3, "skip_on_reduction": True, "modules": []}


def compose(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved configuration of a command.

    Raises:
        InputError: an override that is no `key=value`, an unknown key or name (with the closest),
            or a value that is required and missing.
    """
    groups, values = groups_of(command), {}
    for override in overrides:
        _refuse_sweep(command, override)
    with tempfile.TemporaryDirectory() as folder:
        staged = []
        for override in overrides:
            key, value = split(override)
            if key == "architecture":  # Hydra would take the folder of shipped ones for a group
                values[key] = value
            elif key in groups and value != "null":
                staged.append(f"{key}={_stage(command, key, value, Path(folder))}")
            else:
                staged.append(_escaped(override))
        search_path = f"hydra.searchpath=[file://{folder}]"
        try:
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(configs_folder().absolute()), version_base="1.3"):
                config = hydra_compose(command, [*staged, search_path])
            for key, value in values.items():
                config[key] = value
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(_explain(error, command, overrides)) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(
            f"fbnas {command} needs {missing[0]}=...; "
            f"{_comment(command, missing[0], overrides)}See: fbnas {command} --help"
        )
    try:
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{str(error).splitlines()[0]}; mend the override.") from error
    assert isinstance(resolved, dict)
    given = {str(key): value for key, value in resolved.items()}
    checked = check_values(command, given, shipped=_shipped_values(command), groups=GROUPS)
    if checked.get("heads") and not (command == "export" and checked["model"] is None):
        _refuse_data_beside_heads(overrides)
        checked |= {"heads": _data_of_heads(command, checked["heads"]), "data": None}
    here = {key: value if key == "device" else _at_home(value) for key, value in checked.items()}
    return {"command": command, **here}


def _at_home(value: Any) -> Any:
    """Write out the `~/` of paths, which a shell does in out=~/a, but not in data.path=~/a.

    Not for devices, whose paths may be those of another machine.
    """
    if isinstance(value, dict):
        return {key: _at_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    if isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    return value


def _refuse_data_beside_heads(overrides: Sequence[str]) -> None:
    for override in overrides:
        if split(override)[0].lstrip("+").partition(".")[0] == "data":
            raise InputError(
                f"'{override}' is of one data set and heads= gives one to each head; expected its "
                "options there: heads={a: {source: image_folder, path: photos}, b: digits}."
            )


def _data_of_heads(command: str, heads: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return what `data` would be for each head, given as a shipped name, a path or its options.

    Raises:
        InputError: fewer than two heads, or one with neither.
    """
    from fbnas.space.heads import check_head_names  # brings torch: help and refusals do without

    names = [str(name) for name in heads]
    check_head_names(names)
    return {
        name: _data_of_head(command, name, given)
        for name, given in zip(names, heads.values(), strict=True)
    }


def _data_of_head(command: str, name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        given = read_yaml(find("data", str(given)))
    options = {str(key): value for key, value in given.items()}
    data = {"data": _filled(options, _base(command, "data", options))}
    try:
        checked = check_values(command, data, shipped=_shipped_values(command), groups=GROUPS)[
            "data"
        ]
    except InputError as error:
        raise InputError(f"heads.{name}: {error}") from error
    if checked.get("path") == "???":
        raise InputError(
            f"heads.{name} has no path; expected the YAML file of your data, or its options: "
            f"heads={{{name}: {{source: {checked['source']}, path: FOLDER}}, ...}}."
        )
    return dict(checked)


def compose_single(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of a run by itself, which no launcher starts.

    Raises:
        InputError: as `compose` does, or a launcher is asked for.
    """
    for override in overrides:
        if split(override)[0].lstrip("+").partition(".")[0] == "launcher":
            raise InputError(
                f"'{override}' is about where several runs go; expected -m and a key with several "
                f"values, as in fbnas {command} -m seed=1,2,3 {override}; or leave it out."
            )
    config = compose(command, overrides)
    config.pop("launcher", None)
    return config


def parse(override: str) -> Override | None:
    """Return what Hydra reads in an override, None where it reads nothing."""
    try:
        return OverridesParser.create().parse_override(_escaped(override))
    except HydraException:
        return None


def _escaped(override: str) -> str:
    """Return an override as Hydra reads it, with what it cannot read of a plain value quoted.

    So a path may hold any sign: ~/photos, Photos (2), Fotos_äöü, runs/a/seed=1. A comma is one of a
    path where that is there.
    """
    key, _, value = override.partition("=")
    if NO_PATH.match(value):
        return f"{key}={_marked(value)}" if "=" in override else override
    if "," in value and not _is_there(value):
        return f"{key}={_marked(value)}"
    if "," in value or not _is_read(f"{key}={_marked(value)}"):
        return f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    return f"{key}={_marked(value)}"


def _marked(value: str) -> str:
    """Return a value with `=` written as Hydra wants it."""
    return value if any(mark in value for mark in "\\'\"") else value.replace("=", r"\=")


def _is_read(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a name
        return False


def _refuse_sweep(command: str, override: str) -> None:
    """Refuse several values in one run; a name of a group may be a path with a comma."""
    key, _, value = override.partition("=")
    several = any(mark in value for mark in ",(") and key not in (*GROUPS, "architecture")
    found = parse(override) if several else None
    if found is not None and found.is_sweep_override():
        raise InputError(
            f"'{override}' is several values; expected one, [a,b] for a list, or -m for a run with "
            f"each: fbnas {command} -m {override}"
        )


def groups_of(command: str) -> list[str]:
    """Return the groups of configs that a command composes."""
    defaults = read_yaml(configs_folder() / f"{command}.yaml").get("defaults", [])
    return [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]


def split(override: str) -> tuple[str, str]:
    """Return key and value of an override of the right form."""
    key, equals, value = override.partition("=")
    if override.startswith("-"):
        raise InputError(f"'{override}' is no option; expected key=value, for example seed=1.")
    if not equals or not key or key.startswith("hydra."):
        raise InputError(f"'{override}' is not understood; expected key=value, for example seed=1.")
    return key, value


def _stage(command: str, group: str, value: str, folder: Path) -> str:
    """Return a name that Hydra finds: a shipped one, or that of a copy of the user's file."""
    if looks_like_path(value) or (value not in shipped_names(group) and Path(value).is_file()):
        return _copy(command, group, Path(value).expanduser(), folder)
    if value not in shipped_names(group):
        guess = f"{value}.yaml" if _is_there(f"{value}.yaml") else None
        guess = guess or closest(value, shipped_names(group))
        hint = f"Did you mean '{guess}'? " if guess else ""
        raise InputError(
            f"Unknown {group} '{value}'. {hint}Shipped: {', '.join(shipped_names(group))}; or give "
            f"the path of a YAML file{_way_out(group, value)}."
        )
    return value


def _way_out(group: str, value: str) -> str:
    """Say how to name images or a host where data= or device= names them itself."""
    if group == "device" and "@" in value:
        return f"; to reach {value}: device=ssh device.host={value}"
    if group != "data" or not _is_there(value):
        return ""
    source = "image_folder" if Path(value).is_dir() else "huggingface"
    return f"; to read {value}: data={source} data.path={value}"


def _copy(command: str, group: str, path: Path, folder: Path) -> str:
    if not path.is_file():
        raise InputError(
            f"{path}: no such {group} file; expected a YAML file or one of the shipped names: "
            f"{', '.join(shipped_names(group))}{_way_out(group, str(path))}."
        )
    content = read_yaml(path)
    if group == "space":
        modules = content.get("modules") or []
        if isinstance(modules, list):  # else the space refuses it
            content["modules"] = [str((path.parent / str(x)).absolute()) for x in modules]
        content = {"name": path.stem, **OPTIONAL_IN_SPACE, **content}
    elif "defaults" not in content:
        content = _filled(content, _base(command, group, content))
    (folder / group).mkdir(parents=True, exist_ok=True)
    (folder / group / "own.yaml").write_text(_header(path) + yaml.safe_dump(content))
    return "own"


def _base(command: str, group: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shipped file whose values hold where the user's states none."""
    if group == "device" and "host" in content:
        content = {"kind": "ssh", **content}
    files = [configs_folder() / group / f"{name}.yaml" for name in shipped_names(group)]
    for key in ("kind", "source", "name"):  # of devices, data and objectives: of the same kind
        for file in files:
            if key in content and read_yaml(file).get(key) == content[key]:
                return read_yaml(file)
    default = dict(_defaults(command)).get(group)
    return read_yaml(configs_folder() / group / f"{default}.yaml") if default else {}


def _filled(content: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**base, **content}
    for key, value in base.items():
        if isinstance(value, dict) and isinstance(filled[key], dict):
            filled[key] = _filled(filled[key], value)
    return filled


def _header(path: Path) -> str:
    """Return Hydra's `# @package` line of a file, which a YAML reader drops."""
    return "".join(f"{x}\n" for x in path.read_text().splitlines() if x.startswith("# @package"))


def _explain(error: Exception, command: str, overrides: Sequence[str]) -> str:
    """Word Hydra's complaint in one line, with the closest known key."""
    text = " ".join(str(error).split())
    known = list(_keys(command))
    given = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        if parse(override) is None:
            return (
                f"'{override}' is not understood; expected key=value with a YAML value; one that "
                "begins like a list but is none goes into quotes of its own: \"key='[a'\"."
            )
        key = override.partition("=")[0].lstrip("+~")
        if key.startswith("space.") and "space" in known and "space" not in given:
            return f"'{override}' changes no space; expected space=NAME or space=PATH beside it."
        if key in known and "{" not in override and f"Could not override '{key}'" in text:
            file = _chosen(command, key, overrides)
            return f"'{override}': {file} has no such option; leave it out, or choose another file."
        if key not in known and re.search(rf"\b{re.escape(key.split('.')[-1])}\b", text):
            guess, others = closest(key, known), ", ".join(_commands_with(key))
            hint = f" Did you mean '{guess}'?" if guess else ""
            hint = f" It is one of fbnas {others}." if others else hint
            return f"fbnas {command} has no option '{key}'.{hint} See: fbnas {command} --help"
    return f"{text} (fbnas {command} --help)"


def _commands_with(key: str) -> list[str]:
    """Return the commands whose own file states an option."""
    files = sorted(configs_folder().glob("*.yaml"))
    return [file.stem for file in files if key != "defaults" and key in read_yaml(file)]


def _chosen(command: str, key: str, overrides: Sequence[str]) -> str:
    """Return GROUP=NAME of the file that a key is looked for in."""
    group = key.partition(".")[0]
    given = dict(split(override) for override in overrides)
    return f"{group}={given.get(group, dict(_defaults(command)).get(group))}"


def _keys(command: str) -> Iterator[str]:
    """All keys that a command knows: its own, and those of every file of its groups."""
    yield from (key for key, _ in _shipped_values(command))
    yield from groups_of(command)


@cache  # a quarter of what composing takes
def _shipped_values(command: str) -> tuple[tuple[str, Any], ...]:
    """Every key of a command with a value that it has in a shipped file."""
    return tuple(_read_shipped_values(command))


def _read_shipped_values(command: str) -> Iterator[tuple[str, Any]]:
    own = read_yaml(configs_folder() / f"{command}.yaml")
    yield from ((key, value) for key, value in own.items() if key != "defaults")
    for group in set(groups_of(command)) - {"experiment"}:
        for name in shipped_names(group):
            content = read_yaml(configs_folder() / group / f"{name}.yaml")
            content.pop("defaults", None)
            yield from _flat(content, f"{group}.")


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def _comment(command: str, key: str, overrides: Sequence[str]) -> str:
    """Return what the config says of a required key, as a sentence."""
    group, _, name = key.rpartition(".")
    file = configs_folder() / f"{command}.yaml"
    if group:
        chosen = dict(split(override) for override in overrides).get(group, "")
        file = configs_folder() / group / f"{chosen}.yaml"
    for line in file.read_text().splitlines() if file.is_file() else []:
        found = re.match(rf"{re.escape(name)}:[^#]*#\s*(.*)", line)
        if found:
            return f"{found.group(1)}. "
    return ""


def describe(command: str, overrides: Sequence[str] = ()) -> str:
    """Return what `fbnas COMMAND --help` prints: the command's own config, explained by itself.

    Args:
        overrides: those that choose a file of a group have it explained instead of the default's.

    Raises:
        InputError: an override that is no `key=value`, or no such file.
    """
    own = configs_folder() / f"{command}.yaml"
    head = [line[2:] for line in own.read_text().splitlines() if line[:1] == "#"]
    text = [*head, "", *_multirun_lines(command), "", "Options (key=value), with their defaults:"]
    text += [f"  {line}" for line in _option_lines(own)]
    groups = groups_of(command)
    if groups:
        text += [
            "",
            "Groups (GROUP=NAME, or GROUP=PATH of a YAML file; GROUP.KEY=VALUE), below with the",
            f"options of their defaults; those of others: fbnas {command} GROUP=NAME --help",
        ]
    for group in groups:
        text.append(f"  {group}={' | '.join(shipped_names(group))}")
    given = dict(split(override) for override in overrides)
    chosen = dict(_defaults(command)) | {key: given[key] for key in groups if key in given}
    for group, name in chosen.items():
        file = find(group, name)
        text += ["", f"{group}={name}:", *(f"  {line}" for line in _opening(file))]
        prefix = "" if group == "experiment" else f"{group}."
        text += [f"  {prefix}{line}" for line in _option_lines(file)]
    return "\n".join(text)


def _opening(file: Path) -> Iterator[str]:
    """The comment that a config opens with."""
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            return
        if not line.startswith("# @package"):
            yield line


def _multirun_lines(command: str) -> list[str]:
    return [
        f"Several runs (-m or --multirun): fbnas {command} -m key=a,b runs once for each value, in",
        "out/key=a and out/key=b. Values: a,b or range(1,4) or choice(a,b), quoted for the shell;",
        "[a,b] is one; several keys: their product. All are checked before the first starts, and",
        "one that fails stops no other. A table of what they came to ends it (out/multirun.json).",
        "Exit code: the worst, 1 before 2 before 3. resume=true keeps finished jobs and continues",
        "the others. launcher= says where they go.",
    ]


def _option_lines(file: Path) -> Iterator[str]:
    """The lines of a config that state a value, with the whole key: `pruning.ratio: 0.25  # ...`"""
    parent = ""
    for line in file.read_text().splitlines():
        found = re.match(r"( *)([a-z_]+):(.*)", line)
        if not found or found.group(2) == "defaults":
            continue
        indent, key, rest = found.groups()
        if not indent:
            parent = f"{key}."
        if rest.split("#")[0].strip():
            yield f"{parent if indent else ''}{key}:{rest.replace('???', '(required)')}"


def _defaults(command: str) -> Iterator[tuple[str, str]]:
    for entry in read_yaml(configs_folder() / f"{command}.yaml").get("defaults", []):
        if isinstance(entry, dict):
            group, name = next(iter(entry.items()))
            if name is not None:
                yield group, name
