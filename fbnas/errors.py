"""The one error that means "the user's input is wrong" and how to word it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input: one line that says what happened, what was expected and the way out.

    Commands print it without a traceback and exit with 2.
    """


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like `name`, or None where nothing is alike."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def check_known(kind: str, names: Iterable[object], known: Iterable[str]) -> None:
    """Refuse the first of `names` that is not a known one.

    Raises:
        InputError: as `unknown` words it.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """Build the error for an unknown name: it names the closest and lists the known ones."""
    names = sorted(set(known))
    guess = closest(str(name), names)
    hint = f"Did you mean '{guess}'? " if guess else ""
    return InputError(f"Unknown {kind} '{name}'. {hint}Known: {', '.join(names)}.")
