"""ONNX files of whole networks: written with what it takes to use them, checked against torch."""

import copy
import tempfile
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.export.heads import divide_scores
from fbnas.export.metadata import metadata_of
from fbnas.files import atomic_write
from fbnas.latency import model_files
from fbnas.latency.fake_quantization import QuantizedForm, as_deployed
from fbnas.latency.lowering import OPSET, layer_names, store_onnx, trace_onnx, write_onnx
from fbnas.latency.qdq import with_int8_weights
from fbnas.latency.session import open_session, run
from fbnas.space.heads import Heads, rows_of
from fbnas.space.network import NetworkCard
from fbnas.space.structure import rounds

if TYPE_CHECKING:
    import onnx

# Rounding differs with the order of sums; FBNet-A and FBNet-C at 224 were measured at 5e-7.
TOLERANCE = 1e-3
ROUNDED_TOLERANCE = 0.3  # as int8's of every runtime
PARITY_IMAGES = 16


class ParityError(RuntimeError):
    """The file answers otherwise than its network; it is not kept."""


@dataclass(frozen=True)
class ExportReport:
    """The file, and how far its scores are from torch's on the images both were shown.

    `max_error` is the largest difference of two scores, relative to the largest score in size;
    `argmax_agreement` the fraction of images that both give the same class; None where the file
    cannot be run here. `heads`: both of each head, where there are several; the former are then of
    the worst.
    """

    path: Path
    bytes: int
    max_error: float | None
    argmax_agreement: float | None
    heads: dict[str, tuple[float, float]] = field(default_factory=dict)


def export_onnx(
    network: nn.Module,
    path: Path | str,
    *,
    card: NetworkCard | None = None,
    input_shape: tuple[int, int, int] | None = None,
    images: Tensor | None = None,
    tolerance: float | None = None,
    opset: int = OPSET,
) -> ExportReport:
    """Write a network as ONNX, "images" (batch, c, h, w) to "scores" (batch, classes), any batch.

    One with several heads has an output for each, called as the head. The file appears only after
    its scores agree with torch's.

    Args:
        card: goes into the file's metadata, and gives the input shape.
        input_shape: (c, h, w), where there is no card and the network does not know its own.
        images: (n, c, h, w) float, normalised, for the check; seeded noise where not given.
        tolerance: the largest `max_error` that is accepted; by default 0.001, or 0.3 of a network
            that rounds its feature maps.
        opset: version of ONNX's operators, 13 to 20.

    Raises:
        InputError: neither card nor input shape, or an operation that ONNX has no form for.
        ParityError: the file disagrees with torch; it is not kept.
    """
    shape = card.input_shape if card is not None else input_shape
    shape = getattr(network, "input_shape", None) if shape is None else shape
    if shape is None:
        raise InputError("export_onnx got neither card nor input_shape; expected one of them.")
    if images is None:
        images = torch.randn(PARITY_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    path = Path(path)
    if tolerance is None:
        tolerance = ROUNDED_TOLERANCE if rounds(network) else TOLERANCE
    metadata = {} if card is None else metadata_of(card)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "network.onnx"
        write_onnx(network, shape, written, batch=None, metadata=metadata, opset=opset)
        if card is not None and card.heads:
            divide_scores(written, card.heads)
        report = _compared(network, written, images, card)
        if report.max_error is None or not report.max_error <= tolerance:  # NaN is no agreement
            raise ParityError(
                f"{path} was not written: its scores differ from torch's by {report.max_error:.1e} "
                f"of the largest (tolerance {tolerance:.0e}) over {len(images)} images; an "
                "operation of the network is exported wrongly."
            )
        atomic_write(path, written.read_bytes())
    return replace(report, path=path)


def halve_onnx(source: Path, path: Path) -> None:
    """Write the fp16 form of an ONNX file: weights and arithmetic; input and output stay fp32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights below 6e-8 become that
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    OnnxModel(model).topological_sort()  # the casts of input and output were added at the end
    onnx.checker.check_model(model)
    atomic_write(path, model.SerializeToString())


@dataclass(frozen=True)
class TrainedInt8:
    """The int8 file of a network that was trained for it, with any of its layers in float.

    It has exactly the grids that the training left, and is what `quantize_file` takes as `by`.

    Args:
        form: what the training left beside the weights.
        input_shape: (c, h, w) of one image.
        card: goes into the file's metadata.
        opset: version of ONNX's operators, 13 to 20.
    """

    network: nn.Module
    form: QuantizedForm
    input_shape: tuple[int, int, int]
    card: NetworkCard | None = None
    opset: int = OPSET

    @property
    def images(self) -> int:
        """How many calibrate it: none, its ranges were trained with the weights."""
        return 0

    @cached_property
    def _traced(self) -> "onnx.ModelProto":
        deployed = as_deployed(self.network, self.form)
        return trace_onnx(deployed, self.input_shape, batch=None, opset=self.opset)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the nodes with weights, in order."""
        return layer_names(self._traced.graph)

    def write(self, path: Path, float_layers: Collection[str] = (), *, draft: bool = False) -> Path:
        """Write the file in which all layers but these compute in int8, and return its path.

        Args:
            float_layers: their weights are the same numbers in float; what one of them makes is
                not rounded where all that reads it computes in float.
            draft: makes no difference here.

        Raises:
            InputError: another opset, a form of another network, or no ONNX form.
        """
        metadata = {} if self.card is None else metadata_of(self.card)
        model = with_int8_weights(self._traced, self.form, float_layers)
        store_onnx(model, path, metadata=metadata)
        if self.card is not None and self.card.heads:
            divide_scores(path, self.card.heads)
        return path


def export_int8_onnx(
    network: nn.Module,
    form: QuantizedForm,
    path: Path | str,
    *,
    card: NetworkCard | None = None,
    input_shape: tuple[int, int, int] | None = None,
    images: Tensor | None = None,
    opset: int = OPSET,
    float_layers: Collection[str] = (),
) -> ExportReport:
    """Write a network that was trained for int8 as such a file, with exactly the grids it knows.

    The report compares it with torch's imitation of int8. Integer kernels round sums elsewhere than
    torch does, so scores differ by a step of their grid here and there; `export_file` deletes a
    file that differs by more.

    Args:
        form: what the training left beside the weights.
        card: goes into the file's metadata, and gives the input shape.
        input_shape: (c, h, w), where there is no card and the network does not know its own.
        images: (n, c, h, w) float, normalised, to compare by; seeded noise where not given.
        opset: version of ONNX's operators, 13 to 20.
        float_layers: that compute in float, as of `TrainedInt8`; the report then compares with the
            network itself.

    Raises:
        InputError: no input shape, another opset, a form of another network, or no ONNX form.
    """
    shape = card.input_shape if card is not None else input_shape
    shape = getattr(network, "input_shape", None) if shape is None else shape
    if shape is None:
        raise InputError("export_int8_onnx got neither card nor input_shape; expected one of them.")
    if images is None:
        images = torch.randn(PARITY_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    path = Path(path)
    TrainedInt8(network, form, shape, card, opset).write(path, float_layers)
    alike = network if float_layers else as_deployed(network, form)
    return _compared(alike, path, images, card)


def _compared(
    network: nn.Module, path: Path, images: Tensor, card: NetworkCard | None
) -> ExportReport:
    """Run a file and the network in torch on the same images."""
    reference = copy.deepcopy(network).cpu().float().eval()
    images = images.cpu().float()
    with torch.no_grad():
        expected = reference(images)
    # One image first, then the rest: the file must take any batch size.
    session = open_session(path)
    found = torch.cat([run(session, part) for part in (images[:1], images[1:]) if len(part)])
    heads = {} if card is None else card.heads
    return compared(path, expected.numpy(), found.numpy(), heads)


def compared(path: Path, expected: np.ndarray, found: np.ndarray, heads: Heads) -> ExportReport:
    """Report on a file by scores (n, classes): torch's, and its own."""
    of_heads = {
        name: compare(expected[:, rows], found[:, rows]) for name, rows in rows_of(heads).items()
    }
    errors, agreements = zip(*of_heads.values() or [compare(expected, found)], strict=True)
    size = model_files.size_bytes(path)
    return ExportReport(path, size, max(errors), min(agreements), of_heads)


def compare(expected: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return (largest difference by the largest score, fraction of equal classes) of two scores.

    Args:
        expected: (n, classes), torch's.
        found: (n, classes), the file's.
    """
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12)
    agreement = (found.argmax(1) == expected.argmax(1)).mean()
    return float(error), float(agreement)
