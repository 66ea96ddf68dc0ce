"""The layout of images and weights in memory, by device.

On a CPU channels last takes 0.6 of the time (training steps of FBNets). On an H200 cuDNN looks so
long for kernels of depthwise convolutions in that layout that 120 s did not suffice for 10 steps of
a search in bf16; one image after another they took 1.6 s with the kernels' first use, and a step
as long as its kernels (scripts/gpu).
"""

import torch


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout in which FBNets are trained on a device."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format
