"""Folders and parquet files, real and damaged."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from made_images import write_parquet
from PIL import Image

from fbnas.errors import InputError
from fbnas.training import batches, load_data


def test_cifar_as_parquet(cifar: Path) -> None:
    data = load_data("huggingface", path=str(cifar), validation_fraction=0.25)
    assert (data.classes, data.channels, data.resolution) == (10, 3, 32)
    assert len(data.train) + len(data.validation) == 400 and len(data.test) == 100
    assert 95 <= len(data.validation) <= 105
    stored = datasets.Dataset.from_parquet(str(cifar / "test.parquet"))
    with_pixels = stored.cast_column("img", datasets.Image())
    expected = np.asarray(with_pixels[3]["img"]).transpose(2, 0, 1)
    assert np.array_equal(data.test.batch(torch.tensor([3]))[0].numpy(), expected)
    assert data.test.labels.tolist() == stored["label"][:]
    assert all(0.4 < mean < 0.6 for mean in data.mean)


def test_a_single_parquet_file_is_split(cifar: Path) -> None:
    data = load_data("huggingface", path=str(cifar / "train.parquet"))
    assert (len(data.train), len(data.validation), len(data.test)) == pytest.approx(
        (256, 64, 80), abs=6
    )


def test_imagenette_as_folders_with_greyscale_photographs(imagenette: Path) -> None:
    modes = {Image.open(file).mode for file in imagenette.rglob("*.JPEG")}
    assert modes == {"L", "RGB"}
    data = load_data("image_folder", path=str(imagenette), resolution=64, resize=True)
    assert (data.classes, data.channels, data.resolution) == (10, 3, 64)
    assert (len(data.train), len(data.validation), len(data.test)) == (80, 40, 20)
    assert data.class_names[0] == "n01440764"


def test_large_data_is_decoded_lazily_to_the_same_pixels(imagenette: Path) -> None:
    lazy, held = (load_data("image_folder", path=str(imagenette), memory_mb=mb) for mb in (1, 2048))
    assert not lazy.validation.in_memory and held.validation.in_memory
    assert lazy.mean == pytest.approx(held.mean)
    reads = [batches(d.validation, 16, mean=held.mean, std=held.std) for d in (lazy, held)]
    for (x, y), (x2, y2) in zip(*reads, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_every_colour_mode_becomes_rgb(two_classes: Path) -> None:
    red = Image.new("RGB", (10, 10), (200, 10, 10))
    red.convert("RGBA").save(two_classes / "a" / "0.png")
    red.convert("CMYK").save(two_classes / "a" / "1.tif")
    red.convert("P").save(two_classes / "a" / "2.png")
    red.convert("L").save(two_classes / "a" / "3.png")
    Image.fromarray(np.full((10, 10), 257 * 80, dtype=np.uint16)).save(two_classes / "a" / "4.png")
    data = load_data("image_folder", path=str(two_classes))
    means = torch.cat([p.batch(torch.arange(len(p))).float() for p in (data.train, data.test)])
    assert data.channels == 3 and means.shape[1:] == (3, 10, 10)
    images = torch.cat(
        [p.batch(torch.arange(len(p))) for p in (data.train, data.validation, data.test)]
    )
    colours = {
        tuple(image[:, 0, 0].tolist()) for image in images if (image == image[:, :1, :1]).all()
    }
    assert len(colours) == 3  # red three times (as RGBA, CMYK, palette), two greys
    assert (80, 80, 80) in colours and (200, 10, 10) in colours


def test_grey_folders_have_one_channel(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("L", (6, 6), i).save(tmp_path / name / f"{i}.png")
    assert load_data("image_folder", path=str(tmp_path)).channels == 1


def split_folders(root: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (6, 6), (i, 0, 0)).save(root / split / name / f"{i}.png")


def test_train_val_and_test_folders_are_kept(tmp_path: Path) -> None:
    split_folders(tmp_path)
    data = load_data("image_folder", path=str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 4, 4)


def remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


DAMAGE = {
    "truncated": (
        lambda root: os.truncate(root / "train/a/1.png", 50),
        r"train/a/1\.png: the image cannot be read .*expected a whole image",
    ),
    "not an image": (
        lambda root: (root / "train/b/1.png").write_text("hello"),
        r"train/b/1\.png: the image cannot be read \(not an image\)",
    ),
    "empty file": (lambda root: os.truncate(root / "val/a/0.png", 0), r"val/a/0\.png: the image"),
    "another size": (
        lambda root: Image.new("RGB", (6, 9)).save(root / "val/b/1.png"),
        r"val/b/1\.png: the image is 6x9; expected 6x6.*data\.resize=true",
    ),
    "empty class": (
        lambda root: remove(root / "train/a"),
        r"train/a: the class folder holds no images",
    ),
    "empty class of the test set": (
        lambda root: remove(root / "test/b"),
        r"test/b: the class folder holds no images",
    ),
    "missing class": (
        lambda root: (remove(root / "val/b"), (root / "val/b").rmdir()),
        r"val: class 'b' of .*train is missing",
    ),
    "another class": (
        lambda root: (root / "val/c").mkdir(),
        r"val/c: class 'c' is not in .*train",
    ),
    "one class": (
        lambda root: [
            (remove(root / split / "b"), (root / split / "b").rmdir())
            for split in ("train", "val", "test")
        ],
        r"only one class \(a\); expected at least two",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_named_in_one_line(damage: str, tmp_path: Path) -> None:
    split_folders(tmp_path)
    load_data("image_folder", path=str(tmp_path))
    break_it, words = DAMAGE[damage]
    break_it(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        load_data("image_folder", path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_all_that_cannot_be_read_is_said_at_once_of_the_test_images_too(tmp_path: Path) -> None:
    split_folders(tmp_path)
    damaged = [tmp_path / name for name in ("train/b/1.png", "val/a/1.png", "test/b/1.png")]
    for file in damaged:
        os.truncate(file, 50)
    with pytest.raises(InputError, match="The same holds for 2 more: ") as caught:
        load_data("image_folder", path=str(tmp_path))
    assert all(str(file) in str(caught.value) for file in damaged)
    for file in damaged[:2]:
        file.unlink()
    with pytest.raises(InputError, match=r"test/b/1\.png: the image cannot be read"):
        load_data("image_folder", path=str(tmp_path))


def test_a_corrupt_image_is_named_when_decoded_lazily(tmp_path: Path) -> None:
    split_folders(tmp_path)
    os.truncate(tmp_path / "val/a/1.png", 50)
    data = load_data("image_folder", path=str(tmp_path), memory_mb=0)
    with pytest.raises(InputError, match=r"val/a/1\.png: the image cannot be read"):
        list(batches(data.validation, 2, mean=data.mean, std=data.std))


@pytest.mark.parametrize(
    ("source", "path", "words"),
    [
        ("image_folder", None, "data.path is missing; expected data.path=FOLDER"),
        ("image_folder", "/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("image_folder", "", "data.path is missing"),
        ("huggingface", None, "data.path is missing"),
        ("huggingface", "/nowhere/x.parquet", "/nowhere/x.parquet: no parquet files there"),
    ],
)
def test_missing_paths(source: str, path: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_data(source, path=path)


def test_a_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no class folders"):
        load_data("image_folder", path=str(tmp_path))


def noise(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, 6, 6, 3), dtype=np.uint8))


def test_labels_may_be_words(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", noise(12), ["cat", "dog"] * 6)
    data = load_data("huggingface", path=str(tmp_path))
    assert data.class_names == ("cat", "dog")


def test_class_names_and_images_as_the_hub_stores_them(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "fine_label": datasets.ClassLabel(names=["ant", "bee"])}
    )
    rows = {"image": [Image.fromarray(i) for i in noise(12)], "fine_label": [0, 1] * 6}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    data = load_data("huggingface", path=str(tmp_path / "*.parquet"))
    assert data.class_names == ("ant", "bee")
    assert len(data.train) + len(data.validation) + len(data.test) == 12


def test_files_named_with_their_split_anywhere_are_not_mixed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "noise_train.parquet", noise(12), [0, 1] * 6)
    write_parquet(tmp_path / "test" / "0000.parquet", noise(4), [0, 1] * 2)
    data = load_data("huggingface", path=str(tmp_path))
    assert (len(data.train) + len(data.validation), len(data.test)) == (12, 4)


def test_withheld_test_labels_are_no_test_set(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", noise(20), [0, 1] * 10)
    write_parquet(tmp_path / "test.parquet", noise(4), [-1] * 4)
    assert len(load_data("huggingface", path=str(tmp_path)).test) == 4  # 20 % of train


def test_damaged_parquet_files(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    write_parquet(file, noise(12), [0, 1] * 6)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InputError, match=r"train\.parquet: not a readable parquet file") as caught:
        load_data("huggingface", path=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ([0] * 12, [0] * 4, r"only one class \(0\)"),
        ([0, 1] * 6, [0, 1, 2, 0], "test split, row 2: label 2 is not a class of the training"),
        ([0, 1] * 6, [0] * 4, "class '1' has no image in the test split"),
    ],
)
def test_labels_that_do_not_agree(tmp_path: Path, train: list, test: list, words: str) -> None:
    write_parquet(tmp_path / "train.parquet", noise(12), train)
    write_parquet(tmp_path / "test.parquet", noise(4), test)
    with pytest.raises(InputError, match=words):
        load_data("huggingface", path=str(tmp_path))


@pytest.mark.parametrize(
    ("column", "other", "words"),
    [
        ("img", "caption", "no label column among img, caption"),
        ("pixels", "label", "no image column among pixels, label"),
    ],
)
def test_missing_columns(tmp_path: Path, column: str, other: str, words: str) -> None:
    stored = noise(12) if column == "pixels" else None
    rows = (
        {column: [i.tolist() for i in stored]}
        if stored
        else {column: [{"bytes": b"", "path": None}] * 12}
    )
    datasets.Dataset.from_dict({**rows, other: [0, 1] * 6}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=words):
        load_data("huggingface", path=str(tmp_path))


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="nobody/nothing: the dataset cannot be loaded .*Hub"):
        load_data("huggingface", path="nobody/nothing")
