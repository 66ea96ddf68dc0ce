"""fbnas doctor: what is installed and what works here, or on a device."""

import importlib.metadata
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbnas import __version__
from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import device_of
from fbnas.errors import InputError
from fbnas.latency.converting import lacking, needed
from fbnas.latency.devices import Device
from fbnas.latency.runtimes import RUNTIMES, runtime
from fbnas.shipped import configs_folder

PACKAGES = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "ai-edge-litert",
    "executorch",
    "torchao",
    "torch-pruning",
    "hydra-core",
    "datasets",
    "kornia",
    "scikit-learn",
    "plotly",
    "safetensors",
    "tensorboard",
)


def main(config: dict[str, Any]) -> int:
    device = device_of(config)
    out = OutFolder(config)
    print(f"fbnas {__version__}, python {platform.python_version()}, {platform.platform()}")
    print(f"configs: {configs_folder()}")
    facts = Device().fingerprint()
    print(f"cpu: {facts['cpu']}, {facts['cores']} cores")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"gpus that torch can use: {', '.join(gpus) or 'none'}")
    ssh = {name: shutil.which(name) for name in ("ssh", "scp")}
    lost = [name for name, path in ssh.items() if path is None]
    said = f"no {', '.join(lost)}: apt install openssh-client" if lost else "ssh and scp are here"
    print(f"device=ssh: {said}")
    versions = {name: _version(name) for name in PACKAGES}
    for name, version in versions.items():
        print(f"  {name:14} {version}")
    runtimes = {name: _runtime(name) for name in RUNTIMES}
    asked = {}
    if device != Device():
        asked = device.fingerprint()
        print(f"\ndevice {device.name}:")
        for key, value in asked.items():
            print(f"  {key:16} {value}")
    out.finish(packages=versions, runtimes=runtimes, gpus=gpus, device=asked or facts)
    broken = [p for found in runtimes.values() for p in found["precisions"].values() if not p[0]]
    return 1 if broken else 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _runtime(name: str) -> dict[str, Any]:
    """Print and return what a runtime can do here: version, providers, each precision tried."""
    module = runtime(name)
    if not module.available():
        print(f"runtime {name}: not installed: {module.INSTALL}")
        return {"version": None, "providers": [], "precisions": {}, "install": module.INSTALL}
    here = module.providers()
    print(f"runtime {name} {module.version()}")
    print(f"  providers here: {', '.join(here)}")
    absent = {p: way for p, way in module.PROVIDERS.items() if p not in here}
    for provider, way in absent.items():
        print(f"  no {provider}: {way}")
    precisions = {}
    for precision in module.PRECISIONS:
        packages = lacking(needed(module, precision))
        if packages:
            print(
                f"  {precision}: converting needs {', '.join(packages)}, here or in the python of "
                "device.converter"
            )
            continue
        provider = "compiled" if (name, precision) == ("pytorch", "int8") else ""
        precisions[precision] = _try(Device(runtime=name, precision=precision, provider=provider))
        print(f"  {precision}: {precisions[precision][1]}")
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
    return True, f"works (3x3 conv, 16 channels, 32x32: {timing.latency_ms:.3f} ms)"
