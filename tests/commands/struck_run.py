"""A command that is hit by a signal after so many SGD steps: struck_run.py SIGNAL@STEP ARGUMENTS.

Counted in steps, so that no test depends on the time.
"""

import os
import signal
import sys
from typing import Any

import torch

from fbnas.commands import main


def strike(number: int, at: int) -> None:
    step, taken = torch.optim.SGD.step, []

    def count_and_step(self: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(1)
        if len(taken) == at:
            os.kill(os.getpid(), number)
        return step(self, *arguments, **options)

    torch.optim.SGD.step = count_and_step  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, _, at = sys.argv[1].partition("@")
    strike(signal.Signals[name], int(at))
    sys.exit(main(sys.argv[2:]))
