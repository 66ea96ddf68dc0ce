"""The made-up run of made_run.py as fixtures."""

import shutil
from pathlib import Path

import pytest
from made_run import write_run
from parsed_page import ParsedPage

from fbnas.report import write_report


@pytest.fixture(scope="session")
def made_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the folder once; tests that change it take `run_folder`."""
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def run_folder(made_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the made-up run, free to be damaged."""
    shutil.copytree(made_folder, tmp_path / "run", ignore=shutil.ignore_patterns("*.html"))
    return tmp_path / "run"


@pytest.fixture(scope="session")
def page(made_folder: Path) -> ParsedPage:
    """Return the report of the made-up run, read back."""
    return ParsedPage(write_report(made_folder))
