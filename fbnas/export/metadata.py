"""What a model file says of itself: classes, preprocessing, architecture."""

import json
from pathlib import Path
from typing import Any

from fbnas import __version__
from fbnas.errors import InputError
from fbnas.export.session import open_session
from fbnas.files import read_json
from fbnas.space.network import NetworkCard

METADATA_PREFIX = "fbnas."
OTHERS = (".tflite", ".pte", ".pt2")  # formats with no place for metadata of ours


def sidecar(path: Path | str) -> Path:
    """Return where a file that holds no metadata itself keeps them: PATH.json."""
    return Path(f"{path}.json")


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Return what an export stored with a model file; empty for one that fbnas did not write.

    It lies in an ONNX file itself, and in PATH.json beside a file of another format.

    Keys: version, space (name), architecture (list of block names), preprocessing (mean, std,
    resolution, channels; mean and std for images scaled to [0, 1]), class_names.

    Raises:
        InputError: no such file, not a whole ONNX file, or a PATH.json that is no JSON.
    """
    if Path(path).suffix in OTHERS:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; expected a model file of fbnas export.")
        found: dict[str, Any] = read_json(sidecar(path)) if sidecar(path).is_file() else {}
        return found
    stored = open_session(path, optimise=False).get_modelmeta().custom_metadata_map
    try:
        return {
            key.removeprefix(METADATA_PREFIX): json.loads(value)
            for key, value in stored.items()
            if key.startswith(METADATA_PREFIX)
        }
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: its metadata are edited ({error}); expected JSON as fbnas export writes it. "
            "Export the network again."
        ) from error


def metadata_of(card: NetworkCard) -> dict[str, str]:
    """Return what a file says of its network, as JSON by key; `read_metadata` reads it back."""
    channels, resolution, _ = card.input_shape
    content = {
        "version": __version__,
        "space": card.space.name,
        "architecture": list(card.architecture.blocks),
        "preprocessing": {
            "mean": list(card.mean),
            "std": list(card.std),
            "resolution": resolution,
            "channels": channels,
        },
        "class_names": list(card.class_names),
    }
    return {METADATA_PREFIX + key: json.dumps(value) for key, value in content.items()}
