"""The out folder of a command: opened with care, closed with result.json."""

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fbnas import __version__
from fbnas.commands.processes import is_first
from fbnas.errors import InputError
from fbnas.files import is_part, read_yaml, remove_parts, write_json, write_yaml

MAY_DIFFER = ("out", "overwrite", "resume", "command_line")  # between a run and its resumption
BUDGETS = ("target_ms", "target_mj", "target_mb", "max_params", "target_fraction")
INPUTS = (  # options whose files a command reads
    *("table", "model", "backbone", "architecture", "supernet", "run", "data.path"),
    *("measurements", "among", "prior", "baselines", "cross_device"),
    *("teacher", "compression.fine_tuning.teacher"),
    *("compression.lottery_ticket.rewind_to", "compression.latency_pruning.table"),
)
WRITTEN = {"profile": "table", "calibrate": "table"}  # those that a command writes


class OutFolder:
    """Where a command writes; `path` is None where the user asked for no folder."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.path = Path(config["out"]) if config.get("out") else None
        self.started = time.monotonic()
        self.resume = bool(config.get("resume", False))
        if self.path is not None and is_first():  # of several processes the first one opens it
            check_out(config)
            self._open(self.path, overwrite=bool(config.get("overwrite", False)))

    @property
    def folder(self) -> Path:
        """The folder of a command that cannot do without one."""
        if self.path is None:
            raise InputError(f"fbnas {self.config['command']} needs out=DIR to write to.")
        return self.path

    def _open(self, path: Path, *, overwrite: bool) -> None:
        if overwrite and not self.resume:
            empty(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            remove_parts(path)
            write_yaml(path / "config.yaml", dict(self.config))
        except OSError as error:
            raise InputError(
                f"out={path} cannot be written ({error.strerror}); give another folder."
            ) from error

    def finish(self, **fields: Any) -> dict[str, Any]:
        """Write result.json: the common fields, then `fields`; None is left out."""
        result = {
            "command": self.config["command"],
            "version": __version__,
            "seconds": round(time.monotonic() - self.started, 3),
            "seed": self.config.get("seed", 0),
            "command_line": self.config.get("command_line"),
            **fields,
        }
        result = {key: value for key, value in result.items() if value is not None}
        if self.path is not None:
            write_json(self.path / "result.json", result)
        return result


def check_out(config: Mapping[str, Any]) -> None:
    """Refuse an out folder that the command cannot open as asked; change nothing.

    Raises:
        InputError: it is a file or holds what is neither to be resumed nor overwritten.
    """
    path, resume = Path(config["out"]), bool(config.get("resume", False))
    if path.exists() and not path.is_dir():
        raise InputError(f"out={path} is a file; expected a folder.")
    if holds_nothing(path):
        if resume:
            raise InputError(
                f"out={path} holds nothing to resume; expected the folder of an interrupted run: "
                "leave resume=true out to start one."
            )
        return
    before = _config_before(path)
    if before is None:
        raise InputError(
            f"out={path} holds other files; expected a new or empty folder, or a run of fbnas."
        )
    if resume:
        _check_same(config, path, before)
    elif config.get("overwrite", False):
        _check_inputs(config, path)
    else:
        state = "a finished run" if (path / "result.json").is_file() else "an unfinished run"
        raise InputError(
            f"out={path} holds {state}; give another folder, resume=true to continue it where "
            "the command can, or overwrite=true to delete it."
        )


def refuse_table_inside(config: Mapping[str, Any]) -> None:
    """Refuse an out folder around the table that the command writes before it opens the folder.

    Raises:
        InputError: it lies there.
    """
    table, out = config.get(WRITTEN[config["command"]]), config.get("out")
    if table and out and Path(out).resolve() in Path(table).resolve().parents:
        raise InputError(
            f"table={table} lies in out={out}, which is for what is said of the table and opened "
            "when that is done; expected two places, or no out."
        )


def holds_nothing(path: Path) -> bool:
    """Whether no folder is there, or one with nothing but what a kill left half-written."""
    return not path.is_dir() or all(is_part(entry) for entry in path.iterdir())


def empty(path: Path) -> None:
    """Delete what a folder holds, where there is one."""
    for entry in path.iterdir() if path.is_dir() else ():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _config_before(path: Path) -> dict[str, Any] | None:
    """Return the configuration of the run that a folder holds, None where it holds none."""
    from fbnas.commands import COMMANDS

    file = path / "config.yaml"
    before = read_yaml(file) if file.is_file() else {}
    return before if before.get("command") in COMMANDS else None


def _check_same(config: Mapping[str, Any], path: Path, before: Mapping[str, Any]) -> None:
    """Refuse to continue a run as another one; of `fbnas run` the table serves any budget."""
    unsearched = config["command"] == "run" and not (path / "search").exists()
    may_differ = (*MAY_DIFFER, *(BUDGETS if unsearched else ()))
    now = {key: value for key, value in config.items() if key not in may_differ}
    for key, old, new in _differences({key: before.get(key) for key in now}, now):
        raise InputError(
            f"out={path} was begun with another {key} ({old}, now {new}); "
            "resume with the same options, or give another folder."
        )


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs, as (search.epochs, 3, 4); what one of both has not is None."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{within}{key}.")
        elif old != new:
            yield f"{within}{key}", old, new


def _check_inputs(config: Mapping[str, Any], path: Path) -> None:
    """Refuse to delete what the command is about to read."""
    given = [_option(config, key) for key in INPUTS]
    heads = (config.get("heads") or {}).values()  # folders, or the data of each
    given += [head.get("path") if isinstance(head, Mapping) else head for head in heads]
    for name in (x for value in given for x in (value if isinstance(value, list) else [value])):
        if not isinstance(name, str) or not Path(name).exists():
            continue  # none, or a word such as supernet
        if path.resolve() in (Path(name).resolve(), *Path(name).resolve().parents):
            raise InputError(
                f"overwrite=true would delete {name}, which lies in out={path}; give another "
                "out folder."
            )


def _option(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of `group.key`; None where there is no such option."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
