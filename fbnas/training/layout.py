"""The layout of images and weights in memory, by device.

On a CPU channels last takes 0.6 of the time (training steps of FBNets). On an H200, in bf16, cuDNN
looks so long for kernels of depthwise convolutions in that layout that 100 s did not suffice for
the first eight weights steps of a search; channels first they took 1.5 s (scripts/gpu).
"""

import torch


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout in which FBNets are trained on a device."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format
