"""Another machine as a Host, through the system's own ssh and scp.

The user's ssh config, keys and known hosts hold. Of a lost link at most the round under way is
lost: finished rounds are on this machine, and the next connection sends them along.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fbnas.errors import InputError
from fbnas.files import read_json, write_json
from fbnas.latency.hosts import (
    CANNOT_WRITE,
    RUNNER,
    Advance,
    RuntimeCrashError,
    follow,
    judge_end,
    read_facts,
)
from fbnas.latency.model_files import parts

log = logging.getLogger(__name__)

FAR_SIDE = Path(__file__).parent / "far_side.py"
WAITS_S: tuple[float, ...] = (1, 2, 4, 8, 15, 30)  # before one more attempt at a lost link
OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",  # a link that is silent for 15 s is lost
    "ServerAliveCountMax=3",
    "LogLevel=INFO",  # its own words are shown in errors, whatever the user's config says
    "RequestTTY=no",
    "RemoteCommand=none",
    "ControlMaster=no",  # a master in use is used; none is left behind
    "ClearAllForwardings=yes",
)
TOLD = re.compile(r"(loaded|round|crashed) \d+/\d+\n")  # these are followed by a line of JSON
KEPT_IN = {"loaded": "loaded.json", "round": "timings.jsonl", "crashed": "loading.json"}
SAFE_PATH = re.compile(r"/[\w@%+=:,./-]*", re.ASCII)  # scp's two protocols quote differently
LINK_LOST = 255
NO_PROGRAM = (126, 127)
TERMINATED = (128 + signal.SIGHUP, 128 + signal.SIGTERM)  # the machine is shutting down
LOST_WORDS = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "closed by remote host",
    "lost connection",
    "not responding",
    "timed out",
    "Broken pipe",
    "Could not resolve",
    "No route to host",
    "Network is unreachable",
)
WAYS_OUT = {  # by what ssh says; {ssh} is the command to try by hand
    "IDENTIFICATION HAS CHANGED": (
        "its key is another than before; if that is right: ssh-keygen -R {host}, then connect "
        "once by hand: {ssh}"
    ),
    "Host key verification failed": "its key is not known here; connect once by hand: {ssh}",
    "Permission denied (": "`{ssh}` must work without a password: ssh-copy-id {host}",
    "Too many authentication failures": (
        "`{ssh}` must work without a password: ssh-copy-id {host}, and name the key in your ssh "
        "config (IdentityFile, IdentitiesOnly yes)"
    ),
    "Could not resolve hostname": (
        "expected device.host=... as you would type it after ssh: a name of your ssh config, or "
        "user@address"
    ),
    "Connection refused": "expected an SSH server there, on that port; try: {ssh}",
    "timed out": "is it switched on and in the same network? Try: {ssh}",
    "No route to host": "is it switched on and in the same network? Try: {ssh}",
}


class LinkError(Exception):
    """There is no link, or it was lost; `words` are those of ssh."""

    def __init__(self, stderr: str) -> None:
        self.words = _last_line(stderr)
        super().__init__(stderr)


class GoneError(InputError):
    """The link was lost and did not come back."""


class SSHHost:
    """A machine that `ssh` reaches, with python3, numpy and one runtime.

    Args:
        host: as typed after `ssh`.
        python: interpreter there.
        ssh_config: a file for `ssh -F` instead of the user's own.
        folder: there, in which a folder is made; None: the one of temporary files.
        keep: leave the files there.

    Raises:
        InputError: no host that both ssh and scp understand.
    """

    def __init__(
        self,
        host: str,
        *,
        python: str = "python3",
        ssh_config: str | None = None,
        folder: str | None = None,
        keep: bool = False,
    ) -> None:
        if not re.fullmatch(r"[^-\s/][^\s/]*", host):
            raise InputError(
                f"device.host is {host!r}; expected a name of your ssh config, or user@address; a "
                "port goes into your ssh config"
            )
        self.host, self.python, self.folder, self.keep = host, python, folder, keep
        self.config = ["-F", ssh_config] if ssh_config else []
        self.by_hand = shlex.join(["ssh", *self.config, host])
        self._reached = False
        self._there = ""  # the folder that was made there
        self._legacy: list[str] = []  # scp's option for a server without SFTP

    def facts(self, runtime_file: Path) -> dict[str, Any]:
        files = {"runner.py": RUNNER.read_text(), runtime_file.name: runtime_file.read_text()}
        try:
            done = self._call("facts", files=files, runtime=runtime_file.name)
        except LinkError as error:
            raise self._unreachable(error) from error
        return read_facts(done.stdout, done.stderr, f"{self.host} (device.python={self.python})")

    def run(self, work: Path, advance: Advance, *, scores: bool = False) -> None:
        name = self._name(work)
        try:
            self._persist(work, name, advance, scores=scores)
        except (RuntimeCrashError, GoneError):
            raise  # the next call goes on with the files that are there
        except BaseException:
            if self._reached:
                self._remove(work, name)
            raise
        self._remove(work, name)

    def _name(self, work: Path) -> str:
        """Return the name of the folder there; the same again after this process was killed."""
        remembered, where = work / "remote.json", {"host": self.host, "folder": self.folder}
        try:
            found = json.loads(remembered.read_text())
            if {key: found[key] for key in where} == where:
                return str(found["name"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        name = f"fbnas-{secrets.token_hex(8)}"
        write_json(remembered, {**where, "name": name})
        return name

    def _persist(self, work: Path, name: str, advance: Advance, *, scores: bool) -> None:
        """Connect as often as it takes; with every round that arrives the waiting starts anew."""
        waits = iter(WAITS_S)
        while True:
            before = _finished_rounds(work)
            try:
                return self._attempt(work, name, advance, scores=scores)
            except LinkError as error:
                kept = _finished_rounds(work)
                if not self._reached:
                    raise self._unreachable(error) from error
                if kept > before:
                    waits = iter(WAITS_S)
                wait_s = next(waits, None)
                if wait_s is None:
                    rounds = f"{kept} rounds are kept: " if kept else ""
                    raise GoneError(
                        f"{self.host} cannot be reached any more ({error.words}); {rounds}run the "
                        "same command again to continue"
                    ) from error
                log.warning(
                    "The link to %s is lost (%s); connecting again in %g s.",
                    self.host,
                    error.words,
                    wait_s,
                )
                time.sleep(wait_s)

    def _attempt(self, work: Path, name: str, advance: Advance, *, scores: bool) -> None:
        with tempfile.TemporaryDirectory(prefix="fbnas-") as folder:
            stage = Path(folder)
            wanted = _stage(work, stage, scores=scores)
            there = self._prepare(name, wanted)
            self._copy_missing(stage, there)
        self._execute(there["folder"], work, advance, scores=scores)
        if scores:
            here = str(work.absolute() / "scores.npy")
            self._scp(f"{self._target}:{there['folder']}/scores.npy", here)

    def _prepare(self, name: str, wanted: dict[str, str]) -> dict[str, Any]:
        done = self._call("prepare", base=self.folder, name=name, wanted=wanted)
        try:
            there: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            raise InputError(
                f"{self.host} cannot make a folder to work in: {_last_line(done.stderr)}; expected "
                "device.folder=... to be one that can be written"
            ) from None
        if not SAFE_PATH.fullmatch(there["folder"]):
            raise InputError(
                f"{self.host}:{there['folder']} has characters that scp may not understand; "
                "expected device.folder=... of letters, digits and / . _ -"
            )
        self._there = there["folder"]
        return there

    def _copy_missing(self, stage: Path, there: dict[str, Any]) -> None:
        missing, folder = there["missing"], there["folder"]
        size = sum((stage / name).stat().st_size for name in missing)
        if size > there["free"]:
            raise InputError(
                f"{self.host}:{folder} has {there['free'] / 1e6:.1f} MB free, the models need "
                f"{size / 1e6:.1f} MB; make room there, or name another disk: device.folder=..."
            )
        if missing:
            log.info("Copying files to %s: %d (%.1f MB).", self.host, len(missing), size / 1e6)
            self._scp(*(str(stage / name) for name in missing), f"{self._target}:{folder}/")

    def _execute(self, folder: str, work: Path, advance: Advance, *, scores: bool) -> None:
        errors = work / "stderr.txt"
        (work / "loading.json").unlink(missing_ok=True)
        command = self._ssh("measure", folder, "--scores" if scores else "--stream")
        # As on this machine: the child does not see Ctrl-C, and ends when its stdin closes.
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                start_new_session=True,
            ) as child,
        ):
            try:
                assert child.stdout is not None
                _receive(child.stdout, work, advance)
                code = child.wait()
            except BaseException:
                child.kill()
                raise
        said = errors.read_text(errors="replace")
        if code in TERMINATED:
            raise LinkError("the measuring process was terminated there")
        if code != CANNOT_WRITE:  # the runner words that one better
            self._judge(code, said)
        by_signal = code - 128 in set(signal.Signals)
        try:
            judge_end(128 - code if by_signal else code, said, work / "loading.json")
        except InputError as error:
            raise InputError(f"{self.host}: {error}") from error

    def _remove(self, work: Path, name: str) -> None:
        if self.keep:
            log.info("Models and timings are left in %s:%s.", self.host, self._there)
            return
        try:
            done = self._call("remove", base=self.folder, name=name)
        except (LinkError, InputError) as error:
            words = error.words if isinstance(error, LinkError) else str(error)
        else:
            words = _last_line(done.stderr) if done.returncode else ""
        if not words:
            (work / "remote.json").unlink(missing_ok=True)
        elif self._there:
            log.warning(
                "%s:%s could not be removed (%s); the same command will try again.",
                self.host,
                self._there,
                words,
            )

    @property
    def _target(self) -> str:
        """The host as scp wants it: an IPv6 address in brackets."""
        user, at, address = self.host.rpartition("@")
        return f"{user}{at}[{address}]" if ":" in address and "[" not in address else self.host

    @property
    def _options(self) -> list[str]:
        return [*self.config, *(word for option in OPTIONS for word in ("-o", option))]

    def _ssh(self, action: str, *arguments: str) -> list[str]:
        text = f"exec({json.dumps(FAR_SIDE.read_text())})"  # one line, for any shell there
        command = [_quoted(self.python), "-c", shlex.quote(text), action]
        words = [*command, *(shlex.quote(argument) for argument in arguments)]
        return ["ssh", *self._options, "--", self.host, " ".join(words)]

    def _call(self, action: str, **content: object) -> subprocess.CompletedProcess[str]:
        """Let far_side.py do something.

        Raises:
            LinkError: no link.
            InputError: no python there, or no room.
        """
        done = _run(self._ssh(action), json.dumps(content))
        self._judge(done.returncode, done.stderr)
        return done

    def _judge(self, code: int, stderr: str) -> None:
        if code == LINK_LOST or code < 0:
            raise LinkError(stderr)
        self._reached = True
        if code in NO_PROGRAM:
            raise InputError(
                f"{self.host} cannot start {self.python} ({_last_line(stderr)}); expected "
                "device.python=... to be a python there that has numpy and the runtime"
            )
        if code and "No space left on device" in stderr:
            raise InputError(
                f"{self.host} has no room left: {_last_line(stderr)}; make room there, or name "
                "another disk: device.folder=..."
            )

    def _scp(self, *paths: str) -> None:
        """Copy files to the last of the paths; those of this machine are absolute.

        Raises:
            LinkError: the link was lost.
            InputError: a file cannot be written.
        """
        # No -q: it would silence ssh's reasons; without a terminal nothing else is shown.
        done = _run(["scp", *self._legacy, *self._options, "--", *paths])
        if done.returncode == 0:
            return
        said = done.stderr
        if not self._legacy and ("subsystem request failed" in said or "sftp-server" in said):
            self._legacy = ["-O"]  # small servers have no SFTP
            return self._scp(*paths)
        if re.search("scp: (command )?not found", said):
            raise InputError(f"{self.host} has neither SFTP nor scp; install openssh-server there")
        if done.returncode == LINK_LOST or any(words in said for words in LOST_WORDS):
            raise LinkError(said)
        raise InputError(
            f"files cannot be copied from or to {self.host}: {_last_line(said)}; make room there, "
            "or name another disk: device.folder=..."
        )

    def _unreachable(self, error: LinkError) -> InputError:
        said = str(error)
        found = (way_out for words, way_out in WAYS_OUT.items() if words in said)
        way_out = next(found, "`{ssh}` must work; try it by hand")
        hint = way_out.format(ssh=self.by_hand, host=self.host)
        return InputError(f"{self.host} cannot be reached ({error.words}); {hint}")


def _stage(work: Path, stage: Path, *, scores: bool) -> dict[str, str]:
    """Lay out in `stage` what the host needs, as links under its names there.

    Returns:
        the digest (SHA-256) of each by name.
    """
    job = read_json(work / "job.json")
    runtime, models = Path(job["runtime"]), [Path(path) for path in job["models"]]
    files, digests = {RUNNER.name: RUNNER, runtime.name: runtime}, {}
    names = []
    for path, digest in zip(models, job["digests"], strict=True):
        name = f"{digest[:16]}{path.suffix}"
        names.append(name)
        files[name], *others = parts(path)
        files |= {f"{digest[:16]}{other.suffix}": other for other in others}
        if not others:
            digests[name] = digest
        check = Path(f"{path}.check.npz")
        if check.is_file():
            files[f"{name}.check.npz"] = check
    there = {**job, "runtime": runtime.name, "models": names}
    if scores:
        files["images.npy"], there["images"] = Path(job["images"]), "images.npy"
    elif _finished_rounds(work):
        files["timings.jsonl"] = work / "timings.jsonl"
    (stage / "job.json").write_text(json.dumps(there))
    for name, path in files.items():
        (stage / name).symlink_to(path.resolve())
    return {
        name: digests[name] if name in digests else _digest(stage / name)
        for name in (*files, "job.json")
    }


def _receive(lines: Iterable[str], work: Path, advance: Advance) -> None:
    """Write what the runner tells into the files of `work`, and tell `advance`.

    Raises:
        InputError: a file cannot be written.
    """
    told: str | None = None
    for line in lines:
        if not line.endswith("\n"):
            return  # the link was lost within it
        if told is not None:
            word = told.partition(" ")[0]
            path = work / KEPT_IN[word]
            try:
                with path.open("a" if word == "round" else "w") as file:
                    file.write(line)
            except OSError as error:
                raise InputError(
                    f"{path} cannot be written: {error.strerror}; make room there, then run the "
                    "same command: finished rounds are kept"
                ) from error
            follow([told], advance)
            told = None
        elif TOLD.fullmatch(line):
            told = line
        else:
            follow([line], advance)


def _finished_rounds(work: Path) -> int:
    """Count the rounds that arrived; a line that was cut off by a kill is cut off the file."""
    path = work / "timings.jsonl"
    text = path.read_bytes() if path.exists() else b""
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    return text.count(b"\n")


def _run(command: Sequence[str], standard_input: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            input=standard_input,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise InputError(
            f"{command[0]} is not installed here; install it: apt-get install openssh-client"
        ) from error


def _quoted(program: str) -> str:
    """Quote for a shell; a leading ~/ stays the home folder there."""
    home = "~/" if program.startswith("~/") else ""
    return home + shlex.quote(program[len(home) :])


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1].strip()
