"""Scripts in processes of their own that need not import torch again: forked from one that has.

Those imports are 4 s of CPU, and so most of a small search that is killed and resumed. A forked
process is killed, exits and holds its pipes as any other does. All of them share the seed of
Python's hashes, so what they are compared with should come from a process that is not forked here.
"""

import functools
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "torch._dynamo",  # by the first optimiser
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "scipy.optimize",
    "kornia.augmentation",
    "lightning_fabric",
    "fbnas.search",
    "fbnas.training",
    "fbnas.commands.composition",
)
LONGEST = 1 << 16  # bytes of a request


def run(script: Path, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As subprocess.run([python, script, *arguments], cwd=cwd, capture_output=True, text=True)."""
    command = [str(script), *map(str, arguments)]
    here, there = zip(*(os.pipe() for _ in range(3)), strict=True)  # for stdout, stderr, exit code
    request = json.dumps([str(cwd), *command]).encode()
    socket.send_fds(forking_process(), [request], there)
    for end in there:
        os.close(end)
    with ThreadPoolExecutor() as pool:
        out, err, code = pool.map(read, here)
    return subprocess.CompletedProcess(command, int(code), out, err)


def read(pipe: int) -> str:
    """All that is written to it until nobody holds its other end."""
    with os.fdopen(pipe) as file:
        return file.read()


@functools.cache
def forking_process() -> socket.socket:
    """Start the process that has the imports; it ends when this one does."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
    return ours


def serve(server: socket.socket) -> None:
    """Fork for every request and answer with the exit code; return in the forked process only."""
    for name in IMPORTED:
        importlib.import_module(name)
    while True:
        request, ends, _, _ = socket.recv_fds(server, LONGEST, 3)
        if not request:
            sys.exit()
        child = os.fork()
        if child == 0:
            become(json.loads(request), ends)
            return
        for end in ends[:2]:
            os.close(end)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(ends[2], "w") as told:
            told.write(str(code))


def become(request: list[str], ends: list[int]) -> None:
    """Take what a process is started with: its folder, arguments, stdout and stderr."""
    cwd, *sys.argv = request
    os.chdir(cwd)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    for number, end in enumerate(ends[:2], start=1):
        os.dup2(end, number)
    for end in ends:
        os.close(end)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as server:
        serve(server)
    runpy.run_path(sys.argv[0], run_name="__main__")
