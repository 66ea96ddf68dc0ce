"""Tables of this machine for every runtime and precision, each held against whole networks.

    python scripts/additivity/measure.py FOLDER [--steps compile,profile,alone,networks,calibrate]
        [--runtimes onnxruntime,openvino,...] [--precisions fp32,int8] [--spaces fbnet,fbnet_cifar]

Converting needs a processor but no quiet, timing needs quiet: steps may be run one at a time, the
first and the third beside other work. What is finished is kept; the same command continues.
Runtimes that live in another environment: FBNAS_LITERT_PYTHON=PATH, FBNAS_EXECUTORCH_PYTHON=PATH,
FBNAS_PYTORCH_PYTHON=PATH (a torch with torchao, for int8).

Writes FOLDER/DEVICE_SPACE_RUNTIME_PRECISION.csv, with .calibration.csv and .calibration.html, the
time of each step into seconds.csv, and .alone.csv: the same blocks each in a run of its own, for
those runtimes that convert a block in a moment. report.py makes a page of it.
"""

import argparse
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from fbnas.commands.calibrate import describe, write_networks
from fbnas.errors import InputError
from fbnas.latency import calibration
from fbnas.latency.devices import Device
from fbnas.latency.profiling import (
    compile_items,
    compile_networks,
    missing_items,
    profile,
    work_folder,
)
from fbnas.latency.table import LatencyTable
from fbnas.space import SearchSpace

STEPS = ("compile", "profile", "alone", "networks", "calibrate")
FITTED, HELD_OUT = 20, 80
SLOW = {"executorch": (10, 10), "litert": (10, 10)}  # half a minute to convert one network
SEED = 0
NOTHING_SECONDS = 1.0


@dataclass(frozen=True)
class Case:
    """One table of the study."""

    folder: Path
    space: SearchSpace
    device: Device
    classes: int

    @property
    def table(self) -> Path:
        device = self.device
        provider = f"_{device.provider}" if device.provider == "compiled" else ""
        name = f"{device.name}_{self.space.name}_{device.runtime}{provider}_{device.precision}.csv"
        return self.folder / name

    @property
    def networks(self) -> Path:
        return self.table.with_name(f"{self.table.name}.partial-networks")

    @property
    def numbers(self) -> tuple[int, int]:
        """How many networks a correction is fitted on, and judged by."""
        return SLOW.get(self.device.runtime, (FITTED, HELD_OUT))

    def compile(self) -> None:
        _, missing = missing_items(self.space, self.device, self.table, self.classes)
        if missing:
            compile_items(self.space, self.device, missing, work_folder(self.table), seed=SEED)

    def profile(self) -> None:
        table = profile(self.space, self.device, self.table, classes=self.classes, seed=SEED)
        print(
            f"{self.table.name}: noise floor {100 * table.noise_floor:.2f} %, quiet: {table.quiet}"
        )

    def alone(self) -> None:
        path = self.table.with_suffix(".alone.csv")
        if self.device.runtime not in SLOW and not path.exists():
            profile(self.space, self.device, path, classes=self.classes, seed=SEED, context=False)

    def compile_networks(self) -> None:
        table = LatencyTable.load(self.table)
        if "calibration" in table.header:
            return
        fitted, held_out = self.numbers
        drawn, _ = calibration.chosen_networks(
            table, self.space, fitted, held_out, classes=self.classes, seed=SEED
        )
        compile_networks(
            drawn, self.space, self.device, self.networks, classes=self.classes, seed=SEED
        )

    def calibrate(self) -> None:
        table = LatencyTable.load(self.table)
        if "calibration" in table.header:
            return
        fitted, held_out = self.numbers
        found = calibration.calibrate(
            table,
            self.space,
            self.device,
            classes=self.classes,
            networks=fitted,
            held_out=held_out,
            seed=SEED,
            work=self.networks,
        )
        print(f"{self.table.name}: {describe(found)}")
        if found.helps:
            table = calibration.apply(table, found, self.space, classes=self.classes)
        else:
            table = calibration.judged(table, found, self.space)
        write_networks(self.table, found)
        table.save(self.table)


def devices(name: str, runtimes: list[str], precisions: list[str]) -> list[Device]:
    """The machine through every runtime asked for; PyTorch's int8 is of its compiled form."""
    found = []
    for asked in runtimes:
        runtime, _, provider = asked.partition(":")
        python = os.environ.get(f"FBNAS_{runtime.upper()}_PYTHON")
        for precision in precisions:
            if runtime == "pytorch" and precision == "int8" and not provider:
                continue
            found.append(
                Device(
                    name=name,
                    runtime=runtime,
                    provider=provider,
                    precision=precision,
                    python=python,
                )
            )
    return found


def write_down(path: Path, step: str, table: str, seconds: float) -> None:
    """Add how long a step took, unless there was nothing left to do."""
    if seconds > NOTHING_SECONDS:
        new = not path.exists()
        with path.open("a") as file:
            file.write(("step,table,seconds\n" if new else "") + f"{step},{table},{seconds:.1f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--runtimes", default="onnxruntime,openvino,litert,executorch,pytorch")
    parser.add_argument("--precisions", default="fp32,int8")
    parser.add_argument("--spaces", default="fbnet_cifar,fbnet")
    parser.add_argument("--device", default="epyc", help="name of this machine")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    machines = devices(
        arguments.device, arguments.runtimes.split(","), arguments.precisions.split(",")
    )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for step in arguments.steps.split(","):
        action = {"networks": "compile_networks"}.get(step, step)
        for space in arguments.spaces.split(","):
            for device in machines:
                classes = 10 if space == "fbnet_cifar" else 1000
                case = Case(arguments.folder, SearchSpace.load(space), device, classes)
                started = time.monotonic()
                try:
                    getattr(case, action)()
                except InputError as error:
                    print(f"{step} {case.table.name}: {error}")
                seconds = time.monotonic() - started
                print(f"{step} {case.table.name}: {seconds:.1f} s", flush=True)
                write_down(arguments.folder / "seconds.csv", step, case.table.name, seconds)


if __name__ == "__main__":
    main()
