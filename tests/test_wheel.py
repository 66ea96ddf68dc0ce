"""The built wheel in an environment of its own: it brings its configs and runs the chain."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = [
    "experiment=quickstart",
    "data.limit=320",
    "search.epochs=2",
    "training.epochs=1",
    "compression.fine_tuning.epochs=1",
    "networks=0",
    "candidates=2",
    "space.blocks=[k3_e1,k3_e3]",  # of nine
    "compression.quantization.pays=false",
    "compression.methods=[channel_pruning,int8]",  # what pruning by latency does is the clock's
]


def call(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a fresh environment with the wheel, and our environment's dependencies.

    Those are seen through a .pth file that adds the folder but not what its own .pth files say, so
    that the checkout, which is installed there by one of them, is out of sight.
    """
    folder = tmp_path_factory.mktemp("wheel")
    built = call(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, ROOT, cwd=folder
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("fbnas-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = Path(call(python, "-c", PURELIB, cwd=folder).stdout.strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    installed = call(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q",
        "--force-reinstall", "--ignore-installed", wheel, cwd=folder,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    return python


PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"
WHERE = "import fbnas, fbnas.shipped as s; print(fbnas.__file__); print(s.configs_folder())"


def test_package_and_configs_come_from_the_wheel(python: Path, tmp_path: Path) -> None:
    found = [Path(line) for line in call(python, "-c", WHERE, cwd=tmp_path).stdout.splitlines()]
    environment = python.parent.parent
    assert len(found) == 2
    for path in found:
        assert path.is_relative_to(environment)
        assert not path.is_relative_to(ROOT)
    shipped = {p.relative_to(found[1]) for p in found[1].rglob("*.yaml")}
    assert (found[0].parent / "py.typed").is_file()
    assert shipped == {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}


def test_the_quickstart_runs_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    done = call(python.parent / "fbnas", "run", *SMALL, "out=r", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["space"] == "quickstart"
    assert [stage["name"] for stage in result["stages"]] == ["fp32", "pruned", "int8"]
    for name in ("model.onnx", "report.html"):
        assert (tmp_path / "r" / name).stat().st_size > 1000
