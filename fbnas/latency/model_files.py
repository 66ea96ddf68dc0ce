"""A model is a file; OpenVINO's IR is two, an .xml with the graph and a .bin with the weights."""

import hashlib
from pathlib import Path


def parts(path: Path | str) -> list[Path]:
    """Return the files that a model consists of; the one that names it is the first."""
    path = Path(path)
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def size_bytes(path: Path | str) -> int:
    """Return the size of all parts."""
    return sum(part.stat().st_size for part in parts(path))


def digest(path: Path | str) -> str:
    """Return the SHA-256 of a model: of its file, or of all its parts together."""
    found = hashlib.sha256()
    for part in parts(path):
        found.update(part.read_bytes())
    return found.hexdigest()


def remove(path: Path | str) -> None:
    """Delete all parts that are there."""
    for part in parts(path):
        part.unlink(missing_ok=True)
