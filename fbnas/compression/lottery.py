"""Lottery tickets: sparse networks that train, from the weights they began with, as the whole does.

Iterative magnitude pruning with rewinding to the initialisation (Frankle & Carbin 2019, arXiv
1803.03635) or to an early step (Frankle et al. 2020, arXiv 1912.05671), and the control of both:
the same masks over other random weights.
"""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fbnas.compression.holding import shared, weighted
from fbnas.compression.magnitude import (
    CONVOLUTION,
    LINEAR,
    Layers,
    check_layers,
    prunable,
    sparsity_of,
    zero_smallest_,
)
from fbnas.compression.method import Applied, Method, Tools
from fbnas.errors import InputError, unknown
from fbnas.files import atomic_write
from fbnas.space.network import Network, initialise_, read_weights

SCOPES = ("global", "layer")
TABLE_FILE = "lottery.csv"
CONTROL_SEEDS = 1_000_003  # far from the seeds of other tickets
TINY = torch.finfo(torch.float32).tiny

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class LotteryTicket(Method):
    """Find a sparse network by rounds of train, prune, rewind; leave it trained.

    The weights that the given network began with are not known, so a new beginning is drawn by
    `tools.seed` (`fbnas train` with that seed began with the same) and trained first; or
    `rewind_to` gives them, and the network as given is what they were trained to. After each round
    the zeros stay, and all else - other weights, biases, batch normalisation - goes back. A round
    trains by `tools.retrain`, so the whole takes 1 + rounds trainings, twice the rounds with
    `control`.

    Args:
        rounds: how often to prune and rewind.
        fraction: of the weights still there that a round prunes: 1 - (1 - fraction)^rounds are zero
            in the end, of those of the pruned layers. 0.2 is that of both papers.
        scope: "global" ranks the weights of all layers against each other, as both papers do where
            networks are deep; "layer" prunes the fraction of each.
        rewind_epochs: rewind to the weights after so many epochs, a short training of its own with
            its own rates, instead of to the initialisation: deep networks need it.
        rewind_to: a weights.safetensors file to rewind to.
        control: also train, in each round, the same mask over other random weights, with the same
            short training first where there is one: what the ticket's weights are worth is the
            difference. What is left in the network is the ticket.
        kinds, min_weights, max_sparsity: as of `Sparsity`.

    Raises:
        InputError: a value out of its range.
    """

    NAME: ClassVar[str] = "lottery_ticket"
    SECTION: ClassVar[str] = "lottery_ticket"

    rounds: int = 5
    fraction: float = 0.2
    scope: str = "global"
    rewind_epochs: int = 0
    rewind_to: str | None = None
    control: bool = False
    kinds: Sequence[str] = (CONVOLUTION, LINEAR)
    min_weights: int = 0
    max_sparsity: float = 0.99

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("rewind_epochs", 0)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name} is {getattr(self, name)}; expected a whole number of at least {least}."
                )
        for name in ("fraction", "max_sparsity"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}; expected more than 0, less than 1."
                )
        if self.scope not in SCOPES:
            raise unknown("scope of lottery_ticket", self.scope, SCOPES)
        if self.rewind_to is not None and self.rewind_epochs:
            raise InputError(
                f"rewind_epochs is {self.rewind_epochs} and rewind_to {self.rewind_to}; expected "
                "one of them: the file says how early its weights are."
            )
        object.__setattr__(self, "kinds", check_layers(self.kinds, self.min_weights))

    def apply_(self, model: nn.Module, tools: Tools) -> Applied:
        """Train, prune and rewind; the network ends as the last round's ticket, trained."""
        layers = prunable(model, kinds=self.kinds, min_weights=self.min_weights)
        _check_beginning(model, tools)
        early, trained = self._begin_(model, tools)
        rounds = [Round(0, sparsity_of(layers), _accuracy(model, tools))]
        for number in range(1, self.rounds + 1):
            self._prune_(layers)
            masks = masks_of(model)
            control = self._control(model, masks, tools, number) if self.control else None
            rewind_(model, early, masks)
            trained = tools.retrain(model)
            rounds.append(Round(number, sparsity_of(layers), _accuracy(model, tools), control))
            logger.info("%s", rounds[-1])
        if tools.folder is not None:
            write_rounds(tools.folder / TABLE_FILE, rounds)
        return Applied(tuple(rounds), trained)

    def _prune_(self, layers: Layers) -> None:
        groups = [layers] if self.scope == "global" else [{n: x} for n, x in layers.items()]
        for group in groups:
            kept = (1 - sparsity_of(group)) * (1 - self.fraction)
            zero_smallest_(group, 1 - kept, max_sparsity=self.max_sparsity)

    def _begin_(self, model: nn.Module, tools: Tools) -> tuple[State, Any]:
        """Leave the network trained; return the weights to rewind to, and what its training did."""
        if self.rewind_to is not None:
            return weights_to_rewind_to(Path(self.rewind_to), model), None
        masks = masks_of(model)
        initialise_anew_(model, tools.seed)
        early = self._early(model, masks, tools)
        return early, tools.retrain(model)

    def _early(self, model: nn.Module, masks: Mapping[str, Tensor], tools: Tools) -> State:
        """Return the weights after the short training, if any, of a network just initialised."""
        rewind_(model, _state(model), masks)
        if self.rewind_epochs:
            tools.retrain(model, epochs=self.rewind_epochs)
        return _state(model)

    def _control(
        self, model: nn.Module, masks: Mapping[str, Tensor], tools: Tools, number: int
    ) -> float | None:
        """Return what the masks come to with random weights of their own."""
        other = deepcopy(model)
        initialise_anew_(other, CONTROL_SEEDS * (tools.seed + 1) + number)
        self._early(other, masks, tools)
        tools.retrain(other)
        return _accuracy(other, tools)


@dataclass(frozen=True)
class Round:
    """A round: the fraction of zeros, and the validation accuracy of ticket and control, trained.

    Round 0 is the network before any pruning. An accuracy is None without data, the control's also
    where there was none.
    """

    number: int
    sparsity: float
    accuracy: float | None
    control_accuracy: float | None = None

    def __str__(self) -> str:
        of_ticket, of_control = (
            "" if value is None else f", {name} accuracy {value:.4f}"
            for name, value in (("ticket", self.accuracy), ("control", self.control_accuracy))
        )
        return f"round {self.number}: sparsity {self.sparsity:.3f}{of_ticket}{of_control}"


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return by parameter where the weights of convolutions and linear layers are not zero."""
    return {
        f"{name}.weight" if name else "weight": module.weight.detach() != 0
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


@torch.no_grad()
def rewind_(model: nn.Module, state: State, masks: Mapping[str, Tensor]) -> None:
    """Put weights, biases and statistics back, under the masks.

    A weight that began as exactly zero and is not masked begins at the smallest number instead:
    zero means pruned.
    """
    model.load_state_dict(state)
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        weight = weights[name]
        weight.copy_(torch.where(mask, torch.where(weight == 0, TINY, weight), 0.0))


def initialise_anew_(model: nn.Module, seed: int) -> None:
    """Draw new weights in place as the modules themselves do; torch's own generator is left alone.

    Networks of `build_network` are initialised by `initialise_` as they were built, others by their
    modules' `reset_parameters`.

    Raises:
        InputError: a module with parameters of its own has no `reset_parameters`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise InputError(
                    f"{name or 'the network'} ({type(module).__name__}) has parameters and no "
                    "reset_parameters() to draw them anew; expected one, or rewind_to=FILE."
                )
        if isinstance(model, Network):
            initialise_(model)


def weights_to_rewind_to(path: Path, model: nn.Module) -> State:
    """Read the weights to rewind to.

    Raises:
        InputError: no such file, damaged, or of another network.
    """
    if not path.is_file():
        raise InputError(f"rewind_to={path}: no such file; expected weights.safetensors.")
    state = read_weights(path)
    if _shapes(state) != _shapes(model.state_dict()):
        raise InputError(
            f"rewind_to={path}: the weights of another network; expected those that this one "
            "began with, of the same names and shapes."
        )
    return state


def write_rounds(path: Path, rounds: Sequence[Round]) -> None:
    """Write a row per round."""
    lines = ["round,sparsity,accuracy,control_accuracy"]
    for found in rounds:
        accuracies = (found.accuracy, found.control_accuracy)
        shown = ["" if value is None else f"{value:.6g}" for value in accuracies]
        lines.append(",".join([str(found.number), f"{found.sparsity:.6g}", *shown]))
    atomic_write(path, "\n".join(lines) + "\n")


def _check_beginning(model: nn.Module, tools: Tools) -> None:
    if tools.train is None and tools.train_anew is None:
        raise InputError(
            "LotteryTicket got nothing that trains; expected compress_(..., train_anew=FUNCTION)."
        )
    found = [shared(module.weight) for module in weighted(model)]
    if any(values is not None and bool(values[0].any()) for values in found):  # not all zeros
        raise InputError(
            "LotteryTicket begins with new weights, which would undo shared ones; expected it "
            "before the method that shares weights."
        )


def _accuracy(model: nn.Module, tools: Tools) -> float | None:
    return None if tools.data is None else tools.accuracy(model)


def _state(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}
