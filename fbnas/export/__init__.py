"""From a network to a file that is checked, described and judged by itself."""

from fbnas.export.accuracy import accuracy_of_file
from fbnas.export.onnx import ExportReport, export_onnx, read_metadata
from fbnas.export.session import input_size

__all__ = ["ExportReport", "accuracy_of_file", "export_onnx", "input_size", "read_metadata"]
