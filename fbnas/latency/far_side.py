"""What a host does around runner.py: its text goes along with every command of ssh.py.

    python3 -c TEXT facts      {"files": {name: text}, "runtime": name}: runner.py --facts
    python3 -c TEXT prepare    {"base", "name", "wanted"}: make the folder, tell what it lacks
    python3 -c TEXT measure FOLDER OPTIONS    execute the job in the folder
    python3 -c TEXT remove     {"base", "name"}: end the job and remove the folder

Three of them read JSON from stdin. `base` is the user's folder, or null for the one of temporary
files; `name` is ours, made in it; `wanted` are digests (SHA-256) by file name.

Stdlib of python 3.8, POSIX; no fbnas. No backslash may stand in this file: shells differ in them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

LOCK = "runner.lock"
WAITS = 200  # of 50 ms, for a killed process to end


def facts(files: dict[str, str], runtime: str) -> int:
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        command = [sys.executable, "runner.py", "--facts", runtime]
        return subprocess.call(
            command, cwd=folder, stdin=subprocess.DEVNULL, env=environment(folder)
        )


def prepare(base: str | None, name: str, wanted: dict[str, str]) -> int:
    """Prints {"folder": path, "missing": names, "free": bytes}; what is not wanted is removed."""
    folder = place(base, name)
    if base:
        folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(0o700, exist_ok=True)
    lock(folder).close()
    have = set()
    for path in folder.iterdir():
        if path.name in wanted and digest(path) == wanted[path.name]:
            have.add(path.name)
        elif path.is_dir():
            shutil.rmtree(str(path))
        elif path.name != LOCK:
            path.unlink()
    missing = [name for name in wanted if name not in have]
    free = shutil.disk_usage(str(folder)).free
    say({"folder": str(folder), "missing": missing, "free": free})
    return 0


def measure(folder: str, *options: str) -> int:
    """Executes the runner; a signal that ended it becomes 128 and its number, as in a shell.

    This process waits instead of becoming the runner: ssh tells nothing of signals.
    """
    with lock(Path(folder)) as held:
        command = [sys.executable, str(Path(folder, "runner.py")), folder, "--with-parent"]
        child = subprocess.Popen(
            [*command, *options], pass_fds=[held.fileno()], env=environment(folder)
        )
        try:
            held.truncate(0)
            held.write(str(child.pid))
            held.flush()
            code = child.wait()
        finally:
            child.kill()
    loading = Path(folder, "loading.json")
    if code < 0 and loading.exists():
        sys.stdout.write("crashed 1/1" + os.linesep)
        say(json.loads(loading.read_text()))
    return 128 - code if code < 0 else code


def remove(base: str | None, name: str) -> int:
    folder = place(base, name)
    if folder.is_dir():
        lock(folder).close()
        shutil.rmtree(str(folder))
    return 0


def lock(folder: Path) -> IO[str]:
    """Returns an open file; while it is open here or in a runner, nobody else works in the folder.

    A runner that outlived its link is killed: it would disturb the next one.
    """
    file = (folder / LOCK).open("a+")
    for _ in range(WAITS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip()
            try:
                if pid:
                    os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
            time.sleep(0.05)
    sys.exit(f"an earlier measuring process in {folder} does not end")


def environment(folder: str) -> dict[str, str]:
    """Returns one in which a runtime's own temporary files go into the folder, and so away."""
    return {**os.environ, "TMPDIR": folder}


def place(base: str | None, name: str) -> Path:
    """Returns the folder, which is ours or not there: anybody may write temporary files."""
    folder = Path(base or tempfile.gettempdir()).expanduser().absolute() / name
    if os.path.lexists(str(folder)):
        found = os.lstat(str(folder))
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            sys.exit(f"{folder} belongs to somebody else")
    return folder


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            found.update(piece)
    return found.hexdigest()


def say(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content) + os.linesep)
    sys.stdout.flush()


if __name__ == "__main__":
    action, arguments = globals()[sys.argv[1]], sys.argv[2:]
    sys.exit(action(*arguments) if arguments else action(**json.load(sys.stdin)))
