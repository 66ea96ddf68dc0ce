"""The recipe of a search."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from fbnas.errors import InputError, check_known, unknown
from fbnas.training.schedules import at, check_points, cosine

TAU_DECAY_PER_EPOCH = 0.045  # FBNet, section 4: tau is multiplied by exp(-0.045) each epoch of 90
PUBLISHED_EPOCHS = 90
SCHEDULED = ("tau", "theta_lr", "weights_lr")


@dataclass(frozen=True)
class SearchSettings:
    """The recipe. The defaults are `search=fast`; configs/search/fbnet.yaml is the published one.

    theta_step: how theta's gradient is found: "hard" (one path is mixed, all blocks judge it:
        straight-through), "all" (all blocks mixed by relaxed gates) or "two_paths" (two sampled
        blocks a layer, straight-through).
    draws: of gates in a theta step: one for the "batch", or one for each "example".
    weights_on: what a weights step trains once theta is awake: one sampled "path" (drawn from
        P_theta), one "uniform" path, or all blocks mixed by soft "gates".
    accumulate: parts of a batch whose gradients are summed up, where memory is short.
    clip_norm: largest norm of a weights gradient; None clips nothing.
    tau_final: None follows the paper: tau * exp(-0.045) per epoch of 90, stretched over `epochs`.
    schedule: of tau, theta_lr or weights_lr, points [part of the search, value] in place of the
        constants above; none keeps them. Theta sleeps while its rate starts with 0.
    choice_every: epochs between two looks at what would be chosen now; 0 takes none.
    """

    epochs: int = 60
    warmup_epochs: int | None = None
    warmup_fraction: float = 0.7
    batch_size: int = 64
    weights_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    weights_on: str = "path"
    theta_lr: float = 0.1
    theta_weight_decay: float = 0.0
    theta_passes: int = 1
    theta_step: str = "hard"
    draws: str = "batch"
    tau: float = 1.0
    tau_final: float | None = 1.0
    weights_fraction: float = 0.8
    accumulate: int = 1
    clip_norm: float | None = 1.0
    schedule: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    checkpoint_every_s: float = 300.0
    choice_every: int = 5

    def __post_init__(self) -> None:
        choices = {
            "theta_step": ("hard", "all", "two_paths"),
            "draws": ("batch", "example"),
            "weights_on": ("path", "uniform", "gates"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown(f"value of search.{name}:", getattr(self, name), known)
        for name in ("epochs", "batch_size", "theta_passes", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(
                    f"search.{name} is {value!r}; expected a whole number of at least 1."
                )
        if not isinstance(self.choice_every, int) or self.choice_every < 0:
            raise InputError(
                f"search.choice_every is {self.choice_every!r}; expected a whole number of epochs, "
                "0 for never."
            )
        for name in ("weights_fraction", "warmup_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"search.{name} is {getattr(self, name)}; expected between 0 and 1."
                )
        if self.draws == "example" and self.theta_step == "two_paths":
            raise InputError(
                "search.draws=example needs all blocks of a layer; expected search.theta_step=hard "
                "or all, or search.draws=batch."
            )
        for name in ("weights_lr", "theta_lr", "clip_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"search.{name} is {getattr(self, name)}; expected more than 0.")
        for name in ("momentum", "weight_decay", "theta_weight_decay"):
            if not 0 <= getattr(self, name) < (1 if name == "momentum" else math.inf):
                raise InputError(
                    f"search.{name} is {getattr(self, name)}; expected 0 or more"
                    f"{' and less than 1' if name == 'momentum' else ''}."
                )
        if self.tau <= 0 or (self.tau_final is not None and self.tau_final <= 0):
            raise InputError(f"search.tau is {self.tau}; expected a positive temperature.")
        check_known("schedule: search.schedule.", self.schedule, SCHEDULED)
        for name, points in self.schedule.items():
            if points:
                check_points(f"search.schedule.{name}", points, positive=name == "tau")
        rates = [self.theta_lr_at(epoch) for epoch in range(self.warmup, self.epochs)]
        if self.schedule.get("theta_lr") and min(rates, default=0) <= 0:
            raise InputError(
                f"search.schedule.theta_lr is {self.schedule['theta_lr']}: theta would fall asleep "
                "again, or never wake; expected 0 at its beginning only."
            )
        if not 0 <= self.warmup < self.epochs:
            raise InputError(
                f"search.warmup_epochs is {self.warmup} of {self.epochs} epochs; expected fewer, "
                "or theta never learns."
            )

    @property
    def warmup(self) -> int:
        """Epochs during which theta sleeps and every block is equally likely."""
        if self.schedule.get("theta_lr"):
            awake = (e for e in range(self.epochs) if self.theta_lr_at(e) > 0)
            return next(awake, self.epochs)
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return min(round(self.warmup_fraction * self.epochs), self.epochs - 1)

    def says_choice(self, epoch: int) -> bool:
        """Whether to say what would be chosen after an epoch, from 0: not in the warm-up."""
        awake = epoch >= self.warmup
        return awake and self.choice_every > 0 and (epoch + 1) % self.choice_every == 0

    def tau_at(self, epoch: int) -> float:
        """Temperature of an epoch, counted from 0; it follows the number of epochs asked for."""
        done = epoch / max(self.epochs - 1, 1)
        if self.schedule.get("tau"):
            return at(self.schedule["tau"], done, geometric=True)
        if self.tau_final is None:
            return self.tau * math.exp(-TAU_DECAY_PER_EPOCH * (PUBLISHED_EPOCHS - 1) * done)
        return self.tau * (self.tau_final / self.tau) ** done

    def theta_lr_at(self, epoch: int) -> float:
        """Adam's rate in an epoch, counted from 0."""
        if self.schedule.get("theta_lr"):
            return at(self.schedule["theta_lr"], epoch / max(self.epochs - 1, 1))
        return self.theta_lr

    def weights_lr_at(self, step: int, total: int) -> float:
        """SGD's rate in a step: a cosine down to 0, or as scheduled."""
        if self.schedule.get("weights_lr"):
            return at(self.schedule["weights_lr"], step / total)
        return self.weights_lr * cosine(step, total)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "SearchSettings":
        """Build from a mapping; an unknown key is refused with the closest known one."""
        check_known("search option", content, [f.name for f in fields(cls)])
        return cls(**content)
