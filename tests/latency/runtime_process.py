"""Runs model files of one runtime, here or in an interpreter that has it.

    python runtime_process.py RUNTIME_FILE

JSON lines: {"path", "settings", "images": [npy files], "results": npy files} is answered by
{"shape": input shape} or {"refused": the words of a ValueError}; {} by {"version", "providers"}.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def answer(runtime: ModuleType, question: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    if not question:
        return {"version": runtime.version(), "providers": runtime.providers()}
    try:
        model = runtime.load(Path(question["path"]), question["settings"])
        for images, result in zip(question["images"], question["results"], strict=True):
            runtime.feed(model, np.load(images))
            runtime.run(model)
            np.save(result, runtime.result(model))
        return {"shape": list(runtime.input_shape(model))}
    except ValueError as error:
        return {"refused": str(error)}


def main(runtime_file: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = importlib.util.spec_from_file_location("runtime_under_test", runtime_file)
    assert spec is not None
    assert spec.loader is not None
    runtime = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runtime)
    for line in sys.stdin:
        print(json.dumps(answer(runtime, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
