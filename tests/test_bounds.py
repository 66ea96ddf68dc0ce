"""The lowest versions that are allowed are those that `make test-lowest` tests."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = ("openvino", "slurm", "test")  # extras that are in that environment


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower(): Version(version) for package, version in pairs}


def bounds() -> dict[str, Version]:
    extras = [text for name in TESTED for text in PROJECT["optional-dependencies"][name]]
    asked = [Requirement(text) for text in [*PROJECT["dependencies"], *extras]]
    return {
        each.name.lower(): Version(bound.version)
        for each in asked
        for bound in each.specifier
        if bound.operator == ">="
    }


@pytest.mark.parametrize(("package", "lowest"), bounds().items(), ids=bounds())
def test_every_lower_bound_is_tested(package: str, lowest: Version) -> None:
    assert pins("constraints-lowest.txt")[package] == lowest
    assert pins("constraints.txt")[package] >= lowest


def test_only_the_stubs_go_without_a_lower_bound() -> None:
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    unbounded = [t for t in [*PROJECT["dependencies"], *extras] if not Requirement(t).specifier]
    assert unbounded == ["types-PyYAML"]
