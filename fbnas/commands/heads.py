"""Several heads on one backbone: a further head is trained, and all are exported as one file."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fbnas.commands.folder import OutFolder
from fbnas.commands.parts import data_for, network_folder
from fbnas.compression import load_any
from fbnas.errors import InputError
from fbnas.export import export_onnx
from fbnas.export.heads import export_heads
from fbnas.latency.devices import ROUNDS, Device
from fbnas.space import NetworkCard
from fbnas.space.heads import FrozenBackbone, SeveralHeads, join_heads, renew_classifier_
from fbnas.space.network import Network
from fbnas.training.data import Data


def head_on(config: Mapping[str, Any]) -> tuple[FrozenBackbone, NetworkCard, Data]:
    """Return a trained backbone with a fresh head for the classes of `data=`.

    The images are normalised as the backbone knows them, not by their own mean and std.

    Raises:
        InputError: options that a head has no use for.
    """
    for key in ("architecture", "supernet", "teacher", "space"):
        if config.get(key):
            raise InputError(
                f"backbone={config['backbone']} says what the network is, and a head is trained "
                f"without a teacher; expected no {key} beside it."
            )
    network, card = load_any(network_folder(config["backbone"], "backbone"))
    data = replace(data_for(config, card.space), mean=card.mean, std=card.std)
    torch.manual_seed(config["seed"])
    renew_classifier_(network, data.classes)
    return FrozenBackbone(network), replace(card, class_names=data.class_names), data


def export_joined(config: dict[str, Any]) -> int:
    """Write the heads of `heads=` as one file, and time it against files of one head each."""
    precisions = config["precision"] or "fp32"
    if (config["format"], precisions) != ("onnx", "fp32"):
        raise InputError(
            f"heads=... with format={config['format']} and precision={precisions}; several heads "
            "are written as ONNX in fp32."
        )
    networks: dict[str, Network] = {}
    cards: dict[str, NetworkCard] = {}
    for name, folder in config["heads"].items():
        networks[name], cards[name] = load_any(network_folder(folder, f"heads.{name}"))
    joined = join_heads(networks)
    out = OutFolder(config)
    path = out.folder / "model.onnx"
    errors = export_heads(joined, path, cards, opset=config["opset"])
    for name, error in errors.items():
        classes = ", ".join(cards[name].class_names[:3])
        print(f"{path}: output {name} ({classes}, ...), parity with torch {error:.1e}")
    fields = _timed(config, path, joined, networks, cards) if config["measure"] else {}
    out.finish(
        format="onnx",
        precision="fp32",
        model=path.name,
        model_bytes=path.stat().st_size,
        parity_max_error=max(errors.values()),
        heads={name: list(card.class_names) for name, card in cards.items()},
        **fields,
    )
    return 0


def _timed(
    config: dict[str, Any],
    path: Path,
    joined: SeveralHeads,
    networks: Mapping[str, Network],
    cards: Mapping[str, NetworkCard],
) -> dict[str, Any]:
    """Time the file against one for each head, and say what sharing the backbone saves."""
    device = Device(threads=config["threads"], python=config["python"])
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        alone = [Path(folder) / f"{i}.onnx" for i in range(len(joined.names))]
        for name, file in zip(joined.names, alone, strict=True):
            export_onnx(networks[name], file, card=cards[name])
        measured = device.measure_quietly(
            [path, *alone],
            "Timing one file against several",
            rounds=config["rounds"] or ROUNDS,
            seed=config["seed"],
        )
    whole, *others = measured.whole
    separate_ms = sum(timing.latency_ms for timing in others)
    print(
        f"{whole.latency_ms:.4g} ms for {len(others)} heads, {separate_ms:.4g} ms for as many "
        f"networks (noise {100 * measured.noise_floor:.1f} %)"
    )
    return {
        "latency_ms": whole.as_dict(),
        "separate_latency_ms": separate_ms,
        "noise_floor": measured.noise_floor,
    }
