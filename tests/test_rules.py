"""The rules of the house that a machine can hold: imports point down only, and stay light."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fbnas"
BASE = {"", "errors", "files", "modes", "progress", "shipped"}  # the empty name: fbnas.__version__
BELOW = {  # what each part may import, beside itself
    **dict.fromkeys(BASE, BASE),
    "space": BASE,
    "training": BASE | {"space"},
    "latency": BASE | {"space"},
    "search": BASE | {"space", "training"},
    "compression": BASE | {"space", "training", "search", "latency"},
    "export": BASE | {"space", "training", "search", "latency"},
    "report": BASE,
    "commands": BASE
    | {"space", "training", "search", "latency", "compression", "export", "report"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """fbnas.search.loop -> search; fbnas itself -> the empty name."""
    return [*module.split("."), ""][1]


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it the import stands."""
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            module = node.module or ""
            if module == "fbnas":  # `from fbnas import search` takes the part, not the package
                yield from (
                    f"fbnas.{alias.name}" if alias.name in names else "fbnas"
                    for alias in node.names
                )
            else:
                yield module


def test_every_part_has_its_place() -> None:
    found = {part_of(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in FILES}
    assert found == {*BELOW, "__init__"} - {""}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down_only(file: Path) -> None:
    part = part_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
    part = "" if part == "__init__" else part
    for module in imports(file):
        if module.split(".")[0] == "fbnas":
            assert part_of(module) in BELOW[part] | {part}, f"{file} imports {module}"
        if part != "commands":
            assert module.split(".")[0] not in ("hydra", "omegaconf"), f"{file} imports {module}"
        if part == "report":
            assert module.split(".")[0] not in ("torch", "onnxruntime"), f"{file} imports {module}"


def test_the_job_in_its_own_process_needs_nothing_of_ours() -> None:
    runner = PACKAGE / "latency" / "runner.py"
    assert not [module for module in imports(runner) if module.startswith(("fbnas", "torch"))]


def test_runtimes_shadow_no_package() -> None:
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    stems = {file.stem for file in (PACKAGE / "latency" / "runtimes").glob("*.py")} - {"__init__"}
    assert stems
    assert not stems & taken


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fbnas", "torch hydra omegaconf plotly onnxruntime onnx numpy pandas sklearn datasets"),
        ("fbnas.commands", "torch hydra plotly onnxruntime pandas sklearn datasets"),
        ("fbnas.report", "torch hydra onnxruntime onnx"),
        ("fbnas.files", "torch"),
        (
            "fbnas.search, fbnas.training, fbnas.latency.table, fbnas.export, fbnas.compression",
            "hydra omegaconf plotly onnxruntime datasets kornia torch_pruning sklearn tensorboard",
        ),
        ("fbnas.commands.composition", "torch"),  # help and refusals
    ],
)
def test_importing_takes_in_nothing_heavy(module: str, absent: str) -> None:
    code = f"import sys, {module}\nprint(*sorted(set(sys.modules) & set({absent.split()!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
