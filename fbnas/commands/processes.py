"""Several processes of one command: Fabric starts them, the first one speaks and writes."""

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fbnas.errors import InputError, check_known, unknown

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
OPTIONS = ("devices", "num_nodes", "precision")
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # as torchrun, srun and Fabric itself tell them
FIRST_PID = "FBNAS_FIRST_PID"  # how the first process tells its number to those that it starts


def is_first() -> bool:
    """Whether this process is the first, or the only one, of its command."""
    return next((os.environ[key] for key in RANKS if key in os.environ), "0") == "0"


def be_silent_unless_first() -> None:
    """Let only the first of several processes print."""
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def fabric_of(config: Mapping[str, Any], device: str) -> "Fabric":
    """Start the processes of `fabric=` and return this one's Fabric.

    The others run the same command line from its beginning, so whatever may be refused must be
    refused before. Where torchrun or srun started them all, their numbers hold.

    Args:
        device: auto, cpu or cuda, as search.device.

    Raises:
        InputError: an option out of its range, or more GPUs than there are.
    """
    from lightning_fabric import Fabric

    from fbnas.training.settings import choose_device

    precision, devices, nodes = check_fabric(config)
    kind = choose_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    several = devices * nodes > 1
    if several:
        end_with_the_first()
    where = [kind.index] if kind.index is not None and not several else devices
    fabric = Fabric(
        accelerator=kind.type,
        devices=where,
        num_nodes=nodes,
        precision=precision,
        strategy="ddp" if several else "auto",
    )
    fabric.launch()
    return fabric


def end_with_the_first() -> None:
    """Let no process that the first one starts outlive it.

    One that waits for the others to appear would wait half an hour for a first that was killed.
    What torchrun or srun started is theirs to end.
    """
    from fbnas.training.interrupt import end_with

    if is_first():
        os.environ[FIRST_PID] = str(os.getpid())
    elif FIRST_PID in os.environ:
        end_with(int(os.environ[FIRST_PID]))


def check_fabric(config: Mapping[str, Any]) -> tuple[Any, int, int]:
    """Return Fabric's word for the precision, processes on a machine, and machines.

    Raises:
        InputError: an unknown option, or a value out of its range.
    """
    given = dict(config["fabric"])
    check_known("option of fabric:", given, OPTIONS)
    for key in ("devices", "num_nodes"):
        if type(given[key]) is not int or given[key] < 1:
            raise InputError(f"fabric.{key} is {given[key]!r}; expected a whole number from 1")
    if given["precision"] not in PRECISIONS:
        raise unknown("value of fabric.precision:", given["precision"], PRECISIONS)
    _check_gpus(given["devices"], config)
    return PRECISIONS[given["precision"]], given["devices"], given["num_nodes"]


def _check_gpus(devices: int, config: Mapping[str, Any]) -> None:
    import torch

    from fbnas.training.settings import choose_device

    kind = choose_device(config["search"]["device"])
    found = torch.cuda.device_count()
    if kind.type == "cuda" and devices > found:
        raise InputError(
            f"fabric.devices={devices}, this machine has {found} GPU(s); expected no more, or "
            "search.device=cpu"
        )
