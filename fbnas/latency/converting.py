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
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
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
) -> None:
    """Write the file that a runtime executes; the module itself is left as it is.

    Args:
        input_shape: (c, h, w) of one image.
        precision: one of the runtime's.
        batch: images per run; None leaves it open where the format can, else it is 1.
        calibration: arrays (n, c, h, w) float32, from which int8 takes its ranges.
        converter: a python that has the packages which conversion needs; None for this one.

    Raises:
        ConversionError: the module cannot be converted; in the converter's own words.
        InputError: unknown precision, no converter here, or no such interpreter.
    """
    file = find_runtime(runtime)
    if precision not in file.PRECISIONS:
        raise unknown(f"precision of {runtime}", precision, file.PRECISIONS)
    module = copy.deepcopy(module).cpu().float().eval()
    shown = calibration if precision == "int8" else ()
    if batch is not None or file.CONVERTER:
        shown = pieces(shown, batch or 1)
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        made = Path(folder) / f"model{file.SUFFIX}"
        if file.CONVERTER and (converter is not None or lacking(file)):
            worker = _worker(runtime, file, converter)
            job = {"precision": precision, "batch": batch, "path": str(made)}
            _convert_there(worker, job, module, input_shape, list(shown), Path(folder))
        else:
            _convert_here(file, module, input_shape, made, precision, batch, list(shown))
        atomic_write(path, made.read_bytes())


def lacking(file: ModuleType) -> list[str]:
    """The packages that this interpreter lacks to convert for a runtime."""
    return [name for name in file.CONVERTER if importlib.util.find_spec(name) is None]


def pieces(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cut arrays (n, c, h, w) into arrays of `size` images; what is left over is repeated."""
    for array in arrays:
        for start in range(0, len(array), size):
            yield np.resize(array[start : start + size], (size, *array.shape[1:]))


def _convert_here(
    file: ModuleType,
    module: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path,
    precision: str,
    batch: int | None,
    calibration: list[np.ndarray],
) -> None:
    try:
        file.compile(
            module, input_shape, path, precision=precision, batch=batch, calibration=calibration
        )
    except InputError as error:
        raise ConversionError(str(error)) from error
    except Exception as error:
        if not file.CONVERTER:
            raise
        raise _refused(module, file.NAME, f"{type(error).__name__}: {error}") from error


def _convert_there(
    worker: "_Worker",
    job: dict[str, Any],
    module: nn.Module,
    input_shape: tuple[int, int, int],
    calibration: list[np.ndarray],
    folder: Path,
) -> None:
    save_program(module, (job["batch"] or 1, *input_shape), folder / "program.pt2")
    np.savez(folder / "calibration.npz", *calibration)
    job |= {
        "program": str(folder / "program.pt2"),
        "calibration": str(folder / "calibration.npz"),
        "input_shape": input_shape,
    }
    error = worker.ask(job)
    if error is not None:
        raise _refused(module, worker.runtime, error)


def save_program(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    """Write a module in eval mode as a program of torch.export, which holds its code and weights.

    Raises:
        ConversionError: the module's code cannot be traced.
    """
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (torch.zeros(shape),), strict=False)
            torch.export.save(program, buffer)
    except Exception as error:  # whatever the module's own code raises, beside torch's own errors
        words = f"{type(error).__name__}: {error}"
        raise _refused(module, "torch.export", words) from error
    path.write_bytes(buffer.getvalue())


def _refused(module: nn.Module, by: str, words: str) -> ConversionError:
    first = next((line.strip() for line in words.splitlines() if line.strip()), "no reason given")
    return ConversionError(f"{type(module).__name__} cannot be converted by {by}: {first}")


class _Worker:
    """A process of converter.py: one runtime in one interpreter, open until this process ends.

    Raises:
        InputError: the interpreter cannot be started or lacks packages.
    """

    def __init__(self, runtime: str, file: ModuleType, python: str) -> None:
        self.runtime = runtime
        self.python = python
        self.errors: IO[bytes] = tempfile.TemporaryFile()
        # In a session of its own it does not see Ctrl-C; it ends when its stdin closes.
        self.process = subprocess.Popen(
            [python, str(SCRIPT), str(file.__file__)],
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
                f"{python} does not work as a converter: {self._last_words()}; expected a python "
                f"with {', '.join(file.CONVERTER)}"
            )
        if first["missing"]:
            self.close()
            raise InputError(
                f"{python} lacks {', '.join(first['missing'])}, to convert for {runtime}; "
                f"install there: {python} -m pip install {_pip_names(('torch', *file.CONVERTER))}"
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
            words = self._last_words()
            return f"the converter {self.python} {words}"
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


_workers: dict[tuple[str, str], _Worker] = {}


def _worker(runtime: str, file: ModuleType, converter: str | None) -> _Worker:
    if converter is None:
        raise InputError(
            f"no converter for {runtime} here: {', '.join(lacking(file))} missing; give "
            "device.converter=PATH of a python that has it (in an environment of its own: "
            f"pip install torch {_pip_names(file.CONVERTER)}), or install it here"
        )
    python = shutil.which(os.path.expanduser(converter))
    if python is None:
        raise InputError(
            f"device.converter={converter}: no such program; expected a python that has "
            f"{', '.join(file.CONVERTER)}"
        )
    key = (python, runtime)
    if key not in _workers or not _workers[key].alive():
        _workers[key] = _Worker(runtime, file, python)
    return _workers[key]


def _pip_names(packages: Iterable[str]) -> str:
    return " ".join(name.replace("_", "-") for name in packages)


@atexit.register
def _close_workers() -> None:
    for worker in _workers.values():
        if worker.alive():
            worker.process.kill()
    _workers.clear()
