"""Values of options, checked against the kind of the shipped ones before a command sees them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fbnas.errors import InputError, unknown

NUMBERS = (
    "target_ms",
    "target_mj",
    "target_mb",
    "max_params",
    "resolution",
    "rounds",
    "seconds",
    "compression.low_rank.speedup",
    "compression.qat.weight_bits",
    "search.clip_norm",
    "data.resolution",
    "data.channels",
    "data.limit",
    "data.workers",
    "compression.quantization.max_accuracy_drop",
)  # null by default
WHOLE = (
    "rounds",
    "resolution",
    "compression.qat.weight_bits",
    "data.resolution",
    "data.channels",
    "data.limit",
    "data.workers",
)
SWITCHES = ("compression.quantization.reduce_range", "reduce_range")  # null by default
LISTS = {  # options that take one value or a list of them
    "search": (
        "table",
        "target_ms",
        "target_mj",
        "target_mb",
        "max_params",
        "target_fraction",
        "resolution",
        "targets",
    ),
    "train": ("teacher",),
    "compress": ("method", "compression.fine_tuning.teacher"),
    "run": ("teacher", "compression.fine_tuning.teacher"),
    "export": ("format", "precision"),
    "report": ("run",),
}
MAPPINGS = {  # options that are null or name several things
    "train": ("heads",),
    "compress": ("heads", "compression.sparsity.layers"),
    "run": ("compression.sparsity.layers",),
    "export": ("heads",),
    "evaluate": ("heads",),
}
LEAST = {
    "classes": 1,
    "candidates": 1,
    "count": 1,
    "compression.quantization.calibration_images": 1,
    "compression.quantization.batch_size": 1,
    "compression.quantization.sensitivity_images": 1,
    "data.device_mb": 0,
    "data.workers": 0,
    "halving_epochs": 1,
    "networks": 0,
    "ranked": 1,
    "random": 0,
    "seed": 0,
    "threads": 1,
    "launcher.jobs": 1,
    "launcher.gpus": 0,
    "launcher.cpus": 1,
    "launcher.time_min": 1,
    "launcher.requeues": 0,
}


def check_values(
    command: str,
    config: Mapping[str, Any],
    *,
    shipped: Iterable[tuple[str, Any]],
    groups: Sequence[str],
) -> dict[str, Any]:
    """Return the configuration, with names that look like numbers as text.

    Args:
        shipped: every key that the command knows, with a value that it has in a shipped file.
        groups: what an experiment may also bring, for other commands.

    Raises:
        InputError: an unknown option, or a value of another kind than the shipped one.
    """
    checked, examples = dict(config), _examples(shipped)
    known = {key.partition(".")[0] for key in examples}
    for key in config:
        if key not in known and key not in groups:
            raise unknown("option", key, known)
    for key, example in examples.items():
        *parents, name = key.split(".")
        holder: Any = checked
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, Mapping) else None
        value = holder.get(name) if isinstance(holder, Mapping) else None
        if value is None or (key in LISTS.get(command, ()) and isinstance(value, list)):
            continue
        if key in MAPPINGS.get(command, ()):
            if not isinstance(value, Mapping):
                raise InputError(f"{key}={value!r}; expected a mapping, as in {{a: runs/a}}.")
            continue
        expected = _expected(key, value, example)
        if expected:
            raise InputError(f"{key}={value!r}; expected {expected}.")
        if _is_name(key, example):
            holder[name] = str(value)
    return checked


def _examples(shipped: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a value per key: of several the one that says most, so a fraction before null."""
    examples: dict[str, Any] = {}
    for key, value in shipped:
        if examples.get(key) is None or isinstance(value, float):
            examples[key] = value
    return examples


def _is_name(key: str, example: Any) -> bool:
    return key not in (*NUMBERS, *SWITCHES) and (example is None or isinstance(example, str))


def _expected(key: str, value: Any, example: Any) -> str | None:
    """Say what the option takes, or None where the value is that."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(example, bool) or key in SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if isinstance(example, int):
        least = LEAST.get(key, -math.inf)
        from_least = f" from {least}" if key in LEAST else ""
        whole = number and isinstance(value, int) and value >= least
        return None if whole else f"a whole number{from_least}"
    if key in WHOLE:
        least = LEAST.get(key, 1)
        whole = number and isinstance(value, int) and value >= least
        return None if whole else f"a whole number from {least}"
    if isinstance(example, float) or key in NUMBERS:
        return None if number else "a number"
    if isinstance(example, list | dict):
        kind = "a list, as in [a, b]" if isinstance(example, list) else "a mapping, as in {a: 1}"
        return None if isinstance(value, type(example)) else kind
    return "one value" if isinstance(value, list | dict) else None
