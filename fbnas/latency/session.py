"""Running an ONNX file here, for its scores: any batch size, one line for a file that is none."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fbnas.errors import InputError

if TYPE_CHECKING:
    import onnxruntime

HEADS_KEY = "fbnas.heads"  # of the metadata of a file with an output for each head


def open_session(
    path: Path | str,
    *,
    threads: int | None = None,
    optimise: bool = True,
    whole_sums: bool = False,
) -> "onnxruntime.InferenceSession":
    """Load an ONNX file on the CPU.

    Args:
        threads: of the runtime; all cores where not given.
        optimise: off where only the file's metadata are wanted.
        whole_sums: compute int8 in float between its roundings, which cuts no sum off.

    Raises:
        InputError: no such file, or not a whole ONNX file.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as refusals

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; expected an ONNX file.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    if whole_sums:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (
        refusals.InvalidProtobuf,
        refusals.InvalidArgument,
        refusals.InvalidGraph,
        refusals.NotImplemented,
        refusals.RuntimeException,
        refusals.Fail,
    ) as error:
        reason = str(error).splitlines()[0].split(" : ")[-1].replace(f"Load model from {path} ", "")
        raise InputError(
            f"{path}: not a whole ONNX file ({reason}); expected one written by fbnas export. "
            "Write it again with the command that made it."
        ) from error


def input_size(path: Path | str) -> dict[str, int]:
    """Return what a file's input says of its images: channels and resolution, where it is fixed.

    Raises:
        InputError: not an ONNX file, or one that takes something else than square images.
    """
    session = open_session(path, optimise=False)
    shape = session.get_inputs()[0].shape
    fixed = {name: side for name, side in zip("nchw", shape, strict=False) if isinstance(side, int)}
    if len(shape) != 4 or fixed.get("h", 0) != fixed.get("w", 0):
        raise InputError(f"{path} takes input of {shape}; expected square images (n, c, h, w).")
    sizes = {"channels": fixed.get("c"), "resolution": fixed.get("h")}
    return {name: size for name, size in sizes.items() if size is not None}


def run(session: "onnxruntime.InferenceSession", images: Tensor) -> Tensor:
    """Return the scores of (n, c, h, w) float images; a fixed batch is fed piece by piece.

    Raises:
        InputError: the file takes other input.
    """
    name, fixed = check_input(session, tuple(images.shape[1:]))
    array = np.ascontiguousarray(images.numpy(), dtype=np.float32)
    if fixed is None:
        return torch.from_numpy(scores(session, {name: array}))
    missing = -len(array) % fixed
    padded = np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
    pieces = [scores(session, {name: part}) for part in np.split(padded, len(padded) // fixed)]
    return torch.from_numpy(np.concatenate(pieces))[: len(array)]


def scores(session: "onnxruntime.InferenceSession", feed: dict[str, np.ndarray]) -> np.ndarray:
    """Return the first output, or those of all heads side by side where the file says it has them.

    Args:
        feed: images (n, c, h, w) float32, by the name of the input.
    """
    found: list[np.ndarray] = session.run(None, feed)
    several = HEADS_KEY in session.get_modelmeta().custom_metadata_map
    return np.concatenate(found, axis=1) if several else found[0]


def check_input(
    session: "onnxruntime.InferenceSession", shape: tuple[int, ...]
) -> tuple[str, int | None]:
    """Return the input's name and its fixed batch size, or None where the batch is open.

    Raises:
        InputError: not one float input (n, c, h, w), or not of `shape` (c, h, w).
    """
    inputs = session.get_inputs()
    taken = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
    fits = len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == 4
    if fits:
        fits = all(
            not isinstance(side, int) or side == given
            for side, given in zip(inputs[0].shape[1:], shape, strict=True)
        )
    if not fits:
        raise InputError(
            f"The ONNX file takes {taken}; the images are (n, {', '.join(map(str, shape))}) float: "
            "expected a file and data of one shape. Set data.resize=true or data.channels, or use "
            "the file of this data."
        )
    batch = inputs[0].shape[0]
    return inputs[0].name, batch if isinstance(batch, int) else None
