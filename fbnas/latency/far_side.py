"""What a host does around runner.py: its text goes along with every command of ssh.py.

    python3 -c TEXT facts      {"files": {name: text}, "runtime": name}: runner.py --facts
    python3 -c TEXT prepare    {"base", "name", "wanted"}: make the folder, tell what it lacks
    python3 -c TEXT measure FOLDER OPTIONS    execute the job in the folder
    python3 -c TEXT remove     {"base", "name"}: end the job and remove the folder

The first two and the last read JSON from stdin. `base` is the folder of the user, or null for the
one of temporary files; `name` is ours, made in it; `wanted` are digests (SHA-256) by file name.

Stdlib of python 3.8, POSIX; no fbnas. No backslash may stand in this file: shells differ in them.
"""

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

LOCK = "runner.lock"
WAITS = 200  # of 50 ms, for a killed process to end


def facts(files, runtime):
    with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
        for name, text in files.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        command = [sys.executable, "runner.py", "--facts", runtime]
        return subprocess.call(command, cwd=folder, stdin=subprocess.DEVNULL)


def prepare(base, name, wanted):
    """Prints {"folder": path, "missing": names, "free": bytes}; what is not wanted is removed."""
    folder = place(base, name)
    if base:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            sys.exit(folder + " belongs to somebody else")
    lock(folder).close()
    have = set()
    for entry in os.listdir(folder):
        path = os.path.join(folder, entry)
        if entry in wanted and digest(path) == wanted[entry]:
            have.add(entry)
        elif os.path.isdir(path):
            shutil.rmtree(path)
        elif entry != LOCK:
            os.unlink(path)
    missing = [entry for entry in wanted if entry not in have]
    say({"folder": folder, "missing": missing, "free": shutil.disk_usage(folder).free})
    return 0


def measure(folder, *options):
    """Executes the runner; a signal that ended it becomes 128 and its number, as in a shell.

    This process waits instead of becoming the runner: ssh tells nothing of signals.
    """
    with lock(folder) as held:
        command = [sys.executable, os.path.join(folder, "runner.py"), folder, "--with-parent"]
        child = subprocess.Popen([*command, *options], pass_fds=[held.fileno()])
        try:
            held.truncate(0)
            held.write(str(child.pid))
            held.flush()
            code = child.wait()
        finally:
            child.kill()
    loading = os.path.join(folder, "loading.json")
    if code < 0 and os.path.exists(loading):
        with open(loading) as file:
            index = json.load(file)
        sys.stdout.write("crashed 1/1" + os.linesep)
        say(index)
    return 128 - code if code < 0 else code


def remove(base, name):
    folder = place(base, name)
    if os.path.isdir(folder):
        lock(folder).close()
        shutil.rmtree(folder)
    return 0


def lock(folder):
    """Returns an open file; while it is open here or in a runner, nobody else works in the folder.

    A runner that outlived its link is killed: it would disturb the next one.
    """
    file = open(os.path.join(folder, LOCK), "a+")
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
    sys.exit("an earlier measuring process in " + folder + " does not end")


def place(base, name):
    return os.path.join(
        os.path.abspath(os.path.expanduser(base) if base else tempfile.gettempdir()), name
    )


def digest(path):
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            found.update(piece)
    return found.hexdigest()


def say(content):
    sys.stdout.write(json.dumps(content) + os.linesep)
    sys.stdout.flush()


if __name__ == "__main__":
    action, arguments = globals()[sys.argv[1]], sys.argv[2:]
    sys.exit(action(*arguments) if arguments else action(**json.load(sys.stdin)))
