"""Saliency: how much the loss is expected to rise when a channel's weights become zero.

The weights of a channel are all that leave with it: those that make it, its normalisation, and
those that read it, in every layer of its set. Torch-Pruning 1.6.1 finds the sets but not these
numbers: its GroupTaylorImportance adds absolute values of one batch, leaves batch normalisation and
depthwise convolutions out and loses the order that a shuffle brings; its GroupHessianImportance
keeps the squared gradient of the last image only.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbnas.compression.method import Tools
from fbnas.modes import modes_kept
from fbnas.training.data import Subset, batches
from fbnas.training.task import CLASSIFICATION, Task

BATCH_IMAGES = 32
PROBES = 8  # random vectors a batch; the mean over some 8 batches of them is within 20 % a weight

Values = Mapping[nn.Parameter, Tensor]  # a number per weight


def taylor(model: nn.Module, tools: Tools, *, images: int, seed: int) -> tuple[Values, ...]:
    """Return gradient times weight of every weight, for each of a few batches.

    The importance of a channel with the weights S is the mean over the batches of
    (sum over s in S of g_s w_s)^2, what the squared loss changes by to first order without them
    (Molchanov et al. 2019, arXiv 1906.10771, section 3.1, the joint importance of a group).

    Args:
        images: so many training images, drawn by `seed`.

    Raises:
        InputError: there are no images.
    """
    found = []
    with as_judged(model) as weights:
        for x, labels in _batches(model, tools, images, seed):
            loss = tools.task.loss(model(x).float(), labels)
            found.append(_times_weight(weights, _gradients(loss, weights)))
    return tuple(found)


def hessian(model: nn.Module, tools: Tools, *, images: int, seed: int) -> Values:
    """Return h_kk w_k^2 / 2 of every weight: what the loss rises by without it, to second order.

    Optimal Brain Damage (LeCun et al. 1990, equation 5): the network stands at a minimum, so the
    first order is left out, and of the Hessian only the diagonal is kept. That diagonal is the one
    of the Gauss-Newton matrix, J^T H_out J averaged over images (their section 2.2 drops the same
    term); where scores are piecewise linear in every single weight, as with ReLU, they are equal.
    It is estimated without a pass per image: for R = root of H_out and random signs r,
    E[(sum over images of J^T R r)^2] = the sum over images of diag(J^T H_out J).

    Args:
        images: so many training images, drawn by `seed`.

    Raises:
        InputError: there are no images.
    """
    generator = torch.Generator().manual_seed(seed)
    with as_judged(model) as weights:
        diagonal = [torch.zeros_like(weight) for weight in weights]
        seen = 0
        for x, labels in _batches(model, tools, images, seed):
            scores = model(x).float()
            shape = (PROBES, *scores.shape)
            signs = torch.randint(0, 2, shape, generator=generator).to(scores) * 2 - 1
            found = gauss_newton_diagonal(scores, labels, weights, signs, tools.task)
            diagonal = [total + value for total, value in zip(diagonal, found, strict=True)]
            seen += len(x)
        return {
            weight: h / seen * weight.detach().square() / 2
            for weight, h in zip(weights, diagonal, strict=True)
        }


def gauss_newton_diagonal(
    scores: Tensor, labels: Tensor, weights: Sequence[nn.Parameter], probes: Tensor, task: Task
) -> list[Tensor]:
    """Return the mean over probes r of (J^T R r)^2 for each weight, R R^T = H_out.

    Args:
        scores: (n, c), with their graph.
        probes: (k, n, c). Signs give the diagonal, summed over images, in expectation; the k = n c
            unit vectors times sqrt(k) give it exactly.
    """
    diagonal = [torch.zeros_like(weight) for weight in weights]
    for shown in _rooted(scores.detach(), labels, probes, task):
        gradients = _gradients((scores * shown).sum(), weights)
        for total, gradient in zip(diagonal, gradients, strict=True):
            total.addcmul_(gradient, gradient, value=1 / len(probes))
    return diagonal


def channel_sums(graph: Any, group: Any, values: Values) -> Tensor:
    """Sum a number per weight over all weights of each channel of a set: (channels,) float64."""
    total = torch.zeros(len(group[0].idxs), dtype=torch.float64)
    seen: set[tuple[nn.Parameter, bool]] = set()
    for item in group:
        module = item.dep.target.module
        if not isinstance(module, nn.Module):
            continue
        outgoing = is_depthwise(module) or graph.is_out_channel_pruning_fn(item.dep.handler)
        for parameter in module.parameters(recurse=False):
            if parameter not in values or (parameter, outgoing) in seen:
                continue
            seen.add((parameter, outgoing))
            of_channels = _by_channel(module, values[parameter], outgoing=outgoing)
            if of_channels is not None and len(of_channels) > max(item.idxs):
                places = torch.tensor(list(item.root_idxs))
                total.index_add_(0, places, of_channels[list(item.idxs)].double().cpu())
    return total


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution whose input channels are its output channels."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    return 1 < module.groups == module.in_channels == module.out_channels


@contextmanager
def as_judged(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Put a network into eval mode with gradients, and back; yields its weights.

    Batch normalisation then uses the statistics it is deployed with. With those of a batch the
    loss would not depend on the scale of the weights before it, and their sums would be zero.
    """
    weights = list(model.parameters())
    asked = [weight.requires_grad for weight in weights]
    try:
        with modes_kept(model), torch.enable_grad():
            model.eval()
            for weight in weights:
                weight.requires_grad_(True)
            yield weights
    finally:
        for weight, gradient in zip(weights, asked, strict=True):
            weight.requires_grad_(gradient)


def _batches(
    model: nn.Module, tools: Tools, images: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    data = tools.images()
    drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    return batches(
        Subset(data.train, drawn[:images]),
        BATCH_IMAGES,
        device=next(model.parameters()).device,
        mean=data.mean,
        std=data.std,
    )


def _gradients(of: Tensor, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(of, weights, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(weights, found, strict=True)
    ]


def _times_weight(weights: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Values:
    return {w: w.detach() * g for w, g in zip(weights, gradients, strict=True)}


def _rooted(scores: Tensor, labels: Tensor, probes: Tensor, task: Task) -> Tensor:
    """Return R r for each probe, (k, n, c), R R^T being the Hessian of each image's loss.

    Of cross-entropy it is diag(p) - p p^T, and R = diag(sqrt p) - p sqrt(p)^T. Of another loss it
    is found by autograd, and what is not convex in it is left out.
    """
    if task.loss is CLASSIFICATION.loss:
        p = F.softmax(scores, dim=1)
        root = p.sqrt()
        return root * probes - p * (root * probes).sum(dim=2, keepdim=True)

    curvature = _curvature(scores, labels, task)
    eigenvalues, vectors = torch.linalg.eigh(curvature)
    factor = vectors * eigenvalues.clamp_min(0).sqrt().unsqueeze(1)
    return torch.einsum("nij,knj->kni", factor, probes)


def _curvature(scores: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Return each image's second derivatives of its loss, (n, c, c); the task's is their mean."""
    z = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(task.loss(z, labels) * len(z), z, create_graph=True)
    if not gradient.requires_grad:
        return scores.new_zeros(*scores.shape, scores.shape[1])
    rows = [
        torch.autograd.grad(gradient[:, c].sum(), z, retain_graph=True, materialize_grads=True)[0]
        for c in range(scores.shape[1])
    ]
    return torch.stack(rows, dim=1)


def _by_channel(module: nn.Module, value: Tensor, *, outgoing: bool) -> Tensor | None:
    """Sum a number per weight of one tensor over all but its channels; None if it has no such."""
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    if not (convolution or transposed or isinstance(module, nn.Linear)):
        return value if value.ndim == 1 else None
    if value.ndim == 1:  # a bias
        return value if outgoing else None
    if outgoing != transposed:
        return value.flatten(1).sum(1)
    by_pair = value.flatten(2).sum(2) if value.ndim > 2 else value
    return by_pair.unflatten(0, (getattr(module, "groups", 1), -1)).sum(1).flatten()
