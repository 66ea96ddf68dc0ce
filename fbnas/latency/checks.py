"""Checks: what torch answers to known images, so that a device can tell a wrong model by itself."""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.files import write_through

POSITIONS = 1024  # of the output are compared: 12 kB a model to ship


def check_path(path: Path | str) -> Path:
    """Return the path of a model file's check, which lies beside it."""
    return Path(f"{path}.check.npz")


def write_check(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path | str,
    *,
    batch: int | None = 1,
    seed: int = 0,
    tolerance: float,
) -> None:
    """Write PATH.check.npz: what `module` answers, in eval mode, to normal noise.

    The file holds `shape` (batch, c, h, w) and `seed` of the images, which are
    RandomState(seed).standard_normal(shape) as float32; `size`, the number of output values;
    `positions`, at most 1024 of them, evenly strided over the flattened output; `values` there;
    `rms` of the whole output; `tolerance`. runner.py refuses to time a model for which
    sqrt(mean((found - values)^2)) / rms exceeds the tolerance.

    Args:
        input_shape: (c, h, w) of one image.
        path: of the model file.
        batch: images per run; None is 1.
        tolerance: largest relative RMS difference accepted.

    Raises:
        InputError: torch's own output holds NaN or infinite values.
    """
    module = copy.deepcopy(module).cpu().float().eval()
    shape = (batch or 1, *input_shape)
    images = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        output = module(torch.from_numpy(images)).numpy().reshape(-1)
    if not np.isfinite(output).all():
        raise InputError(
            f"{Path(path).name}: the network's own output in torch holds NaN or infinite values; "
            "expected finite ones: train it again with a lower learning rate"
        )
    positions = np.unique(np.linspace(0, output.size - 1, POSITIONS).astype(np.int64))
    arrays = {
        "shape": np.array(shape),
        "seed": np.array(seed),
        "size": np.array(output.size),
        "positions": positions,
        "values": output[positions],
        "rms": np.sqrt(np.mean(output.astype(np.float64) ** 2)),
        "tolerance": np.array(float(tolerance)),
    }
    write_through(check_path(path), lambda file: np.savez_compressed(file, **arrays))
