"""Where images come from: digits, class folders, parquet files or a dataset hub.

A source is read into labels and undecoded images; resolution, channels and splitting are data.py's.
"""

import glob
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fbnas.errors import InputError
from fbnas.training.images import FileImages

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
LABEL_COLUMNS = ("label", "labels", "class", "target", "fine_label", "category", "y")


@dataclass(frozen=True)
class Source:
    """Class names and the splits that a source holds: "train", perhaps "validation" and "test"."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, FileImages] = field(default_factory=dict)


def read_digits(path: str | None = None) -> Source:
    """Read scikit-learn's 1,797 handwritten digits: 8x8, grey, 10 classes, one split."""
    from sklearn.datasets import load_digits

    if path is not None:
        raise InputError(
            f"data.path={path} was given, but digits come with scikit-learn. Use "
            "data=image_folder or data=huggingface to read it."
        )
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")  # stored as 0 to 16
    images = FileImages(
        lambda i: Image.fromarray(pixels[i]), lambda i: f"digit {i}", torch.tensor(digits.target)
    )
    return Source("digits", tuple(map(str, digits.target_names)), {"train": images})


def read_image_folder(path: str | None = None) -> Source:
    """Read folders of images, one folder a class, below train/, val/ and test/ or below `path`.

    Raises:
        InputError: a missing or an empty folder, or splits whose class folders differ.
    """
    root = Path(_required(path, "data.path=FOLDER"))
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected one folder of images per class in it.")
    folders = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            if (root / name).is_dir() and _folders(root / name):
                folders[split] = root / name
    if "train" not in folders:
        folders = {"train": root}
    classes = [folder.name for folder in _folders(folders["train"])]
    if not classes:
        raise InputError(
            f"{folders['train']}: holds no class folders; expected one folder of images per class."
        )
    for folder in folders.values():
        _check_class_folders(folder, classes, folders["train"])
    return Source(
        root.resolve().name,
        tuple(classes),
        {split: _class_folders(folder, classes) for split, folder in folders.items()},
    )


def _folders(parent: Path) -> list[Path]:
    return sorted(
        path for path in parent.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    )


def _check_class_folders(folder: Path, classes: list[str], train: Path) -> None:
    found = {path.name for path in _folders(folder)}
    for name in sorted(set(classes) - found):
        raise InputError(
            f"{folder}: class '{name}' of {train} is missing; expected a folder of images for each "
            f"of the {len(classes)} classes. Add {folder / name} or take {train / name} out."
        )
    for name in sorted(found - set(classes)):
        raise InputError(
            f"{folder / name}: class '{name}' is not in {train}; expected the same classes in "
            f"every split. Add {train / name} or take {folder / name} out."
        )


def _class_folders(folder: Path, classes: list[str]) -> FileImages:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            file for file in (folder / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES
        )
        if not found:
            raise InputError(
                f"{folder / name}: the class folder holds no images; expected some of "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}. Fill it or take it out."
            )
        files += found
        labels += [label] * len(found)
    return FileImages(lambda i: Image.open(files[i]), lambda i: str(files[i]), torch.tensor(labels))


def read_huggingface(path: str | None = None) -> Source:
    """Read parquet files (a file, a pattern, a folder of them) or a dataset of the hub by its name.

    Raises:
        InputError: nothing there, a damaged file, an unreachable hub, or no image or label column.
    """
    where = _required(path, "data.path=NAME or data.path=FILES.parquet")
    files = _parquet_files(where)
    tables = _load_parquet(files) if files else _load_hub(where)
    if "train" not in tables:
        raise InputError(
            f"{where}: no training split (found: {', '.join(tables)}); expected a split or file "
            "named train."
        )
    image_column = _image_column(tables["train"], where)
    label_column = _label_column(tables["train"], image_column, where)
    raw_labels = {split: table[label_column][:] for split, table in tables.items()}
    class_names, values = _classes(tables["train"].features[label_column], raw_labels["train"])
    splits = {}
    for split, table in tables.items():
        if split == "test" and set(raw_labels[split]) <= {-1, None}:
            continue  # the hubs' way of withholding test labels
        labels = _indices(raw_labels[split], values, f"{where}, {split} split")
        splits[split] = _rows(table, image_column, labels, f"{where}, {split} split")
    return Source(Path(where).name, class_names, splits)


def _parquet_files(where: str) -> dict[str, list[str]]:
    """Return the parquet files of each split, or nothing where `where` is a name of the hub."""
    if Path(where).is_dir():
        found = sorted(map(str, Path(where).rglob("*.parquet")))
    else:
        found = sorted(glob.glob(where, recursive=True))  # noqa: PTH207 - Path.glob wants a folder
    if not found:
        local = where.startswith(("/", ".", "~")) or re.search(r"[*?\[]|\.parquet$", where)
        if local or Path(where).exists():
            raise InputError(
                f"{where}: no parquet files there; expected train.parquet and perhaps "
                "validation.parquet and test.parquet, or a name of the hub."
            )
        return {}
    files: dict[str, list[str]] = {}
    for file in found:
        files.setdefault(_split_of(Path(file)), []).append(file)
    if "train" not in files and len(files) > 1:
        raise InputError(
            f"{where}: files of {' and '.join(sorted(files))} but none of train; expected "
            "train.parquet beside them, or one split alone to be divided."
        )
    return files if "train" in files else {"train": found}


def _split_of(file: Path) -> str:
    """Return the split stated by a file's name (test-00000-of-00001) or folder (test/0000)."""
    for text in (file.stem, file.parent.name):
        words = re.split(r"[^a-z]+", text.lower())
        for split, names in SPLIT_NAMES.items():
            if set(words) & set(names):
                return split
    return "train"


def _load_parquet(files: dict[str, list[str]]) -> dict[str, Any]:
    import pyarrow.parquet

    for file in chain.from_iterable(files.values()):
        try:
            pyarrow.parquet.read_schema(file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file}: not a readable parquet file ({str(error).splitlines()[0]}); it is "
                "damaged or truncated: fetch it again."
            ) from error
    return _load_dataset("parquet", files)


def _load_hub(name: str) -> dict[str, Any]:
    found = _load_dataset(name, None)
    tables = {}
    for split, table in found.items():
        for kind, names in SPLIT_NAMES.items():
            if split in names:
                tables[kind] = table
    return tables or dict(found)


def _load_dataset(name: str, files: dict[str, list[str]] | None) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, data_files=files)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{name}: the dataset cannot be loaded ({reason}); expected parquet files, or a name "
            "of the hub and a network. Check data.path, or download the files and give their path."
        ) from error


def _image_column(table: Any, where: str) -> str:
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            return column
        if isinstance(feature, dict) and {"bytes", "path"} <= feature.keys():
            return column
    raise InputError(
        f"{where}: no image column among {', '.join(table.features)}; expected one of images or of "
        "{bytes, path}."
    )


def _label_column(table: Any, image_column: str, where: str) -> str:
    import datasets

    others = [column for column in table.features if column != image_column]
    by_type = [c for c in others if isinstance(table.features[c], datasets.ClassLabel)]
    by_name = [c for c in LABEL_COLUMNS if c in others]
    candidates = by_name if len(by_type) != 1 else by_type
    if not candidates:
        raise InputError(
            f"{where}: no label column among {', '.join(table.features)}; expected one named "
            f"{', '.join(LABEL_COLUMNS)}. Rename the column that holds the class."
        )
    return candidates[0]


def _classes(feature: Any, train_labels: list[Any]) -> tuple[tuple[str, ...], list[Any]]:
    """Return class names and the stored value of each class."""
    names = getattr(feature, "names", None)
    if names:
        return tuple(names), list(range(len(names)))
    values = sorted(set(train_labels), key=lambda value: (str(type(value)), value))
    return tuple(map(str, values)), values


def _indices(raw_labels: list[Any], values: list[Any], where: str) -> Tensor:
    index = {value: i for i, value in enumerate(values)}
    for row, value in enumerate(raw_labels):
        if value is None or value not in index:
            raise InputError(
                f"{where}, row {row}: label {value!r} is not a class of the training split; "
                f"expected one of its {len(values)} classes."
            )
    return torch.tensor([index[value] for value in raw_labels])


def _rows(table: Any, image_column: str, labels: Tensor, where: str) -> FileImages:
    import datasets

    table = table.select_columns([image_column])
    if isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))

    def open_image(index: int) -> Image.Image:
        stored = table[index][image_column]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise ValueError("the row is empty")
        return Image.open(
            io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]
        )

    return FileImages(open_image, lambda i: f"{where}, row {i}", labels)


def _required(path: str | None, option: str) -> str:
    if not path:
        raise InputError(f"data.path is missing; expected {option}.")
    return str(path)


SOURCES: dict[str, Callable[[str | None], Source]] = {
    "digits": read_digits,
    "image_folder": read_image_folder,
    "huggingface": read_huggingface,
}
