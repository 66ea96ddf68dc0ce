"""From a network to a file that is checked, described and judged by itself."""

from fbnas.export.accuracy import accuracy_of_file, judge_file, scores_of_file
from fbnas.export.examples import write_example
from fbnas.export.files import check_suffix, export_file
from fbnas.export.formats import FORMATS, Format, check_precision, format_of, runtime_of_format
from fbnas.export.metadata import read_metadata, sidecar
from fbnas.export.onnx import (
    ExportReport,
    ParityError,
    TrainedInt8,
    export_int8_onnx,
    export_onnx,
)
from fbnas.latency.session import input_size

__all__ = [
    "FORMATS",
    "ExportReport",
    "Format",
    "ParityError",
    "TrainedInt8",
    "accuracy_of_file",
    "check_precision",
    "check_suffix",
    "export_file",
    "export_int8_onnx",
    "export_onnx",
    "format_of",
    "input_size",
    "judge_file",
    "read_metadata",
    "runtime_of_format",
    "scores_of_file",
    "sidecar",
    "write_example",
]
