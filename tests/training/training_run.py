"""A real training in a process of its own: training_run.py OUT RESULT [resume] [SIGNAL@STEP].

The signal hits the process right after so many steps, so that no test depends on the time.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import TrainingSettings, load_data, loop, train

SETTINGS = TrainingSettings(
    epochs=3,
    batch_size=32,
    ema=0.9,
    augment={"crop_padding": 1, "flip": True, "erase": 0.2},
    device="cpu",
)


def main(out: str, result: str, *options: str) -> None:
    data = load_data(limit=200)
    space = SearchSpace.from_dict(
        {
            "name": "tiny",
            "resolution": 8,
            "input_channels": 1,
            "stem": {"channels": 8, "stride": 1},
            "stages": [
                {"channels": 8, "layers": 1, "stride": 1},
                {"channels": 16, "layers": 2, "stride": 2},
            ],
            "head": 32,
        }
    )
    torch.manual_seed(1)
    network = build_network(space, Architecture(("k3_e1", "k5_e1_g2", "skip"), "tiny"), classes=10)
    for option in options:
        if "@" in option:
            name, step = option.split("@")
            hit_after(int(step), signal.Signals[name])
    resume = "resume" in options
    trained = train(network, data, settings=SETTINGS, out=out, resume=resume)
    torch.save({"weights": trained.network.state_dict(), "history": trained.history}, Path(result))


def hit_after(steps: int, number: int) -> None:
    take_step, taken = loop._step, []

    def step_and_count(*args: Any, **options: Any) -> torch.Tensor:
        totals = take_step(*args, **options)
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), number)
        return totals

    loop._step = step_and_count


if __name__ == "__main__":
    main(*sys.argv[1:])
