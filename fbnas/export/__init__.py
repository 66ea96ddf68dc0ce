"""From a network to a file that is checked, described and judged by itself."""

from fbnas.export.accuracy import accuracy_of_file
from fbnas.export.files import check_suffix, export_file, runtime_of_format
from fbnas.export.metadata import read_metadata, sidecar
from fbnas.export.onnx import ExportReport, export_int8_onnx, export_onnx
from fbnas.export.session import input_size

__all__ = [
    "ExportReport",
    "accuracy_of_file",
    "check_suffix",
    "export_file",
    "export_int8_onnx",
    "export_onnx",
    "input_size",
    "read_metadata",
    "runtime_of_format",
    "sidecar",
]
