"""What a model file says of itself: classes, preprocessing, architecture.

Where it says so: ONNX in its metadata_props, OpenVINO's IR in its rt_info, .tflite and .pt2 in a
JSON within (`zipfile` opens both), .pte in what its method `fbnas` returns, which is read without
its runtime; the last three also in FILE.json beside them.
"""

import contextlib
import importlib
import io
import json
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fbnas import __version__
from fbnas.errors import InputError
from fbnas.export.ir import SECTION
from fbnas.files import atomic_write, read_json
from fbnas.latency.session import open_session
from fbnas.space.network import NetworkCard

METADATA_PREFIX = "fbnas."
INSIDE = "fbnas.json"
LABELS = "labels.txt"  # beside the files, and in a .tflite, as TensorFlow Lite's own tools name it


def sidecar(path: Path | str) -> Path:
    """Return where a file may have its metadata beside it: PATH.json."""
    return Path(f"{path}.json")


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Return what an export stored with a model file; empty for one that fbnas did not write.

    Keys: version, space (name), architecture (list of block names), preprocessing (mean, std,
    resolution, channels; mean and std for images scaled to [0, 1]), class_names; of several heads
    also heads: the names of each one's classes, in the order of the outputs, or of the scores of a
    file with one output.

    Raises:
        InputError: no such file, not a whole ONNX file or IR, or metadata that are no JSON.
    """
    path = Path(path)
    if path.suffix not in (".xml", ".tflite", ".pte", ".pt2"):
        return _decoded(path, _of_onnx(path))
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a model file of fbnas export.")
    if path.suffix == ".xml":
        inside = _decoded(path, _of_ir(path))
    else:
        inside = _of_program(path) if path.suffix == ".pte" else _of_archive(path)
    if inside or not sidecar(path).is_file():
        return inside
    beside: dict[str, Any] = read_json(sidecar(path))
    return beside


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
    if card.heads:
        content["heads"] = {name: list(names) for name, names in card.heads.items()}
    return {METADATA_PREFIX + key: json.dumps(value) for key, value in content.items()}


def labels_text(class_names: Sequence[str]) -> str:
    """Return what a labels.txt holds: a name a line, in the order of the scores."""
    return "".join(f"{name}\n" for name in class_names)


def embed(path: Path, content: dict[str, Any]) -> None:
    """Put metadata into a file whose format has room: .tflite, as its associated files, and .pt2.

    A .tflite may end with a zip archive, as TensorFlow Lite's metadata have it; a .pt2 is one.
    """
    text = json.dumps(content)
    if path.suffix == ".tflite":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(INSIDE, text)
            archive.writestr(LABELS, labels_text(content["class_names"]))
    elif path.suffix == ".pt2":
        _embed_in_program(path, text)


def _embed_in_program(path: Path, text: str) -> None:
    import torch

    buffer = io.BytesIO()
    with contextlib.suppress(ImportError):  # registers the operators of int8 programs
        importlib.import_module("torch.ao.quantization.fx._decomposed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.load(path), buffer, extra_files={INSIDE: text})
    atomic_write(path, buffer.getvalue())


def _of_onnx(path: Path) -> dict[str, str]:
    stored = open_session(path, optimise=False).get_modelmeta().custom_metadata_map
    return {
        key.removeprefix(METADATA_PREFIX): value
        for key, value in stored.items()
        if key.startswith(METADATA_PREFIX)
    }


def _of_ir(path: Path) -> dict[str, str]:
    try:
        found = ElementTree.parse(path).find(f"rt_info/{SECTION}")
    except ElementTree.ParseError as error:
        raise InputError(
            f"{path}: not a whole IR of OpenVINO ({error}); expected one written by fbnas export. "
            "Write it again with the command that made it."
        ) from error
    return {} if found is None else {entry.tag: entry.get("value", "") for entry in found}


def _of_archive(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        places = [name for name in archive.namelist() if name.split("/")[-1] == INSIDE]
        content: dict[str, Any] = json.loads(archive.read(places[0])) if places else {}
    return content


def _of_program(path: Path) -> dict[str, Any]:
    """Find the text that a .pte's method returns: the JSON of `metadata_of`, which it begins as."""
    content = path.read_bytes()
    start = content.find(b'{"version": ')
    if start < 0:
        return {}
    text = content[start : content.find(b"\0", start)].decode("utf-8", "replace")
    found, _ = json.JSONDecoder().raw_decode(text)
    return dict(found)


def _decoded(path: Path, stored: dict[str, str]) -> dict[str, Any]:
    try:
        return {key: json.loads(value) for key, value in stored.items()}
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: its metadata are edited ({error}); expected JSON as fbnas export writes it. "
            "Export the network again."
        ) from error
