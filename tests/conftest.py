"""One torch thread in tests: spinning threads stall a busy machine, and CI's has two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)
