"""One torch thread in tests: spinning threads stall a busy machine, and CI's has two cores."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

torch.set_num_threads(1)
# What is started in the background of a shell, as by CI, ignores Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
