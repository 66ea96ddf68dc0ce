"""QAT against int8 without training, and teachers against none: a JSON line per result.

python scripts/qat/measure.py digits|FOLDER qat+prune+teach SEED...

FOLDER holds CIFAR-10's parquet files: 3,000 training images (2,400 of them to train on) and 2,000
test images are used, at 16x16.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fbnas.compression import QAT, ChannelPruning, Rounded, compress_, quantize_file
from fbnas.export import accuracy_of_file, export_int8_onnx, export_onnx
from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import Data, Subset, TrainingSettings, evaluate, load_data, train

TEST_IMAGES = 2000  # of CIFAR-10's 10,000
EPOCHS, TUNING_EPOCHS = 15, 6
LARGE, SMALL = ("k5_e6",) * 5, ("k3_e1",) * 5
FEATURES = {"feature_weight": 1.0}


class Study:
    """Data, the networks for it, and how they are trained."""

    def __init__(self, where: str) -> None:
        self.name = "digits" if where == "digits" else "cifar10"
        if where == "digits":
            self.blocks = ("k3_e3", "k5_e1_g2", "k3_e6", "k5_e3", "k3_e1_g2")
            self.space = space(8, 1, [(16, 1, 1), (32, 4, 2)], head=64)
            self.augment: dict[str, Any] = {}
            self.data = load_data("digits", space=self.space)
        else:
            self.blocks = ("k3_e1", "k3_e3", "k5_e3", "k3_e6", "k3_e3")
            self.space = space(16, 3, [(16, 1, 1), (24, 2, 2), (48, 2, 2)], head=192)
            self.augment = {"crop_padding": 2, "flip": True}
            options = {"path": where, "limit": 3000, "resize": True, "resolution": 16}
            self.data = some_test_images(load_data("huggingface", space=self.space, **options))
        self.shown = {"mean": self.data.mean, "std": self.data.std}

    def trained(self, seed: int, blocks: Sequence[str], teacher: Any = None, **how: Any) -> Any:
        torch.manual_seed(seed)
        network = build_network(self.space, Architecture(tuple(blocks), "study"), classes=10)
        settings = TrainingSettings(epochs=EPOCHS, augment=self.augment, distillation=how)
        return train(network, self.data, settings=settings, seed=seed, teacher=teacher).network

    def tuning(
        self, seed: int, lr: float, teacher: Any = None, **how: Any
    ) -> Callable[[nn.Module], Any]:
        settings = TrainingSettings(
            epochs=TUNING_EPOCHS, lr=lr, augment=self.augment, distillation=how
        )
        return lambda n: train(n, self.data, settings=settings, seed=seed, teacher=teacher)

    def say(self, judged: nn.Module | Path, **row: Any) -> None:
        found = [
            accuracy_of_file(judged, images, **self.shown)
            if isinstance(judged, Path)
            else evaluate(judged, images, **self.shown)[1]
            for images in (self.data.validation, self.data.test)
        ]
        accuracies = dict(zip(("validation", "test"), found, strict=True))
        print(json.dumps({"data": self.name, **row, **accuracies}), flush=True)


def space(resolution: int, channels: int, stages: list[Any], *, head: int) -> SearchSpace:
    return SearchSpace.from_dict(
        {
            "name": "study",
            "resolution": resolution,
            "input_channels": channels,
            "stem": {"channels": 16, "stride": 1},
            "stages": [{"channels": c, "layers": n, "stride": s} for c, n, s in stages],
            "head": head,
        }
    )


def some_test_images(data: Data) -> Data:
    return replace(data, load_test=lambda: Subset(data.test, torch.arange(TEST_IMAGES)))


def qat(study: Study, seed: int) -> None:
    """ONNX Runtime's int8, ours without training, and trained, at 8 and at 4 bits of weights."""
    network = study.trained(seed, study.blocks)
    study.say(network, seed=seed, what="fp32")
    longer = copy.deepcopy(network)
    study.tuning(seed, lr=0.01)(longer)  # what QAT's epochs do to a network without roundings
    study.say(longer, seed=seed, what="fp32, as long as qat")
    with tempfile.TemporaryDirectory() as place:
        file, source = Path(place) / "int8.onnx", Path(place) / "fp32.onnx"
        export_onnx(network, source)
        quantize_file(source, file, study.data, seed=seed)
        study.say(file, seed=seed, what="onnxruntime's int8")
        for bits in (8, 4):
            for what, tune in (("ptq", lambda n: None), ("qat", study.tuning(seed, lr=0.01))):
                rounded = copy.deepcopy(network)
                report = compress_(
                    rounded, QAT(weight_bits=bits), train=tune, data=study.data, seed=seed
                )
                (found,) = report.changes
                assert isinstance(found, Rounded)
                export_int8_onnx(rounded, found.form, file)
                kept = {"kept": found.form.method} if what == "qat" else {}
                study.say(file, seed=seed, what=what, bits=bits, **kept)


def prune(study: Study, seed: int) -> None:
    """Fine-tuning after half of the channels are gone, alone and by the network before."""
    network = study.trained(seed, study.blocks)
    for alpha in (None, 0.5, 0.9):
        pruned = copy.deepcopy(network)
        how = {} if alpha is None else {"teacher": network, "alpha": alpha}
        tune = study.tuning(seed, lr=0.02, **how)
        compress_(pruned, ChannelPruning(ratio=0.5, round_to=4), train=tune)
        study.say(pruned, seed=seed, what="pruned", alpha=alpha)


def teach(study: Study, seed: int) -> None:
    """A small network alone, and taught by a large one."""
    teacher = study.trained(seed + 100, LARGE)
    study.say(teacher, seed=seed, what="teacher")
    lessons: list[tuple[str, dict[str, Any]]] = [
        ("alone", {}),
        ("soft labels", {"teacher": teacher}),
        ("and features", {"teacher": teacher, **FEATURES}),
    ]
    for what, how in lessons:
        study.say(study.trained(seed, SMALL, **how), seed=seed, what=what)


PARTS = {"qat": qat, "prune": prune, "teach": teach}


def main(where: str, parts: str, *seeds: str) -> None:
    torch.set_num_threads(1)
    study = Study(where)
    for part in parts.split("+"):
        for seed in seeds:
            PARTS[part](study, int(seed))


if __name__ == "__main__":
    main(*sys.argv[1:])
