"""Stands in for a command where a test is about what happens around it: no torch, so it is quick.

What it does is told by its seed: STUB={"1": "fail"} in the environment.
"""

import json
import os
import signal
import sys
import time
from typing import NoReturn

from fbnas.commands.composition import compose_single
from fbnas.commands.folder import OutFolder


def interrupted(*_: object) -> NoReturn:
    print("stopped")
    sys.exit(130)


def main(command: str, *overrides: str) -> int:
    signal.signal(signal.SIGINT, interrupted)
    config = compose_single(command, overrides)
    out = OutFolder(config)
    action, _, more = (
        json.loads(os.environ.get("STUB", "{}")).get(str(config["seed"]), "").partition(" ")
    )
    print(f"seed {config['seed']} resume {out.resume} {action}")
    if action in ("fail", "wrong"):
        print("fbnas: no such luck", file=sys.stderr)
        return {"fail": 1, "wrong": 2}[action]
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action in ("meet", "strike"):  # others, which only come while this one is there
        while len(list(out.folder.parent.glob("*/config.yaml"))) < int(more):
            time.sleep(0.01)
    if action == "strike":
        os.kill(int(os.environ["STRUCK"]), int(os.environ["SIGNAL"]))
    if action == "preempt" and not out.resume:  # as a cluster does to the process that started it
        os.kill(os.getppid(), signal.SIGUSR2)
    if action in ("strike", "wait", "preempt") and not out.resume:
        signal.pause()
    out.finish(params=100 + config["seed"], latency_ms={"value": 2.0}, target_ms=1.0, noise_floor=0)
    return 3 if action == "miss" else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
