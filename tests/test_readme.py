"""The README's examples run as they are printed there, the notebook on fewer images."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ON_FEWER_IMAGES = """\
import functools
import fbnas.training
fbnas.training.load_data = functools.partial(fbnas.training.load_data, limit=320)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_the_notebook_ends_with_something_to_look_at(tmp_path: Path) -> None:
    example = next(block for block in blocks("python") if "search(" in block)
    done = python("-c", ON_FEWER_IMAGES + example, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^(\w+ ){6}\w+: predicted [\d.]+ of [\d.]+ ms$", done.stdout, flags=re.M)
    assert re.search(r"^\d+\.\d % of the validation images are right$", done.stdout, flags=re.M)
    assert "epoch  12 search" in done.stderr
    assert "epoch  10 would choose, predicted" in done.stderr
    assert (tmp_path / "quickstart.csv").is_file()


def test_a_space_and_a_block_of_the_users_own(tmp_path: Path) -> None:
    files = {name: text for text in blocks(r"\w+") if (name := own_name(text))}
    assert sorted(files) == ["my_blocks.py", "my_space.yaml"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    chosen = {"blocks": ["my_block", "k5_e6", "my_block", "skip"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(chosen))
    given = ["space=my_space.yaml", "architecture=mine.yaml", "classes=10"]
    done = python("-m", "fbnas.commands", "count", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (count,) = re.findall(r"([\d,]+) parameters", done.stdout)
    stem, first, third = 3 * 12 * 9, 12 * 12 * 9, 20 * 20 * 9  # without BN, as published
    second = 12 * 72 + 72 * 25 + 72 * 20  # 1x1, 5x5 depthwise, 1x1
    last = 20 * 640 + 640 * 10 + 10  # head and classifier
    assert int(count.replace(",", "")) == stem + first + second + third + last


def own_name(text: str) -> str | None:
    found = re.match(r"# (my_\w+\.\w+): ", text)
    return found[1] if found else None
