"""fbnas doctor: what is installed and what works here."""

import importlib.metadata
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbnas import __version__
from fbnas.commands.folder import OutFolder
from fbnas.latency.devices import Device
from fbnas.latency.runtimes import RUNTIMES, runtime
from fbnas.shipped import configs_folder

PACKAGES = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
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
    out = OutFolder(config)
    device = Device()
    print(f"fbnas {__version__}, python {platform.python_version()}, {platform.platform()}")
    print(f"configs: {configs_folder()}")
    facts = device.fingerprint()
    print(f"cpu: {facts['cpu']}, {facts['cores']} cores")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"gpus that torch can use: {', '.join(gpus) or 'none'}")
    versions = {name: _version(name) for name in PACKAGES}
    for name, version in versions.items():
        print(f"  {name:14} {version}")
    runtimes = {}
    for name in RUNTIMES:
        module = runtime(name)
        if not module.available():
            runtimes[name] = f"not installed: {module.INSTALL}"
            print(f"runtime {name}: {runtimes[name]}")
            continue
        for precision in module.PRECISIONS:
            runtimes[f"{name} {precision}"] = _try(Device(runtime=name, precision=precision))
            print(
                f"runtime {name} {module.version()}, {precision}: {runtimes[f'{name} {precision}']}"
            )
    out.finish(packages=versions, runtimes=runtimes, gpus=gpus, device=facts)
    return 0 if all("ms" in r or "not installed" in r for r in runtimes.values()) else 1


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _try(device: Device) -> str:
    """Compile, run and time one small convolution for real."""
    convolution = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        try:
            device.compile(convolution, (16, 32, 32), path)
            measurement = device.measure([path], rounds=5)
        except (RuntimeError, ValueError) as error:
            return f"does not work: {str(error).splitlines()[0]}"
    return f"works (3x3 conv, 16 channels, 32x32: {measurement.timings[0].latency_ms:.3f} ms)"
