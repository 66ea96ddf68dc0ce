"""OpenVINO's IR: an .xml with the graph and what it takes to use it, a .bin with the weights."""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.latency.model_files import parts
from fbnas.latency.runtimes import available_runtime

SECTION = "fbnas"  # of rt_info, where our metadata lie


def write_ir(source: Path, path: Path, metadata: Mapping[str, str], *, halve: bool) -> None:
    """Write an ONNX file as OpenVINO's IR, PATH.xml and its .bin.

    Args:
        metadata: by name, in the file's rt_info: `model.get_rt_info(["fbnas", name])`.
        halve: store the weights in fp16; input and output stay fp32.

    Raises:
        InputError: OpenVINO is not installed here, or cannot read the file.
    """
    available_runtime("openvino")
    import openvino

    try:
        model = openvino.Core().read_model(str(source))
    except RuntimeError as error:
        words = " ".join(str(error).split())
        raise InputError(f"the network cannot be converted by openvino: {words}") from error
    for name, value in metadata.items():
        model.set_rt_info(value, [SECTION, name])
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = Path(folder) / path.name
        openvino.save_model(model, str(written), compress_to_fp16=halve)
        # The graph last: with it the model is there.
        for made, kept in reversed(list(zip(parts(written), parts(path), strict=True))):
            atomic_write(kept, made.read_bytes())
