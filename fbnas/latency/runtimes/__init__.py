"""The runtimes: what executes a network. One small file each, imported only when it is used.

A runtime file is a module with
    NAME, INSTALL      its name in configs; the command that installs it
    SUFFIX             of the model files that `compile` writes
    READS              optional: the suffixes of all model files it loads, where there are others
    PRECISIONS         the precisions it can compile to
    PROVIDERS          what may execute within it: name -> how to get it; the first is the default
    TOLERANCE          precision -> largest relative RMS difference from torch's output accepted
    CONVERTER          packages that `compile` needs beyond fbnas's own; () where there are none
    HOLDS_TEXT         optional: True where `compile` takes `text`, which it stores in the file
    CONVERTER_INT8     optional: the same for int8, where it differs
    MIXES              optional: True where `compile` takes `float_layers`: of each convolution and
                       linear layer, in the order of computing, whether int8 leaves it in float
    available() -> bool, version() -> str, providers() -> list[str]    providers: those found here
    compile(module, input_shape, path, *, precision, batch, calibration)   on the host: a model file
and, on the device, where runner.py loads the file by itself,
    load(path, settings) -> model      settings: {"threads": int, "provider": str}, "" the default
    feed(model, images)                binds float32 (batch, c, h, w); not timed
    run(model)                         the runtime's own work and nothing else; synchronous; timed
    result(model) -> array             float32, the output of the last run; not timed
    input_shape(model) -> tuple        (batch, c, h, w), -1 for a size that the file leaves open
    run_timed(model, repeats) -> ms    optional: mean of a run, by a clock better than the host's
`batch=None` leaves the batch open where the format can, else it is 1. `load` and `feed` raise
ValueError, in the runtime's own words, for what they cannot take. The file imports nothing of
fbnas at its top, and no torch outside `compile` unless torch is the runtime, so what two runtimes
share is written twice. A new runtime is one file and one line in RUNTIMES;
tests/latency/test_runtimes.py then tests it. `profile`, `search` and `train` need no more, nor does
any command where its files are ONNX; to `export` and `evaluate` files of a suffix of its own are a
line of FORMATS in export/formats.py, ten lines of python in export/examples.py, and what
`read_metadata` in export/metadata.py is to find in them; tests/export then tests these.
"""

import importlib
from types import ModuleType

from fbnas.errors import InputError, unknown

RUNTIMES = {
    "onnxruntime": "fbnas.latency.runtimes.ort",
    "openvino": "fbnas.latency.runtimes.ov",
    "litert": "fbnas.latency.runtimes.tflite",
    "executorch": "fbnas.latency.runtimes.pte",
    "pytorch": "fbnas.latency.runtimes.torch_rt",
}
_LONG = "executionprovider"  # as in ONNX Runtime's own CPUExecutionProvider


def runtime(name: str) -> ModuleType:
    """Return the runtime's module.

    Raises:
        InputError: unknown name.
    """
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    return importlib.import_module(RUNTIMES[name])


def suffixes(name: str) -> tuple[str, ...]:
    """Return the suffixes of the model files that a runtime loads, that of its own first.

    Raises:
        InputError: unknown name.
    """
    file = runtime(name)
    found: tuple[str, ...] = getattr(file, "READS", (file.SUFFIX,))
    return found


def available_runtime(name: str) -> ModuleType:
    """Return the module of a runtime that can be used here.

    Raises:
        InputError: unknown name, or not installed; the line holds the command that installs it.
    """
    module = runtime(name)
    if not module.available():
        raise InputError(f"runtime {name} is not installed here; install it: {module.INSTALL}")
    return module


def provider_name(name: str, provider: str) -> str:
    """Return the provider of a runtime as fbnas spells it; the runtime's default for "".

    Case does not matter, and the runtime's long form (CUDAExecutionProvider) is taken too.

    Raises:
        InputError: unknown runtime or provider.
    """
    known = runtime(name).PROVIDERS
    if provider == "":
        return next(iter(known))
    short = str(provider).casefold().removesuffix(_LONG)
    for candidate in known:
        if candidate.casefold() == short:
            return candidate
    raise unknown(f"provider of {name}", provider, known)
