"""Parquet files of images, as the dataset hubs serve them."""

import io
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[np.ndarray], labels: list) -> None:
    rows = [{"bytes": png(image), "path": None} for image in images]
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"img": rows, "label": labels}), path)
