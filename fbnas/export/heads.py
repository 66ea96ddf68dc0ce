"""One ONNX file for several heads of one backbone: an output for each."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from fbnas.export.metadata import METADATA_PREFIX, metadata_of
from fbnas.export.onnx import PARITY_IMAGES, TOLERANCE, ParityError, compare
from fbnas.export.session import open_session
from fbnas.files import atomic_write
from fbnas.latency.lowering import OPSET, write_onnx
from fbnas.space.heads import SeveralHeads
from fbnas.space.network import NetworkCard


def export_heads(
    network: SeveralHeads, path: Path, cards: Mapping[str, NetworkCard], *, opset: int = OPSET
) -> dict[str, float]:
    """Write "images" (batch, c, h, w) to the scores (batch, classes) of each head, by its name.

    The file appears only after all scores agree with torch's. Its metadata are those of the first
    head, and `heads`: the names of each head's classes.

    Args:
        cards: of every head.

    Returns:
        The largest difference of each head's scores, relative to the largest in size.

    Raises:
        ParityError: the file disagrees with torch; it is not kept.
        InputError: an operation that ONNX has no form for.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(PARITY_IMAGES, *network.input_shape, generator=generator)
    with torch.no_grad():
        expected = network.eval()(images)
    classes = {name: list(cards[name].class_names) for name in network.names}
    metadata = metadata_of(cards[network.names[0]])
    metadata[f"{METADATA_PREFIX}heads"] = json.dumps(classes)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "heads.onnx"
        write_onnx(
            network,
            network.input_shape,
            written,
            batch=None,
            metadata=metadata,
            opset=opset,
            outputs=network.names,
        )
        found = open_session(written).run(list(network.names), {"images": images.numpy()})
        errors = {
            name: compare(torch_scores.numpy(), scores)[0]
            for name, torch_scores, scores in zip(network.names, expected, found, strict=True)
        }
        for name, error in errors.items():
            if not error <= TOLERANCE:  # a NaN is no agreement
                raise ParityError(
                    f"{path} was not written: the scores of {name} differ from torch's by "
                    f"{error:.1e} of the largest (tolerance {TOLERANCE:.0e})."
                )
        atomic_write(path, written.read_bytes())
    return errors
