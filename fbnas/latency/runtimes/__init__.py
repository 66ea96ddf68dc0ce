"""The runtimes: what executes a network. One small file each, imported only when it is used.

A runtime file is a module with
    NAME, INSTALL                            its name in configs; the command that installs it
    PRECISIONS                               the precisions it can compile to
    SUFFIX                                   of the model files it loads
    available() -> bool, version() -> str
    compile(module, input_shape, path, *, precision, batch, calibration)   on the host: a model file
    load(path, threads) -> model, run(model)                               on the device: runner.py
`load` raises ValueError for what is no model of the runtime. The file imports nothing of fbnas at
its top, because runner.py loads it by itself.
"""

import importlib
from types import ModuleType

from fbnas.errors import InputError, unknown

RUNTIMES = {"onnxruntime": "fbnas.latency.runtimes.ort"}


def runtime(name: str) -> ModuleType:
    """Return the runtime's module.

    Raises:
        InputError: unknown name.
    """
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    return importlib.import_module(RUNTIMES[name])


def available_runtime(name: str) -> ModuleType:
    """Return the module of a runtime that can be used here.

    Raises:
        InputError: unknown name, or not installed; the line holds the command that installs it.
    """
    module = runtime(name)
    if not module.available():
        raise InputError(f"runtime {name} is not installed here; install it: {module.INSTALL}")
    return module
