"""Converts modules in an interpreter that has a runtime's converter; fbnas need not be there.

    python converter.py RUNTIME_FILE [PACKAGES THAT IT NEEDS]

JSON lines: the first on stdout says {"missing": [packages]}. Then every line on stdin asks for a
conversion, {"program", "input_shape", "path", "precision", "batch", "calibration", "more"}, and is
answered by {"error": null} or {"error": words, "kind": class}. `program` is a file of torch.export,
`calibration` a .npz of arrays, `more` what else `compile` is given. Ends when stdin closes.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def main(arguments: list[str]) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # converters chatter on stdout, from C++ too
    here = Path(__file__).parent  # its modules would shadow others
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".") != here]
    missing = [name for name in ("numpy", "torch", *arguments[1:]) if not has(name)]
    print(json.dumps({"missing": missing}), file=answers, flush=True)
    if missing:
        return 1
    runtime = load_runtime(Path(arguments[0]))
    for line in sys.stdin:
        answer: dict[str, str | None] = {"error": None}
        try:
            convert(runtime, json.loads(line))
        except Exception as error:
            answer = {"error": str(error) or repr(error), "kind": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def convert(runtime: ModuleType, job: dict[str, Any]) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)  # with other work on the machine threads that spin are far slower
    with np.load(job["calibration"]) as arrays:
        calibration = [arrays[name] for name in arrays.files]
    runtime.compile(
        torch.export.load(job["program"]).module(),
        tuple(job["input_shape"]),
        Path(job["path"]),
        precision=job["precision"],
        batch=job["batch"],
        calibration=calibration,
        **job.get("more", {}),
    )


def load_runtime(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"runtime_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"no runtime file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
