"""fbnas doctor: what is installed and what works here, or on a device, to paste into an issue."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbnas import __version__
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import device_of
from fbnas.errors import InputError
from fbnas.files import atomic_write
from fbnas.latency.converting import lacking, needed
from fbnas.latency.devices import Device
from fbnas.latency.runtimes import RUNTIMES, runtime
from fbnas.latency.saturation import saturates
from fbnas.shipped import configs_folder

TOOLS = "test"  # the extra whose packages only check fbnas: no bug of a user's is theirs

Say = Callable[[str], None]


def main(config: dict[str, Any]) -> int:
    device = device_of(config)
    out = OutFolder(config)
    lines: list[str] = []
    home = str(Path.home()).rstrip("/") + "/"

    def say(line: str) -> None:
        """A line of the Markdown that goes into an issue, without the user's name in paths."""
        lines.append(line.replace(home, "~/") if home != "/" else line)
        print(lines[-1], flush=True)

    commit, facts = _commit(), Device().fingerprint()
    say(f"**fbnas {__version__}**{f', git {commit}' if commit else ''}")
    say("")
    say(f"- python {platform.python_version()}, {platform.platform()}")
    say(f"- machine: {facts['cpu']}, {facts['cores']} cores, {_memory_gb():.1f} GB of memory")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    say(f"- GPUs that torch can use: {', '.join(gpus) or 'none'}")
    say(f"- configs: {configs_folder()}")
    ssh = {name: shutil.which(name) for name in ("ssh", "scp")}
    lost = [name for name, path in ssh.items() if path is None]
    said = f"no {', '.join(lost)}: apt install openssh-client" if lost else "ssh and scp are here"
    say(f"- device=ssh: {said}")
    packages = _packages(say)
    say("")
    say("Every runtime was tried on a 3x3 convolution of 16 channels at 32x32:")
    say("")
    runtimes = {name: _runtime(name, say) for name in RUNTIMES}
    asked = {}
    if device != Device():
        asked = device.fingerprint()
        say("")
        say(f"Device {device.name}: {', '.join(f'{k} {v}' for k, v in asked.items() if v)}")
    _say_where(out, lines)
    out.finish(
        commit=commit, packages=packages, runtimes=runtimes, gpus=gpus, device=asked or facts
    )
    broken = [p for found in runtimes.values() for p in found["precisions"].values() if not p[0]]
    return 1 if broken else 0


def _say_where(out: OutFolder, lines: list[str]) -> None:
    """Print what to do with the lines; with an out folder they are a file."""
    what = "all of the above"
    if out.path is not None:
        file = out.path / "doctor.md"
        atomic_write(file, "\n".join(lines) + "\n")
        what = str(file)
    print(
        f"\nFor a bug report, paste {what} into an issue where you got fbnas from, with the "
        "command that failed\nand what it printed; CONTRIBUTING.md says what else helps."
    )


def _commit() -> str | None:
    """Return the checkout's commit, and whether files differ from it; None of a wheel."""
    root = configs_folder().parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(root)]
    found = [
        subprocess.run([*git, *words], capture_output=True, text=True, check=False)
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
    ]
    if any(done.returncode for done in found):  # a checkout of another user, for one
        return None
    return found[0].stdout.strip() + (" and changes" if found[1].stdout else "")


def _memory_gb() -> float:
    """Return this machine's memory in 1e9 bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _packages(say: Say) -> dict[str, str]:
    """Print and return the version of every package that fbnas asks for, extras included."""
    try:
        requirements = importlib.metadata.requires("fbnas") or []
    except importlib.metadata.PackageNotFoundError:
        say("- fbnas is run from its source and not installed: what it asks for is not known")
        return {}
    say("")
    say("| package | here | fbnas asks for |")
    say("|---|---|---|")
    versions: dict[str, str] = {}
    for requirement in requirements:
        name, bounds, extra = _parts(requirement)
        if name in versions or extra == TOOLS:
            continue
        versions[name] = _version(name)
        say(f"| {name} | {versions[name]} | {bounds}{f', for {extra}' if extra else ''} |")
    return versions


def _parts(requirement: str) -> tuple[str, str, str]:
    """Take "openvino>=2025.4; extra == 'openvino'" apart: name, bounds, extra."""
    asked, _, marker = requirement.partition(";")
    name = re.match(r"[\w.-]+", asked)
    extra = re.search(r"extra == ['\"]([\w-]+)", marker)
    assert name is not None
    return name[0], asked[name.end() :].strip(), extra[1] if extra else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _runtime(name: str, say: Say) -> dict[str, Any]:
    """Print and return what a runtime can do here: version, providers, each precision tried."""
    module = runtime(name)
    if not module.available():
        say(f"- {name}: not installed: {module.INSTALL}")
        return {"version": None, "providers": [], "precisions": {}, "install": module.INSTALL}
    here = module.providers()
    say(f"- {name} {module.version()}, providers: {', '.join(here)}")
    absent = {p: way for p, way in module.PROVIDERS.items() if p not in here}
    for provider, way in absent.items():
        say(f"  - no {provider}: {way}")
    precisions = {}
    for precision in module.PRECISIONS:
        packages = lacking(needed(module, precision))
        if packages:
            say(
                f"  - {precision}: converting needs {', '.join(packages)}, here or in the python "
                "of device.converter"
            )
            continue
        provider = "compiled" if (name, precision) == ("pytorch", "int8") else ""
        precisions[precision] = _try(Device(runtime=name, precision=precision, provider=provider))
        say(f"  - {precision}: {precisions[precision][1]}")
    return {"version": module.version(), "providers": here, "precisions": precisions}


def _try(device: Device) -> tuple[bool, str]:
    """Compile, run and time one small convolution for real."""
    convolution = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{device.suffix}"
        try:
            device.compile(convolution, (16, 32, 32), path)
            timing = device.measure([path], rounds=5).whole[0]
        except (RuntimeError, InputError) as error:
            return False, f"does not work: {str(error).splitlines()[0]}"
    cut = device.precision == "int8" and saturates(device)
    bits = "; it cuts sums off at 16 bits, so weights get 7 bits" if cut else ""
    return True, f"works ({timing.latency_ms:.3f} ms){bits}"
