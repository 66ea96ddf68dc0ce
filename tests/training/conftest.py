"""Small data for the training tests; real images where ../shared/data (or FBNAS_DATA) has them."""

import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from made_images import write_parquet
from PIL import Image

SHARED = Path(os.environ.get("FBNAS_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny work runs faster so, and on a busy machine much faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is absent; set FBNAS_DATA to the folder of the real data")
    return SHARED / name


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A random subset of CIFAR-10 as the hubs serve it: 400 training and 100 test images."""
    source = shared("cifar10")
    labels = np.load(source / "labels.npz")
    for split, strips in (("train", 4), ("test", 1)):
        images: list[np.ndarray] = []
        for strip in sorted(source.glob(f"{split}-*.webp"))[:strips]:
            images += list(np.asarray(Image.open(strip)).reshape(-1, 32, 32, 3))
        write_parquet(tmp_path / f"cifar/{split}.parquet", images, labels[split][: len(images)])
    return tmp_path / "cifar"


@pytest.fixture
def imagenette(tmp_path: Path) -> Path:
    """Ten photographs of each of ten classes to train on and four to validate, as folders."""
    source = shared("imagenette224")
    for split, count in (("train", 10), ("val", 4)):
        for folder in sorted((source / split).iterdir()):
            target = tmp_path / "imagenette" / split / folder.name
            target.mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                (target / file.name).symlink_to(file)
    return tmp_path / "imagenette"


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    """Folders a/ and b/ of eight 10x10 images each: dark noise and bright noise."""
    rng = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 128)):
        (tmp_path / "two" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(low, low + 127, (10, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "two" / name / f"{i}.png")
    return tmp_path / "two"
