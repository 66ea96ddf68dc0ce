"""The command line: `fbnas COMMAND key=value ...`. The only part that knows Hydra."""

import importlib
import logging
import os
import select
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fbnas import __version__
from fbnas.commands.processes import be_silent_unless_first, is_first
from fbnas.errors import InputError, closest

COMMANDS = {
    "run": "the whole chain: profile, search, train, compress, measure",
    "profile": "measure every block of a space on a device into a latency table",
    "search": "learn theta and the shared weights for a table and a budget",
    "sample": "architectures from a finished search, best first",
    "train": "train one architecture",
    "compress": "make a trained network smaller or quicker",
    "export": "write a network as a file that a device runs",
    "evaluate": "accuracy and measured latency of an exported file",
    "calibrate": "a table against measured whole networks",
    "count": "parameters and multiply-adds of an architecture",
    "report": "one HTML page of a run",
    "doctor": "what is installed and what works here",
}

HELP = ("-h", "--help")
MULTIRUN = ("-m", "--multirun")
DONE, FAILED, WRONG_INPUT, MISSED, INTERRUPTED = 0, 1, 2, 3, 130
UNREAD = 141  # as a shell says of a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 unexpected failure, 2 the user's input is wrong, 3 done but the target was missed,
    130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    multirun = any(option in MULTIRUN for option in arguments)
    arguments = [argument for argument in arguments if argument not in MULTIRUN]
    if multirun and not arguments:
        return _refuse("-m goes with a command; expected as in fbnas search -m seed=1,2,3.")
    if not arguments or arguments[0] in (*HELP, "help"):
        print(usage())
        return DONE
    if arguments[0] in ("-V", "--version"):
        print(f"fbnas {__version__}")
        return DONE
    command, overrides = arguments[0], arguments[1:]
    config: dict[str, Any] = {}
    if command not in COMMANDS:
        guess = closest(command, COMMANDS)
        hint = f" Did you mean '{guess}'?" if guess else ""
        return _refuse(f"Unknown command '{command}'.{hint} Known: {', '.join(COMMANDS)}.")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Lines()])
    _quieten()
    be_silent_unless_first()
    try:
        chosen = [override for override in overrides if override not in HELP]
        if len(chosen) < len(overrides):
            from fbnas.commands.composition import describe

            print(describe(command, chosen), flush=True)
            return DONE
        if multirun:
            from fbnas.commands import multirun as several

            return several.main(command, overrides)
        from fbnas.commands.composition import compose_single

        config = compose_single(command, overrides)
        config["command_line"] = shlex.join(["fbnas", command, *overrides])
        _check_out(config)
        module = importlib.import_module(f"fbnas.commands.{command}")
        return module.main(config)
    except InputError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        if is_first():
            print(_how_to_resume(command, overrides, config.get("out")), file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            return UNREAD
        if error.filename is None and error.errno is None:
            traceback.print_exc()
            return FAILED
        where = f"{error.filename}: " if error.filename else ""
        return _refuse(f"{where}{error.strerror}; free space or give a folder that can be written.")


def _check_out(config: Mapping[str, Any]) -> None:
    """Refuse an out folder that is taken before images are read or anything is measured."""
    if config.get("out") and is_first():
        from fbnas.commands.folder import check_out

        check_out(config)


def _is_unread() -> bool:
    """Whether the reader of the output has gone, as in `fbnas search --help | head`.

    Then nothing is written to it at the end either. Other pipes may break too: to a converter, say.
    """
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


class _Lines(logging.Handler):
    """Writes to what stderr is at the time: a progress bar puts itself in its place meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first():
            print(self.format(record), file=sys.stderr, flush=True)


def _refuse(message: str) -> int:
    if is_first():
        print(f"fbnas: {' '.join(message.split())}", file=sys.stderr)
    return WRONG_INPUT


def _how_to_resume(command: str, overrides: Sequence[str], out: str | None) -> str:
    begun = out is not None and (Path(out) / "config.yaml").is_file()
    if command in ("run", "search", "sample", "train", "compress") and begun:
        again = shlex.join([command, *(o for o in overrides if not o.startswith("overwrite="))])
        resume = "" if "resume=true" in overrides else " resume=true"
        return f"fbnas: interrupted. Continue with: fbnas {again}{resume}"
    if command == "profile":
        return "fbnas: interrupted. The same command continues where it stopped."
    return "fbnas: interrupted."


def _quieten() -> None:
    """Keep the libraries' own remarks out of the output."""
    for name in (
        "httpx",
        "datasets",
        "torch",
        "torch.utils._pytree",
        "torchao",
        "absl",
        "onnxscript",
        "lightning_fabric",
        "lightning_fabric.utilities.rank_zero",  # the package sets its own level when imported
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def usage() -> str:
    """Return what `fbnas --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"fbnas {__version__}: convolutional networks searched for your device and budget",
            "",
            "usage: fbnas COMMAND [key=value ...]        fbnas COMMAND --help",
            "       fbnas COMMAND -m key=a,b,... out=DIR  once for each value, DIR/key=a and so on",
            "",
            *lines,
            "",
            "A first run, in minutes:  fbnas run experiment=quickstart out=runs/quickstart",
            "Your own data and budget: fbnas run data=image_folder data.path=DIR space=fbnet "
            "target_ms=6 out=runs/mine",
        ]
    )
