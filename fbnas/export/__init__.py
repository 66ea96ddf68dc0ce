"""From a network to a file that is checked, described and judged by itself."""

from fbnas.export.accuracy import accuracy_of_file
from fbnas.export.onnx import ExportReport, export_onnx, read_metadata

__all__ = ["ExportReport", "accuracy_of_file", "export_onnx", "read_metadata"]
