"""How a network is trained, and on which device."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from fbnas.errors import InputError, check_known
from fbnas.training.distillation import Distillation


@dataclass(frozen=True)
class TrainingSettings:
    """How a network is trained; lr, momentum and decay are FBNet's, the rest is for small images.

    `ema`: decay of the moving average of weights per step, 0 for none. `augment`: options of
    `build_augmentation`. `distillation`: options of `Distillation`, for where there is a teacher.
    `precision`: "fp32", or "bf16" by autocast. `device`: "auto" takes a GPU if any.

    Raises:
        InputError: a value out of its range.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    ema: float = 0.99
    warmup_epochs: float = 1.0
    augment: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    device: str = "auto"

    def __post_init__(self) -> None:
        ranges = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2, which batch normalisation needs"),
            "lr": (0 < self.lr < math.inf, "more than 0"),
            "momentum": (0 < self.momentum < 1, "more than 0 and less than 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "0 or more and less than 1"),
            "ema": (0 <= self.ema < 1, "0 (off) or more and less than 1"),
            "warmup_epochs": (0 <= self.warmup_epochs < math.inf, "0 or more"),
            "precision": (self.precision in ("fp32", "bf16"), "fp32 or bf16"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; expected {expected}.")
        Distillation.from_dict(self.distillation)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TrainingSettings":
        """Build settings from a mapping; an unknown key is refused with the closest known one."""
        check_known("training setting", content, [f.name for f in fields(cls)])
        return cls(**content)


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is a GPU where there is one.

    Raises:
        InputError: a name torch does not know, or a device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {name} cannot be used ({reason}); expected auto, cpu or one this machine has."
        ) from error
    return device
