"""From a module to a model file of any runtime, in this interpreter or in one that can convert.

Converters of some runtimes are heavy and want versions of their own: they may live in another
environment. The module travels there as a program of torch.export, so that neither fbnas nor the
user's own blocks have to be installed in it.
"""

import atexit
import copy
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from fbnas.errors import InputError, unknown
from fbnas.files import atomic_write
from fbnas.latency.runtimes import runtime as find_runtime

SCRIPT = Path(__file__).parent / "converter.py"


class ConversionError(InputError):
    """This module, but perhaps not another one, cannot become a file of the runtime."""


def convert(
    runtime: str,
    module: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    precision: str,
    batch: int | None,
    calibration: Iterable[np.ndarray],
    converter: str | None = None,
    text: str = "",
    float_layers: Sequence[bool] = (),
) -> None:
    """Write the file that a runtime executes; the module itself is left as it is.

    Args:
        input_shape: (c, h, w) of one image.
        precision: one of the runtime's.
        batch: images per run; None leaves it open where the format can, else it is 1.
        calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges.
        converter: a python that has the packages which conversion needs; None for this one.
        text: to be stored in the file, where the runtime's converter can (HOLDS_TEXT).
        float_layers: which of `layer_names` int8 leaves in float, where the converter can (MIXES).

    Raises:
        ConversionError: the module cannot be converted; in the converter's own words.
        InputError: unknown precision, no converter here, no such interpreter, or float_layers
            where all of a file is of one precision.
    """
    file = find_runtime(runtime)
    if precision not in file.PRECISIONS:
        raise unknown(f"precision of {runtime}", precision, file.PRECISIONS)
    if float_layers and not getattr(file, "MIXES", False):
        raise InputError(f"{runtime} converts whole networks; expected no float_layers")
    packages = needed(file, precision)
    module = copy.deepcopy(module).cpu().float().eval()
    shown = calibration if precision == "int8" else ()
    if batch is not None or packages:
        shown = pieces(shown, batch or 1)
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        made = Path(folder) / f"model{file.SUFFIX}"
        more: dict[str, Any] = {}
        if text and getattr(file, "HOLDS_TEXT", False):
            more["text"] = text
        if float_layers:
            more["float_layers"] = list(float_layers)
        job = _Job(file, module, input_shape, made, precision, batch, list(shown), more)
        if packages and (converter is not None or lacking(packages)):
            _convert_there(_worker(file, packages, converter), job)
        else:
            _convert_here(job)
        atomic_write(path, made.read_bytes())


@dataclass(frozen=True)
class _Job:
    file: ModuleType
    module: nn.Module
    input_shape: tuple[int, int, int]
    path: Path
    precision: str
    batch: int | None
    calibration: list[np.ndarray]
    more: dict[str, Any]


def needed(file: ModuleType, precision: str) -> tuple[str, ...]:
    """The packages that a runtime's conversion needs beyond those of fbnas."""
    of_int8: tuple[str, ...] = getattr(file, "CONVERTER_INT8", file.CONVERTER)
    return of_int8 if precision == "int8" else tuple(file.CONVERTER)


def lacking(packages: Iterable[str]) -> list[str]:
    """Those of the packages that are not installed here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def pieces(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cut arrays (n, c, h, w) into arrays of `size` images; what is left over is repeated."""
    for array in arrays:
        for start in range(0, len(array), size):
            yield np.resize(array[start : start + size], (size, *array.shape[1:]))


def layer_names(module: nn.Module, input_shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the names of convolutions and linear layers, in the order in which they compute.

    Those of their weights, less ".weight": layers.3.conv. One that computes twice is there twice.

    Raises:
        ConversionError: the module's code cannot be traced.
    """
    module = copy.deepcopy(module).cpu().float().eval()
    program = _program(module, (1, *input_shape))
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    aten = torch.ops.aten
    return tuple(
        names.get(node.args[1].name, "").rpartition(".")[0] or node.name
        for node in program.graph.nodes
        if getattr(node.target, "overloadpacket", None) in (aten.conv2d, aten.linear)
    )


def in_float(names: Sequence[str], parts: Collection[str]) -> list[bool]:
    """Return for each of `layer_names` whether it is, or is within, one of some parts.

    Args:
        parts: names of modules: layers.3 has layers.3.conv in it.

    Raises:
        InputError: a part has no layer.
    """
    lost = [part for part in parts if not any(_is_within(name, part) for name in names)]
    if lost:
        raise InputError(
            f"float_layers names {', '.join(lost)}, where no convolution and no linear layer is; "
            f"expected some of {', '.join(dict.fromkeys(names))}, or what holds them"
        )
    return [any(_is_within(name, part) for part in parts) for name in names]


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _convert_here(job: _Job) -> None:
    try:
        job.file.compile(
            job.module,
            job.input_shape,
            job.path,
            precision=job.precision,
            batch=job.batch,
            calibration=job.calibration,
            **job.more,
        )
    except InputError as error:
        raise ConversionError(str(error)) from error
    except Exception as error:  # converters raise whatever they like
        raise _refused(job.module, job.file.NAME, f"{type(error).__name__}: {error}") from error


def _convert_there(worker: "_Worker", job: _Job) -> None:
    program = job.path.with_name("program.pt2")
    calibration = job.path.with_name("calibration.npz")
    save_program(job.module, (job.batch or 1, *job.input_shape), program)
    np.savez(calibration, *job.calibration)
    error = worker.ask(
        {
            "program": str(program),
            "input_shape": job.input_shape,
            "path": str(job.path),
            "precision": job.precision,
            "batch": job.batch,
            "calibration": str(calibration),
            "more": job.more,
        }
    )
    if error is not None:
        raise _refused(job.module, job.file.NAME, error)


def save_program(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Write a module in eval mode as a program of torch.export, which holds its code and weights.

    Raises:
        ConversionError: the module's code cannot be traced.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_program(module, shape), buffer)
    path.write_bytes(buffer.getvalue())


def _program(module: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(module, (torch.zeros(shape),), strict=False)
    except Exception as error:  # whatever the module's own code raises, beside torch's own errors
        words = f"{type(error).__name__}: {error}"
        raise _refused(module, "torch.export", words) from error


def _refused(module: nn.Module, by: str, words: str) -> ConversionError:
    first = next((line.strip() for line in words.splitlines() if line.strip()), "no reason given")
    return ConversionError(f"{type(module).__name__} cannot be converted by {by}: {first}")


class _Worker:
    """A process of converter.py: one runtime in one interpreter, open until this process ends.

    Raises:
        InputError: the interpreter cannot be started or lacks packages.
    """

    def __init__(self, python: str, file: ModuleType, packages: Sequence[str]) -> None:
        self.python = python
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        # In a session of its own it does not see Ctrl-C; it ends when its stdin closes.
        self.process = subprocess.Popen(
            [python, str(SCRIPT), str(file.__file__), *packages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        )
        first = self._answer()
        if first is None:
            raise InputError(
                f"the converter {python} {self._last_words()}; expected a python that has "
                f"{', '.join(packages)}"
            )
        if first["missing"]:
            self.close()
            raise InputError(
                f"the converter {python} lacks {', '.join(first['missing'])}, which {file.NAME} "
                f"needs; install there: {python} -m pip install {_pip_names(first['missing'])}"
            )

    def ask(self, job: dict[str, Any]) -> str | None:
        """Return None when the file is written, else what the converter says or died of."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            answer = self._answer()
        except BrokenPipeError:
            answer = None
        except BaseException:
            self.process.kill()  # its answer to this question must not meet the next one
            self.close()
            raise
        if answer is None:
            return f"the converter {self.python} {self._last_words()}"
        if answer["error"] is None:
            return None
        return f"{answer['kind']}: {answer['error']}"

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait()
        self.errors.close()

    def _answer(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        self.close()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        return f"ended ({how}): {said}"


_workers: dict[tuple[str, ...], _Worker] = {}


def _worker(file: ModuleType, packages: Sequence[str], converter: str | None) -> _Worker:
    """The open worker of an interpreter for a runtime, or a new one.

    Raises:
        InputError: no interpreter is given, there is no such program, or it lacks packages.
    """
    if converter is None:
        raise InputError(
            f"{file.NAME} cannot be converted for here: {', '.join(lacking(packages))} missing; "
            f"install it (pip install {_pip_names(packages)}), or give device.converter=PATH of "
            "the python of another environment that has it and torch"
        )
    python = shutil.which(Path(converter).expanduser())
    if python is None:
        raise InputError(
            f"device.converter is {converter}, which is no program; expected a python that has "
            f"{', '.join(packages)}"
        )
    key = (python, file.NAME, *packages)
    if key not in _workers or not _workers[key].alive():
        _workers[key] = _Worker(python, file, packages)
    return _workers[key]


def _pip_names(packages: Iterable[str]) -> str:
    return " ".join(name.replace("_", "-") for name in packages)


@atexit.register
def _close_workers() -> None:
    for worker in _workers.values():
        if worker.alive():
            worker.process.kill()
    _workers.clear()
