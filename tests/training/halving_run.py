"""A real halving of four candidates: halving_run.py OUT [SIGNAL@STEP], which always resumes.

The signal hits the process right after so many steps, so that no test depends on the time.
"""

import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_run import hit_after

from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import Halved, TrainingSettings, halve, load_data
from fbnas.training.data import Data

SETTINGS = TrainingSettings(batch_size=32, ema=0.9, augment={"crop_padding": 1}, device="cpu")
SPACE = SearchSpace.from_dict(
    {
        "name": "tiny",
        "resolution": 8,
        "input_channels": 1,
        "stem": {"channels": 8, "stride": 1},
        "stages": [{"channels": 8, "layers": 2, "stride": 2}],
        "head": 32,
    }
)
CANDIDATES = [
    Architecture(blocks, "tiny", {"source": "by hand", "log_probability": -1.5})
    for blocks in (("skip", "skip"), ("k3_e3", "skip"), ("k5_e1", "k3_e1"), ("k3_e6", "k3_e6"))
]
STEPS = 4  # an epoch: 160 images, 128 of them to train on, batches of 32


def build(architecture: Architecture) -> nn.Module:
    return build_network(SPACE, architecture, classes=10)


def no_test_images() -> Any:
    raise AssertionError("the test images were loaded")


def small_digits() -> Data:
    data = load_data(limit=160)
    names = ("name", "class_names", "channels", "resolution", "train", "validation", "mean", "std")
    return Data(**{n: getattr(data, n) for n in names}, load_test=no_test_images)


def run(out: Path, **options: Any) -> list[Halved]:
    options = {"epochs": 1, "settings": SETTINGS, "resume": True, **options}
    return halve(CANDIDATES, build, small_digits(), out=out, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for option in sys.argv[2:]:
        name, step = option.split("@")
        hit_after(int(step), signal.Signals[name])
    run(Path(sys.argv[1]))
