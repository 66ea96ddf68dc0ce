"""From a command line with several values to the jobs of a multirun, composed before one starts.

Hydra's own parser reads the values. Its sweeper and launchers are left out: they drive a program
under `@hydra.main`, which changes folders and logging and knows nothing of `result.json`.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString, Transformer

from fbnas.commands.composition import GROUPS, compose, parse, split
from fbnas.commands.folder import WRITTEN, check_out, holds_nothing
from fbnas.commands.jobs import JOBS_FILE, LOGS, Job
from fbnas.errors import InputError
from fbnas.files import read_json
from fbnas.shipped import shipped_names

LONGEST_NAME = 150  # of a folder, in bytes; file systems take 255


@dataclass(frozen=True)
class Sweep:
    """What a multirun is to do: its jobs with their configurations, where, and through what."""

    command: str
    root: Path
    jobs: tuple[Job, ...]
    configs: tuple[dict[str, Any], ...]
    launcher: dict[str, Any]
    resume: bool
    overwrite: bool

    def check(self) -> None:
        """Refuse folders that cannot be written as asked; change nothing.

        Raises:
            InputError: for the root, or for the first job that cannot start.
        """
        _check_root(self)
        for job, config in zip(self.jobs, self.configs, strict=True):
            resume = self.resume and not holds_nothing(job.folder)
            check_out({**config, "resume": resume, "overwrite": self.overwrite})


def plan(command: str, overrides: Sequence[str]) -> Sweep:
    """Compose every job of a multirun; the last key varies fastest.

    Raises:
        InputError: nothing is swept, there is no one folder for all, two jobs would write to the
            same place, or the options of one are wrong.
    """
    rest, launcher, flags = [], [], {"resume": False, "overwrite": False}
    for override in overrides:
        key, value = split(override)
        if key in flags:
            flags[key] = _flag(key, value)
        elif key.lstrip("+").partition(".")[0] == "launcher":
            launcher.append(_unswept(override, "one launcher starts all jobs"))
        else:
            rest.append(override)
    choices = _choices(command, rest)
    first = compose(command, [*(c[0].override for c in choices), *launcher])
    root = _root(command, first, rest)
    rest_of = [c for c in choices if c[0].key != "out"]
    jobs, configs = [], []
    for chosen in itertools.product(*rest_of):
        swept = tuple(value.shown for value in chosen if value.shown)
        name = folder_name(swept)
        own = (*(value.override for value in chosen), _out(root / name))
        config = compose(command, own)
        config.pop("launcher")
        log = root / LOGS / f"{name}.log"
        job = Job(name, command, own, swept, root / name, log, "resume" in config)
        jobs.append(job)
        configs.append(config)
    _check_apart(command, jobs, configs)
    return Sweep(command, root, tuple(jobs), tuple(configs), first["launcher"], **flags)


@dataclass(frozen=True)
class _Value:
    """One value of a key: as Hydra is to read it, and as a person does where it is one of many."""

    key: str
    override: str
    shown: str = ""


def _choices(command: str, overrides: Sequence[str]) -> list[list[_Value]]:
    """Return the values of each override, one or many."""
    found = [_values(command, override) for override in overrides]
    swept = [values[0].key for values in found if values[0].shown]
    if not swept:
        raise InputError(
            "-m runs once for each of several values, and every key has one; expected as in "
            f"fbnas {command} -m seed=1,2,3 or seed=range(1,4); or leave -m out."
        )
    for key, times in Counter(values[0].key for values in found).items():
        if times > 1 and key in swept:
            raise InputError(f"{key} is given {times} times; expected all its values in one.")
    return found


def _values(command: str, override: str) -> list[_Value]:
    key, value = split(override)
    parsed = parse(override)
    if parsed is None and not Path(value).exists():
        raise InputError(
            f"'{override}' is not understood; expected key=1,2,3 or key=range(1,4) or "
            "key=choice(1,2,3), each value quoted where it holds other signs."
        )
    if parsed is None or not parsed.is_sweep_override():
        return [_Value(key.lstrip("+"), override)]
    if key.lstrip("+") == "out":
        raise InputError(
            f"'{override}' is several folders; expected one: each job gets its own inside it."
        )
    values = []
    for element in _elements(parsed, override):
        text = element.text if isinstance(element, QuotedString) else element
        text = text if isinstance(text, str) else Transformer.str(text)
        # names of groups and paths are taken as they are, other values as Hydra quotes them
        value = text if key in (*GROUPS, "architecture") else Transformer.str(element)
        values.append(_Value(key.lstrip("+"), f"{key}={value}", f"{key.lstrip('+')}={text}"))
    if not values:
        raise InputError(f"'{override}' holds no value; expected at least one.")
    return values


def _elements(parsed: Override, override: str) -> list[Any]:
    if not parsed.is_discrete_sweep():
        raise InputError(
            f"'{override}' has no end of values; expected a,b or range(1,4) or choice(a,b)."
        )
    glob = parsed.value()
    if not isinstance(glob, Glob):
        return list(parsed.sweep_iterator())
    return glob.filter(shipped_names(parsed.key_or_group))


def _unswept(override: str, why: str) -> str:
    parsed = parse(override)
    if parsed is not None and parsed.is_sweep_override():
        raise InputError(f"'{override}' is several values; expected one: {why}.")
    return override


def _flag(key: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise InputError(f"{key}={value!r}; expected true or false.")
    return value == "true"


def _root(command: str, config: Mapping[str, Any], overrides: Sequence[str]) -> Path:
    if not config["out"]:
        raise InputError(
            f"fbnas {command} -m needs out=DIR: each job gets a folder of its own inside it."
        )
    for override in overrides:
        if override.lstrip("+").startswith("out=") and "${" in override:
            raise InputError(f"'{override}' varies; expected one folder, for a folder per job.")
    return Path(config["out"])


def _out(folder: Path) -> str:
    override = f"out={folder}"
    parsed = parse(override)
    if parsed is not None and not parsed.is_sweep_override() and parsed.value() == str(folder):
        return override
    return f"out={QuotedString(str(folder), Quote.single).with_quotes()}"


def folder_name(swept: Sequence[str]) -> str:
    """Return a folder's name for the swept overrides, which a command line takes without quotes.

    Joined by `+`: a comma would make two values of the path.
    """
    parts = [re.sub(r"[^\w.=-]+", "_", override) for override in swept]
    name = "+".join(part.rstrip("_").replace("=_", "=") for part in parts)
    if len(name.encode()) <= LONGEST_NAME:
        return name
    mark = hashlib.sha256(" ".join(swept).encode()).hexdigest()[:8]
    return f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}-{mark}"


def _check_apart(command: str, jobs: Sequence[Job], configs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse two jobs in one folder, or that write one file."""
    seen: dict[str, Job] = {}
    for job in jobs:
        other = seen.setdefault(job.name.lower(), job)  # some file systems know no case
        if other is not job:
            raise InputError(
                f"{' '.join(other.swept)} and {' '.join(job.swept)} would both write to "
                f"{job.folder}; expected values that give folders of different names."
            )
    key = WRITTEN.get(command)
    files = [config[key] for config in configs if key and config[key] and not config.get("plan")]
    if len(set(files)) < len(files):
        shared = Counter(files).most_common(1)[0][0]
        swept = jobs[0].swept[0].partition("=")[0]
        raise InputError(
            f"several jobs would write {key}={shared}; expected a file for each, as in "
            f"'{key}=mine_${{{swept}}}.csv'."
        )


def _check_root(sweep: Sweep) -> None:
    root, file = sweep.root, sweep.root / JOBS_FILE
    if root.exists() and not root.is_dir():
        raise InputError(f"out={root} is a file; expected a folder, for a folder per job.")
    if file.is_file():
        before = read_json(file).get("command")
        if before != sweep.command:
            raise InputError(f"out={root} holds jobs of fbnas {before}; give another folder.")
        if not sweep.resume and not sweep.overwrite:
            raise InputError(
                f"out={root} holds a multirun; give another folder, resume=true to keep its "
                "finished jobs and continue the others, or overwrite=true to do all again."
            )
    elif not holds_nothing(root):
        raise InputError(
            f"out={root} holds no multirun but other files; expected a new or empty folder."
        )
    elif sweep.resume:
        raise InputError(
            f"out={root} holds no multirun to resume; leave resume=true out to start one."
        )
