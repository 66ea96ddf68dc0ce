"""One training on several processes: they draw alike, see a part of each batch, and average.

Every process has the same seed, so that paths and gates are the same everywhere; each computes its
part of the global batch; batch normalisation takes its statistics from all parts, and gradients are
averaged. So the result is that of one process with the same global batch, but for rounding.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' parts of the batch, on any device.

    torch's own SyncBatchNorm is for GPUs alone. Parts have the same size. With m_r and v_r mean
    and variance of part r, the mean is m = mean_r m_r and the variance mean_r (v_r + (m_r - m)^2).
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        from torch.distributed.nn.functional import all_gather

        values = input.float()
        variance, mean = torch.var_mean(values, dim=(0, 2, 3), correction=0)
        parts = torch.stack(list(all_gather(torch.stack([mean, variance]))))  # (processes, 2, c)
        means, variances = parts[:, 0], parts[:, 1]
        mean = means.mean(0)
        variance = (variances + (means - mean) ** 2).mean(0)
        self._follow(mean.detach(), variance.detach(), values.numel() // len(mean) * len(parts))
        weight, bias = self.weight.float(), self.bias.float()
        factor = weight * torch.rsqrt(variance + self.eps)
        shift = bias - mean * factor
        return (values * factor[:, None, None] + shift[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics as torch does: by `momentum`, the variance unbiased."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), rate)


def synchronise_bn_(module: nn.Module) -> None:
    """Let every batch normalisation take its statistics from all processes.

    Parameters and buffers stay the same tensors.
    """
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            synced = SyncedBatchNorm(child.num_features, child.eps, child.momentum)
            synced._parameters, synced._buffers = child._parameters, child._buffers
            setattr(module, name, synced.train(child.training))
        else:
            synchronise_bn_(child)


def set_up(optimiser: torch.optim.Optimizer, fabric: "Fabric") -> Any:
    """Return an optimiser whose step goes through Fabric, which scales losses at fp16."""
    return fabric.setup_optimizers(optimiser)


def average_gradients_(parameters: Iterable[nn.Parameter], fabric: "Fabric") -> None:
    """Replace gradients by their mean over the processes, in one exchange.

    All processes draw the same path, so the same parameters have gradients everywhere.
    """
    if fabric.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten().to(fabric.device) for gradient in gradients])
    mean = fabric.all_reduce(flat, reduce_op="mean")
    assert isinstance(mean, Tensor)
    pieces = mean.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


def summed(values: Tensor, fabric: "Fabric") -> Tensor:
    """Return the sum of a tensor over the processes."""
    if fabric.world_size == 1:
        return values
    found = fabric.all_reduce(values.clone(), reduce_op="sum")
    assert isinstance(found, Tensor)
    return found


def any_process(flag: bool, fabric: "Fabric") -> bool:
    """Whether any process says so: all come to the same answer."""
    if fabric.world_size == 1:
        return flag
    return bool(summed(torch.tensor(float(flag), device=fabric.device), fabric) > 0)


def part_of(batch: Tensor, rank: int, processes: int) -> Tensor:
    """Return one process's part of a batch's indices (n,); n is a multiple of `processes`."""
    size = len(batch) // processes
    return batch[rank * size : (rank + 1) * size]
