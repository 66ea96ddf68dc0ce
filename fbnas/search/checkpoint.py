"""The checkpoint of a search: written at each epoch's end, every few minutes, and on Ctrl-C."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fbnas.errors import InputError
from fbnas.files import load_checkpoint
from fbnas.training.processes import summed

if TYPE_CHECKING:
    from fbnas.search.loop import Loop


def state_of(loop: "Loop") -> dict[str, Any]:
    """Return everything that the rest of the search depends on; all processes take part."""
    return {
        "recipe": recipe(loop),
        "supernet": loop.supernet.state_dict(),
        "weights_optimiser": loop.weights_optimiser.state_dict(),
        "learners": [
            {
                "logits": learner.distribution.logits.detach(),
                "optimiser": learner.optimiser.state_dict(),
                "multipliers": learner.multipliers,
            }
            for learner in loop.learners
        ],
        "position": [loop.epoch, loop.phase, loop.step],
        "sums": {part: summed(sums, loop.fabric) for part, sums in loop.sums.items()},
        "epoch_seconds": loop.epoch_seconds_before + time.monotonic() - loop.epoch_started,
        "data_wait_seconds": loop.wait.seconds,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(loop.device) if loop.device.type == "cuda" else None,
        "scaler": _scaler_state(loop),
    }


def _scaler_state(loop: "Loop") -> dict[str, Any]:
    """Return the state of fp16's loss scale; empty at other precisions."""
    found: dict[str, Any] = loop.fabric.strategy.precision.state_dict()
    return found


def recipe(loop: "Loop") -> dict[str, Any]:
    """Return what must be the same for a checkpoint to be continued."""
    settings = asdict(loop.settings) | {"precision": loop.fabric.strategy.precision.precision}
    for key in ("device", "checkpoint_every_s", "choice_every"):
        settings.pop(key)
    return {
        "space": loop.supernet.space.to_dict(),
        "data": [loop.data.name, len(loop.data.train), list(loop.data.class_names)],
        "budgets_ms": [learner.target.budget_ms for learner in loop.learners],
        "resolutions": [x.target.resolution for x in loop.learners if x.target.resolution],
        "tables": [  # nan, where a block is not offered, would equal nothing
            [learner.base_ms, *learner.latency_ms.nan_to_num(-1.0).flatten().tolist()]
            for learner in loop.learners
        ],
        "limits": [
            [limit.name, limit.budget, limit.base, *limit.cost.nan_to_num(-1.0).flatten().tolist()]
            for learner in loop.learners
            for limit in learner.limits[1:]
            if limit.bounded
        ],
        "objective": repr(loop.objective),
        "search": settings,
        "seed": loop.seed,
    }


def read(loop: "Loop", path: Path) -> dict[str, Any]:
    """Read a checkpoint and see that it is of this search.

    Raises:
        InputError: a checkpoint that is damaged, or of something else than this search.
    """
    state: dict[str, Any] = load_checkpoint(path)
    if not isinstance(state, dict) or "recipe" not in state:
        raise InputError(
            f"{path} is not the checkpoint of a search; give the folder of one, or start again "
            "with overwrite=true."
        )
    for key, value in recipe(loop).items():
        before = state["recipe"].get(key, [])  # older ones knew no further limits
        if before != value:
            raise InputError(
                f"{path} is of another search: {_difference(key, before, value)}; resume "
                "with the same options, or start again with overwrite=true."
            )
    return state


def take_up(loop: "Loop", state: dict[str, Any], path: Path) -> None:
    """Put a search where its checkpoint left off.

    Raises:
        InputError: the state is not whole.
    """
    try:
        _take_up(loop, state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(
            f"{path}: the checkpoint does not fit this search ({reason}); expected one "
            "that fbnas search wrote. Start again with overwrite=true."
        ) from error


def _take_up(loop: "Loop", state: dict[str, Any]) -> None:
    loop.supernet.load_state_dict(state["supernet"])
    loop.weights_optimiser.load_state_dict(state["weights_optimiser"])
    for learner, stored in zip(loop.learners, state["learners"], strict=True):
        with torch.no_grad():
            learner.distribution.logits.copy_(stored["logits"])
        learner.optimiser.load_state_dict(stored["optimiser"])
        learner.multipliers = {name: stored["multipliers"][name] for name in learner.multipliers}
    loop.epoch, loop.phase, loop.step = state["position"]
    for part, sums in state["sums"].items():  # those of all processes: the first goes on with them
        loop.sums[part] = sums.to(loop.device) * loop.first
    loop.epoch_seconds_before = state["epoch_seconds"]
    loop.wait.seconds = state.get("data_wait_seconds", 0.0)  # older ones did not measure it
    torch.set_rng_state(state["rng"].cpu())
    if state["cuda_rng"] is not None and loop.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"].cpu(), loop.device)
    if state["scaler"]:
        loop.fabric.strategy.precision.load_state_dict(state["scaler"])


def _difference(key: str, before: Any, now: Any) -> str:
    """Say in a few words what differs between two values of a recipe."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in now:
            if before.get(name) != now[name]:
                return _difference(f"{key}.{name}", before.get(name), now[name])
    if len(f"{before}{now}") > 200:
        return f"{key} differ"
    return f"{key} was {before}, now {now}"
