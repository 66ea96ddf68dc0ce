"""Low rank: a layer becomes fewer filters and a 1x1 that mixes them, from its responses.

Zhang et al. 2016 (arXiv 1505.06798). The responses y = W x of a layer lie near a space of few
dimensions, so that y is about M y + b with M = P Q^T of rank d' < d. Then Q^T W are d' filters, and
P a 1x1 convolution to the d channels. Their multiply-adds are d' (k^2 c + d) instead of k^2 c d a
place.

Where batch normalisation follows, the response is what it gives out, since that is what the network
goes on with: a response of a channel that it scales down counts less. It stays where it is; the 1x1
gives what it expects.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fbnas.compression.dataflow import Call, layer_calls
from fbnas.compression.method import Applied, Method
from fbnas.compression.responses import outputs_of, training_images
from fbnas.errors import InputError
from fbnas.space.network import count
from fbnas.space.structure import factored

if TYPE_CHECKING:
    from fbnas.compression.method import Tools

PENALTIES = (0.01, 1.0)  # section 2.2: lambda, first small, then large
ITERATIONS = 25  # with each; section 2.2
NEGLIGIBLE = 1e-8  # of the largest variance: what float32 makes of directions without any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LowRank(Method):
    """Factor convolutions and linear layers by their responses, then fine-tune.

    Layers are taken in the order of execution. Each is fitted to give the responses of the network
    as it was from inputs that the factored layers before it give (section 2.3, asymmetric), after
    the ReLU where one follows (section 2.2); where none does, or another activation, before it.
    Grouped and depthwise convolutions, layers that are called more than once, and those where two
    layers would compute as much as one are left alone.

    Args:
        energy: of each layer the least rank whose eigenvalues of the responses' covariance are
            this fraction of all, 0 < energy <= 1.
        speedup: instead, how many times fewer multiply-adds the whole network is to have; ranks are
            then chosen over all layers for the greatest product of energies (section 2.4).
        images: training images that responses are taken from (the paper: 3000).
        places: of each image (the paper: 10).
    """

    NAME: ClassVar[str] = "low_rank"
    SECTION: ClassVar[str] = "low_rank"

    energy: float = 0.95
    speedup: float | None = None
    images: int = 1000
    places: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise InputError(f"energy is {self.energy}; expected a fraction, 0 < energy <= 1.")
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise InputError(f"speedup is {self.speedup}; expected more than 1, or null.")
        for name in ("images", "places"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1.")

    def apply_(self, model: nn.Module, tools: "Tools") -> Applied:
        """Factor the layers, then fine-tune."""
        changes = factor_(model, self, tools)
        return Applied(changes, tools.tune(model))


@dataclass(frozen=True)
class Factored:
    """What became of a layer.

    width: d, its channels. rank: d', as `width` where it was left alone. energy: fraction of the
    responses' variance in so many principal directions. error: squared, of the responses after the
    ReLU, relative to their variance, on the images that it was fitted to. reason: why it was left
    alone.
    """

    layer: str
    width: int
    rank: int
    energy: float = 1.0
    error: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Spectrum:
    """A layer that may be factored: eigenvalues of its responses' covariance, largest first.

    whole_macs: of the layer as it is. rank_macs: of the two layers, for each rank.
    """

    layer: str
    eigenvalues: tuple[float, ...]
    whole_macs: int
    rank_macs: int

    @property
    def width(self) -> int:
        """Channels of the layer."""
        return len(self.eigenvalues)

    def macs(self, rank: int) -> int:
        """Multiply-adds with a rank; the layer stays whole where that is no more."""
        return min(self.whole_macs, rank * self.rank_macs)

    def pays(self, rank: int) -> bool:
        """Whether two layers are less work than one."""
        return rank * self.rank_macs < self.whole_macs

    def energy(self, rank: int) -> float:
        """Return the fraction of variance in the first `rank` directions."""
        total = sum(self.eigenvalues)
        return sum(self.eigenvalues[:rank]) / total if total > 0 else 1.0


def factor_(model: nn.Module, method: LowRank, tools: "Tools") -> tuple[Factored, ...]:
    """Factor in place, without fine-tuning; return what became of each layer.

    Raises:
        InputError: no data, or a speed-up that no ranks give.
    """
    calls = {call.name: call for call in layer_calls(model, tools.input_shape)}
    refused = {name: reason for name, call in calls.items() if (reason := _refusal(call))}
    taken = {name: call for name, call in calls.items() if name not in refused}
    images = training_images(tools, method.images, next(model.parameters()).device)
    sampling = {"images": images, "places": method.places, "seed": tools.seed}
    ends = {name: call.norm or call.layer for name, call in taken.items()}
    responses = outputs_of(model, ends, **sampling)  # type: ignore[arg-type]
    spectra = _spectra(model, taken, responses, tools.input_shape)
    ranks = _ranks(model, spectra, method, tools.input_shape)
    changes = []
    for name, call in calls.items():
        width = call.layer.weight.shape[0]
        if name in refused:
            changes.append(Factored(name, width, width, reason=refused[name]))
        elif not spectra[name].pays(ranks[name]):
            changes.append(Factored(name, width, width, reason="no rank that is less work"))
        else:
            given = outputs_of(model, {name: call.layer}, **sampling)[name]  # type: ignore[arg-type]
            rank, error = _replace_(model, call, ranks[name], given, responses[name])
            energy = spectra[name].energy(rank)
            changes.append(Factored(name, width, rank, energy, error))
            logger.info("%s: rank %d of %d", name, rank, width)
    return tuple(changes)


def _refusal(call: Call) -> str:
    if not call.name:
        return "the network itself"
    if isinstance(call.layer, nn.Conv2d) and call.layer.groups > 1:
        return "grouped"
    return "" if call.once else "called more than once"


def _spectra(
    model: nn.Module,
    calls: dict[str, Call],
    responses: dict[str, Tensor],
    input_shape: tuple[int, int, int],
) -> dict[str, Spectrum]:
    found = {}
    macs = _macs(model, {name: call.layer for name, call in calls.items()}, input_shape)
    for name, call in calls.items():
        rows = responses[name].double()
        covariance = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0)
        weight = call.layer.weight
        width, taps = weight.shape[0], weight[0].numel()
        places = macs[name] // weight.numel()
        found[name] = Spectrum(
            name, tuple(eigenvalues.tolist()), macs[name], places * (taps + width)
        )
    return found


def _macs(
    model: nn.Module,
    layers: dict[str, nn.Conv2d | nn.Linear],
    input_shape: tuple[int, int, int],
) -> dict[str, int]:
    """Return the multiply-adds of layers for one image."""
    found = {}

    def hook(name: str, layer: nn.Conv2d | nn.Linear) -> object:
        def note(_: nn.Module, __: object, output: Tensor) -> None:
            found[name] = layer.weight.numel() * output[0].numel() // layer.weight.shape[0]

        return layer.register_forward_hook(note)

    hooks = [hook(name, layer) for name, layer in layers.items()]
    count(model, input_shape)
    for registered in hooks:
        registered.remove()  # type: ignore[attr-defined]
    return found


def _ranks(
    model: nn.Module,
    spectra: dict[str, Spectrum],
    method: LowRank,
    input_shape: tuple[int, int, int],
) -> dict[str, int]:
    if method.speedup is None:
        ranks = [rank_for_energy(spectrum, method.energy) for spectrum in spectra.values()]
    else:
        macs = count(model, input_shape).macs
        fixed = macs - sum(spectrum.whole_macs for spectrum in spectra.values())
        least = fixed + sum(spectrum.macs(1) for spectrum in spectra.values())
        if macs < method.speedup * least:
            raise InputError(
                f"speedup is {method.speedup}; expected at most {macs / least:.2f}, which all "
                "ranks of 1 would give: the other layers cannot be factored."
            )
        budget = int(macs / method.speedup) - fixed
        ranks = ranks_for_macs(list(spectra.values()), budget)
    return dict(zip(spectra, ranks, strict=True))


def rank_for_energy(spectrum: Spectrum, energy: float) -> int:
    """Return the least rank whose energy is `energy`."""
    enough = (rank for rank in range(1, spectrum.width) if spectrum.energy(rank) >= energy)
    return next(enough, spectrum.width)


def ranks_for_macs(spectra: Sequence[Spectrum], budget_macs: int) -> list[int]:
    """Choose ranks for a great product of energies within a budget of multiply-adds.

    Greedy (section 2.4): from full ranks, the eigenvalue goes that loses least of the product for
    the multiply-adds it saves, (sigma_d' / sum_{a <= d'} sigma_a) / (macs of a rank).
    """
    ranks = [spectrum.width for spectrum in spectra]

    def loss(index: int) -> float:
        spectrum, rank = spectra[index], ranks[index]
        kept = sum(spectrum.eigenvalues[:rank])
        return spectrum.eigenvalues[rank - 1] / kept / spectrum.rank_macs if kept > 0 else 0.0

    while sum(s.macs(rank) for s, rank in zip(spectra, ranks, strict=True)) > budget_macs:
        index = min((i for i, rank in enumerate(ranks) if rank > 1), key=loss)
        ranks[index] -= 1
    return ranks


def _replace_(
    model: nn.Module, call: Call, rank: int, given: Tensor, wanted: Tensor
) -> tuple[int, float]:
    """Put two layers in the place of one; return their rank and the error of the responses.

    given: rows (n, d) of what the layer answers in the network so far. wanted: of what it, and the
    normalisation after it, answered at first.
    """
    outer, inner, offset, error = fit(given, wanted, rank, relu=call.relu)
    weight = call.layer.weight.detach().double()
    if call.layer.bias is not None:  # Q^T (W x + bias), whose second part goes through P
        offset = offset + outer @ (inner.T @ call.layer.bias.detach().double())
    outer, offset = _before_norm(call.norm, outer, offset)
    pair = factored(call.layer, outer.shape[1])
    tensors = {
        "0.weight": (inner.T @ weight.flatten(1)).view(-1, *weight.shape[1:]),
        "1.weight": outer.view(*outer.shape, *[1] * (weight.ndim - 2)),
        "1.bias": offset,
    }
    pair.load_state_dict(tensors)
    model.set_submodule(call.name, pair)
    return outer.shape[1], error


def _before_norm(
    norm: nn.BatchNorm2d | None, outer: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn what is to come out of a normalisation, P z + b, into what is to go in.

    It gives out scale * v + shift. A channel of scale zero gives out its shift whatever goes in.
    """
    if norm is None:
        return outer, offset
    assert norm.running_mean is not None and norm.running_var is not None
    mean = norm.running_mean.double()
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -mean * scale
    if norm.affine:
        weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
        scale, shift = scale * weight, shift * weight + bias
    silent = scale == 0
    scale = scale.masked_fill(silent, 1.0)
    outer = (outer / scale[:, None]).masked_fill(silent[:, None], 0.0)
    return outer, torch.where(silent, mean, (offset - shift) / scale)


def fit(
    given: Tensor, wanted: Tensor, rank: int, *, relu: bool
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return P (d, d'), Q (d, d') and b (d,) so that P Q^T y + b answers as `wanted`.

    Minimises sum_i ||r(u_i) - r(P Q^T y_i + b)||^2 with r the ReLU, or the identity without `relu`
    (equations 6 and 10). The solver of section 2.2 alternates, from the linear solution on, between
    auxiliary responses z and (P, Q, b), with a penalty lambda ||z_i - (P Q^T y_i + b)||^2 that
    grows; of all that it passes the best is taken.

    Args:
        given: y, rows (n, d).
        wanted: u, rows (n, d), before the ReLU.

    Returns:
        P, Q, b and the error, relative to the variance of r(u).
    """
    regression = ReducedRank(given, rank)
    best = regression.fit(wanted)
    if not relu:
        return *best, _relative(wanted, regression.answers(*best))
    target = wanted.relu()
    found, least = best, _relative(target, regression.answers(*best).relu())
    for penalty in PENALTIES:
        for _ in range(ITERATIONS):
            responses = auxiliary(target, regression.answers(*found), penalty)
            found = regression.fit(responses)
            error = _relative(target, regression.answers(*found).relu())
            if error < least:
                best, least = found, error
    return *best, least


def _relative(target: Tensor, found: Tensor) -> float:
    variance = float((target - target.mean(0)).square().sum())
    error = float((target - found).square().sum())
    return error / variance if variance > 0 else 0.0


def auxiliary(target: Tensor, answers: Tensor, penalty: float) -> Tensor:
    """Return z that minimises (r(u) - r(z))^2 + lambda (z - y')^2, each element alone.

    It is min(0, y') or max(0, (lambda y' + r(u)) / (lambda + 1)), whichever is less (section 2.2).

    Args:
        target: r(u).
        answers: y'.
    """
    below = answers.clamp(max=0)
    above = ((penalty * answers + target) / (penalty + 1)).clamp(min=0)
    cost_below = target.square() + penalty * (below - answers).square()
    cost_above = (target - above).square() + penalty * (above - answers).square()
    return torch.where(cost_below < cost_above, below, above)


class ReducedRank:
    """Reduced-rank regression on fixed inputs: min sum_i ||z_i - (M y_i + b)||^2, rank M <= d'.

    With centred rows, M_full = Z^T Y (Y^T Y)^-1 and G = Y^T Y; of the singular values of M_full
    with the metric G (section 2.2, generalised SVD) the first d' are kept. Y is whitened once, to
    Y G^-1/2, in which they are those of Z^T Y G^-1/2. Directions in which the inputs do not vary
    are left out, so that there may be fewer than d'.
    """

    def __init__(self, inputs: Tensor, rank: int) -> None:
        self.inputs = inputs
        self._mean = inputs.mean(0)
        centred = (inputs - self._mean).double()
        variances, directions = torch.linalg.eigh(centred.T @ centred)
        varying = variances > NEGLIGIBLE * variances[-1].clamp(min=torch.finfo().tiny)
        self._whitening = directions[:, varying] / variances[varying].sqrt()  # (d, k)
        self._white = (centred @ self._whitening).to(inputs.dtype)
        self.rank = min(rank, max(int(varying.sum()), 1))

    def fit(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return P (d, d'), Q (d, d') of balanced scale, and b (d,), float64, for rows (n, d)."""
        crossed = (targets.T @ self._white).double()  # centred targets would give the same
        left, values, right = torch.linalg.svd(crossed, full_matrices=False)
        kept = slice(self.rank)
        scales = values[kept].sqrt()
        outer, inner = left[:, kept] * scales, self._whitening @ (right[kept].T * scales)
        if not len(scales):  # inputs that do not vary
            outer, inner = (targets.new_zeros(targets.shape[1], 1).double() for _ in range(2))
        offset = targets.mean(0).double() - outer @ (inner.T @ self._mean.double())
        return outer, inner, offset

    def answers(self, outer: Tensor, inner: Tensor, offset: Tensor) -> Tensor:
        """Return P Q^T y_i + b for all rows."""
        outer, inner, offset = (x.to(self.inputs.dtype) for x in (outer, inner, offset))
        return (self.inputs @ inner) @ outer.T + offset
