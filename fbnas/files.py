"""Reading and writing the files that flow between commands; every write is atomic.

Torch is imported only by the checkpoint functions, so that the report reads a run without it.
"""

import contextlib
import io
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

from fbnas.errors import InputError

CHECKPOINT_VERSION = 1
PART = ".part"  # ends the names of files that are being written


def write_through(path: Path | str, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it, then rename it over `path`.

    A crash, a kill or a full disk leaves the previous file untouched. A kill leaves the temporary
    file too: `remove_parts` takes it away.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def is_part(path: Path) -> bool:
    """Whether a file is one that `write_through` had not finished."""
    return path.name.startswith(".") and path.name.endswith(PART)


def remove_parts(folder: Path) -> None:
    """Delete what killed writers left in a folder and those below; nobody may be writing there."""
    for path in folder.rglob(f".*{PART}"):
        path.unlink(missing_ok=True)


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Replace `path` by `data` in one step."""
    content = data.encode() if isinstance(data, str) else data
    write_through(path, lambda file: file.write(content))


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: no such file, not YAML (with the line), or not a mapping.
    """
    try:
        content = yaml.safe_load(_read_text(Path(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(f"{path}{line}: {problem}; expected YAML. Mend that line.") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise InputError(f"{path}: expected `key: value` lines, found {found}.")
    return content


def write_yaml(path: Path | str, content: dict[str, Any]) -> None:
    """Write a YAML mapping, keys in the given order."""
    atomic_write(path, yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True))


def read_json(path: Path | str) -> Any:
    """Read JSON.

    Raises:
        InputError: no such file, or not JSON (with the line).
    """
    try:
        return json.loads(_read_text(Path(path)))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: {error.msg}; expected JSON. "
            "The file is truncated or edited: write it again with the command that made it."
        ) from error


def write_json(path: Path | str, content: Any) -> None:
    """Write JSON, keys in the given order, two spaces of indent."""
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def append_jsonl(path: Path | str, row: dict[str, Any]) -> None:
    """Append one JSON object as a line, and see that it is on the disk."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Read JSON lines; a last line cut off by a kill is left out.

    Raises:
        InputError: no such file, or a line before the last that is not JSON.
    """
    lines = _read_text(Path(path)).splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}, line {number}: {error.msg}; expected JSON.") from error
    return rows


def save_checkpoint(path: Path | str, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values; the previous one survives any failure.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    import torch

    buffer = io.BytesIO()  # torch would hide a full disk's OSError behind a RuntimeError
    torch.save({"version": CHECKPOINT_VERSION, "state": state}, buffer)
    write_through(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`.

    Raises:
        InputError: missing, damaged, or of another version.
    """
    import torch

    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; expected one to resume from.")
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()  # torch.load itself compares no checksum
            if changed is not None:
                raise zipfile.BadZipFile(f"{changed} was changed")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise _damaged(path, str(error)) from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != CHECKPOINT_VERSION:
        raise InputError(
            f"{path}: checkpoint version {version}; this fbnas reads version {CHECKPOINT_VERSION}. "
            "Start again with overwrite=true."
        )
    if "state" not in content:
        raise _damaged(path, "it holds no state")
    return content["state"]


def _damaged(path: Path | str, reason: str) -> InputError:
    reason = " ".join(reason.split())[:80]
    return InputError(
        f"{path}: the checkpoint is damaged ({reason}); expected a file written by fbnas. Delete "
        "it, or start again with overwrite=true."
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; expected a file.") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file.") from None
