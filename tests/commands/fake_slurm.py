"""sbatch, srun, sacct and scancel of a cluster that is this machine, by the name it is called by.

Enough of them for what submitit asks; what was submitted is kept in $FAKE_SLURM.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

STARTED = 7  # the number of the job array


def sbatch(root: Path, file: str) -> None:
    text = Path(file).read_text()
    (root / "submitted.sh").write_text(text)
    tasks = re.search(r"--array=0-(\d+)", text)
    assert tasks is not None
    for i in range(int(tasks[1]) + 1):
        names = {"JOB_ID": 8 + i, "ARRAY_JOB_ID": STARTED, "ARRAY_TASK_ID": i}
        child = subprocess.Popen(
            ["bash", file],
            env={**os.environ, **{f"SLURM_{key}": str(value) for key, value in names.items()}},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (root / f"{STARTED}_{i}").write_text(str(child.pid))
    print(f"Submitted batch job {STARTED}")


def srun(root: Path, *words: str) -> None:
    start = next(i for i, word in enumerate(words) if word == sys.executable)
    os.execv(words[start], words[start:])


def sacct(root: Path, *words: str) -> None:
    print("JobID|State|NodeList")
    for file in root.glob(f"{STARTED}_*"):
        status = Path("/proc", file.read_text(), "stat")
        alive = status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"
        print(f"{file.name}|{'RUNNING' if alive else 'COMPLETED'}|here")


def scancel(root: Path, name: str) -> None:
    os.killpg(int((root / name).read_text()), signal.SIGTERM)


if __name__ == "__main__":
    call = {x.__name__: x for x in (sbatch, srun, sacct, scancel)}[Path(sys.argv[0]).name]
    call(Path(os.environ["FAKE_SLURM"]), *sys.argv[1:])
