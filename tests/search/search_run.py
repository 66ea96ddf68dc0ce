"""A real, tiny search; also in a process of its own: search_run.py OUT [OPTION ...].

resume; plain: without augmentation; devices=N: on N processes; seed=N; watch: every process writes
what it holds after each epoch beside OUT; SIGNAL@STEP: the signal hits the first process, or that
of strike=N, right after so many steps, so that no test depends on the time.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.search import SearchResult, SearchSettings, Target, loop, search
from fbnas.space import SearchSpace
from fbnas.training.data import Data, load_data

BLOCKS = ("k3_e1", "k3_e3", "skip")
SPACE = SearchSpace.from_dict(
    {
        "name": "tiny",
        "resolution": 8,
        "input_channels": 1,
        "stem": {"channels": 8, "stride": 1},
        "stages": [
            {"channels": 8, "layers": 1, "stride": 1},
            {"channels": 16, "layers": 2, "stride": 2},
        ],
        "head": 16,
        "blocks": list(BLOCKS),
        "skip_on_reduction": False,
    }
)
SETTINGS: dict[str, Any] = {
    "epochs": 4,
    "warmup_epochs": 2,
    "batch_size": 32,
    "augment": {"crop_padding": 1, "erase": 0.2},
    "device": "cpu",
    "checkpoint_every_s": 0.0,  # a checkpoint at every step
}


@dataclass(frozen=True)
class Table:
    """A latency source: blocks cost 1, 3 and 0 ms, and a change to the identity has no skip."""

    factor: float = 1.0
    base_ms: float = 2.0

    def tensor(self, space: SearchSpace, *, classes: int | None = None) -> tuple[Tensor, float]:
        row = torch.tensor([1.0, 3.0, 0.0], dtype=torch.double) * self.factor
        cost = row.repeat(len(space.layers), 1)
        return cost.masked_fill(~space.offered, torch.nan), self.base_ms


def no_test_images() -> Any:
    raise AssertionError("the test images were loaded")


def small_digits(limit: int = 200) -> Data:
    """Digits, 8x8; whoever asks for the test images fails."""
    data = load_data(limit=limit)
    return Data(**{**{n: getattr(data, n) for n in FIELDS}, "load_test": no_test_images})


FIELDS = ("name", "class_names", "channels", "resolution", "train", "validation", "mean", "std")


def run(
    out: Path | None = None,
    *,
    data: Data | None = None,
    targets: list[Target] | None = None,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> SearchResult:
    return search(
        SPACE,
        data or small_digits(),
        targets or [Target(Table(), 5.0, "stub"), Target(Table(2.0), 9.0, "slower")],
        settings=SearchSettings(**{**SETTINGS, **(settings or {})}),
        out=out,
        **options,
    )


def hit_after(steps: int, number: int) -> None:
    """Send the signal to this process when so many steps are done, before they are saved."""
    finish_step, taken = loop.Loop.finish_step, []

    def count_and_finish(self: Any, epoch: int, stop: Callable[[], bool]) -> None:
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), number)
        finish_step(self, epoch, stop)

    loop.Loop.finish_step = count_and_finish  # type: ignore[method-assign]


def watch(out: Path) -> None:
    """Write theta, the weights and the paths drawn so far after every epoch of this process."""
    finish_epoch, weights_gates, paths = loop.Loop.finish_epoch, loop.Loop.weights_gates, []

    def note_gates(self: Any, *arguments: Any) -> Any:
        paths.append(weights_gates(self, *arguments))
        return paths[-1]

    def note_and_finish(self: Any, epoch: int) -> Any:
        held = {
            "paths": paths,
            "theta": {str(i): d.logits.detach() for i, d in enumerate(self.distributions)},
            "weights": dict(self.supernet.state_dict()),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(held, out.parent / f"rank_{self.fabric.global_rank}_epoch_{epoch}.pt")
        return finish_epoch(self, epoch)

    loop.Loop.weights_gates = note_gates  # type: ignore[method-assign]
    loop.Loop.finish_epoch = note_and_finish  # type: ignore[method-assign]


def main(out: Path, options: list[str]) -> int:
    from lightning_fabric import Fabric

    torch.set_num_threads(1)
    given = dict(option.split("=") for option in options if "=" in option)
    devices = int(given.get("devices", 1))
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    for option in options:
        if "@" in option and fabric.global_rank == int(given.get("strike", 0)):
            name, step = option.split("@")
            hit_after(int(step), signal.Signals[name])
    if "watch" in options:
        watch(out)
    settings = {"augment": {}} if "plain" in options else {}
    try:
        run(
            out,
            resume="resume" in options,
            settings=settings,
            seed=int(given.get("seed", 0)),
            fabric=fabric,
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
