"""What a network is judged by: loss and accuracy, after BN statistics that are its own."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fbnas.modes import modes_kept
from fbnas.progress import progress
from fbnas.training.allocator import memory_kept
from fbnas.training.data import batches
from fbnas.training.images import Images
from fbnas.training.task import CLASSIFICATION, Task


@torch.no_grad()
def evaluate(
    network: nn.Module,
    images: Images,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    task: Task = CLASSIFICATION,
) -> tuple[float, float]:
    """Return the task's mean loss and metric in eval mode; every module is put back into its own.

    Of classification they are cross-entropy (nats) and accuracy (0 to 1).
    """
    loss = correct = torch.zeros((), dtype=torch.float64, device=device)
    with (
        modes_kept(network),
        memory_kept(torch.device(device)),
        progress("Judging", total=len(images)) as advance,
    ):
        network.eval()
        for x, labels in batches(images, batch_size, device=device, mean=mean, std=std):
            scores = network(x).float()
            loss = loss + task.loss(scores, labels).double() * len(labels)
            correct = correct + task.metric(scores, labels).sum()
            advance(len(labels))
    return float(loss) / len(images), float(correct) / len(images)


@torch.no_grad()
def recalibrate_bn(
    module: nn.Module,
    forward: Callable[[Tensor], object],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Estimate all BN statistics of `module` anew: their plain mean over the batches given.

    `forward` runs one batch of images through whatever part of the module is meant, a supernet's
    path for one; BN layers it does not visit are left reset. Those that a network keeps in eval
    mode even in training are frozen, and stay. `batches`: (images, labels) as `batches()` yields.
    """
    with modes_kept(module):
        module.train()
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        layers = [norm for norm in norms if norm.training]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's word for a cumulative mean
        try:
            for images, _ in batches:
                forward(images)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
