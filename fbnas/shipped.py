"""Where the files that come with fbnas lie: in the checkout, or inside the installed wheel."""

from pathlib import Path

from fbnas.errors import InputError, closest


def configs_folder() -> Path:
    """Return the folder of the shipped YAML files (pyproject.toml puts it into the wheel)."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_names(group: str) -> list[str]:
    """Return the names that a group of configs offers, sorted."""
    return sorted(file.stem for file in (configs_folder() / group).glob("*.yaml"))


def looks_like_path(name: str) -> bool:
    """Return whether the user wrote a path rather than the name of a shipped file."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def find(group: str, name_or_path: str | Path) -> Path:
    """Return the YAML file of a shipped name, or the path itself.

    Raises:
        InputError: neither a shipped name nor an existing file.
    """
    name = str(name_or_path)
    if looks_like_path(name) or Path(name).is_file():
        if not Path(name).is_file():
            raise InputError(
                f"{name}: no such {group} file; expected a YAML file or one of the shipped names: "
                f"{', '.join(shipped_names(group))}."
            )
        return Path(name)
    path = configs_folder() / group / f"{name}.yaml"
    if not path.is_file():
        names = shipped_names(group)
        guess = closest(name, names)
        hint = f"Did you mean '{guess}'? " if guess else ""
        raise InputError(
            f"Unknown {group} '{name}'. {hint}Shipped: {', '.join(names)}; or give the path "
            "of a YAML file."
        )
    return path
