"""A real OpenSSH server on this machine, with throwaway keys, for the tests of ssh.py."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
MISSING = [name for name in ("ssh", "scp", "ssh-keygen") if shutil.which(name) is None]
WHY_NOT = (
    "openssh-server is not installed (apt-get install openssh-server)"
    if SSHD is None
    else f"{', '.join(MISSING)} not installed (apt-get install openssh-client)"
    if MISSING
    else None
)


class Server:
    """An sshd on a free port of 127.0.0.1; `temporary` is the far side's folder of such files."""

    def __init__(self, folder: Path, *, sftp: bool = True) -> None:
        self.folder, self.temporary = folder, folder / "far"
        self.temporary.mkdir()
        self.port = free_port()
        for name in ("host_key", "user_key", "other_key"):
            make_key(folder / name)
        (folder / "authorized").write_text((folder / "user_key.pub").read_text())
        key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {key}\n")
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {folder}/host_key\n"
            f"PidFile {folder}/sshd.pid\nAuthorizedKeysFile {folder}/authorized\n"
            "UsePAM no\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f"KbdInteractiveAuthentication no\nSetEnv TMPDIR={self.temporary}\n"
            "KexAlgorithms curve25519-sha256\n"  # the quickest
            + ("Subsystem sftp internal-sftp\n" if sftp else "")
        )
        self.config = self.write_config("ssh_config")
        self.process: subprocess.Popen[bytes] | None = None

    def write_config(self, name: str, **changes: str) -> str:
        """Write a file for `ssh -F` that knows `board`; returns its path."""
        options = {
            "HostName": "127.0.0.1",
            "Port": str(self.port),
            "User": getpass.getuser(),
            "IdentityFile": str(self.folder / "user_key"),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": str(self.folder / "known"),
            "GlobalKnownHostsFile": "/dev/null",
            **changes,
        }
        lines = ["Host board", *(f"    {key} {value}" for key, value in options.items())]
        (self.folder / name).write_text("\n".join(lines) + "\n")
        return str(self.folder / name)

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        command = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        wait_for(self.answers)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "sshd.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def sessions(self) -> list[int]:
        """The server's own processes of its sessions, not what runs in them."""
        assert self.process is not None
        return [pid for pid in descendants(self.process.pid) if comm(pid).startswith("sshd")]

    def kill(self) -> None:
        """End the server and the sessions at once, as a reboot or a cut cable would."""
        if self.process is None:
            return
        sessions = self.sessions()
        self.process.kill()
        self.process.wait()
        for pid in sessions:
            if runs(pid):
                os.kill(pid, signal.SIGKILL)
        self.process = None

    def left(self) -> list[str]:
        return sorted(path.name for path in self.temporary.iterdir())


def make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(command, check=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited a minute in vain"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def runners(folder: Path) -> list[int]:
    """The processes, anywhere on this machine, that execute runner.py in a folder of `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        here = any(word.startswith(bytes(folder)) for word in words)
        if here and any(word.endswith(b"runner.py") for word in words):
            found.append(int(path.parent.name))
    return [pid for pid in found if runs(pid)]
