"""The formats that a network is written in, and the runtime that each is for."""

from dataclasses import dataclass

from fbnas.errors import InputError, unknown
from fbnas.latency.runtimes import RUNTIMES

ALL = "all"
PRECISIONS = ("fp32", "fp16", "int8")
THROUGH_ONNX = (".onnx", ".xml")  # written as ONNX or from it, so that int8 may keep trained grids


@dataclass(frozen=True)
class Format:
    """A format by its name, the runtime that executes it, its suffix, what it can be written in."""

    name: str
    runtime: str
    suffix: str
    precisions: tuple[str, ...] = PRECISIONS


FORMATS = {
    each.name: each
    for each in (
        Format("onnx", "onnxruntime", ".onnx"),
        Format("openvino", "openvino", ".xml"),
        # Their converters write fp32 and int8 alone.
        Format("tflite", "litert", ".tflite", ("fp32", "int8")),
        Format("pte", "executorch", ".pte", ("fp32", "int8")),
        Format("pt2", "pytorch", ".pt2", ("fp32", "int8")),
    )
}


def format_of(name: str) -> Format:
    """Return the format that is meant: by its own name, its suffix or its runtime's name.

    Raises:
        InputError: unknown name.
    """
    wanted = name.removeprefix(".")
    for each in FORMATS.values():
        if wanted in (each.name, each.suffix.removeprefix("."), each.runtime):
            return each
    raise unknown("format", name, [*FORMATS, ALL, *RUNTIMES])


def runtime_of_format(name: str) -> str:
    """Return the name of the runtime whose files are meant.

    Raises:
        InputError: unknown name.
    """
    return format_of(name).runtime


def check_precision(each: Format, precision: str) -> None:
    """Refuse a precision that a format is not written in.

    Raises:
        InputError: those that it is written in are named.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision not in each.precisions:
        raise InputError(
            f"{each.name} is written in {' and '.join(each.precisions)}, not in {precision}; "
            f"expected one of those, or another format: {', '.join(_others(precision))}"
        )


def _others(precision: str) -> list[str]:
    return [each.name for each in FORMATS.values() if precision in each.precisions]
