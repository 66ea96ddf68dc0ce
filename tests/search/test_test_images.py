"""No search, training choice, calibration or stage decision ever looks at the test images."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from search_run import SPACE, run, small_digits

from fbnas.commands import stages
from fbnas.compression import quantize_file
from fbnas.export import export_onnx
from fbnas.latency.devices import Device, Measurement
from fbnas.latency.timing import Timing
from fbnas.search import rank_by_shared_weights
from fbnas.space import Architecture, NetworkCard, build_network, save_network
from fbnas.training import loop as training_loop
from fbnas.training.data import Data, Images
from fbnas.training.settings import TrainingSettings

CHOICE = Architecture(("k3_e1", "k3_e3", "skip"), "tiny")
CONFIG = {
    "seed": 0,
    "max_accuracy_drop": 1.0,
    "compression": {"methods": ["channel_pruning", "int8"], "pruning": {}, "quantization": {}},
}


def card(data: Data) -> NetworkCard:
    return NetworkCard(SPACE, CHOICE, data.class_names, data.mean, data.std)


def network() -> Any:
    torch.manual_seed(0)
    return build_network(SPACE, CHOICE, classes=10).eval()


@dataclass(frozen=True)
class Stopwatch(Device):
    """A device that says how many times as long the files after the first take."""

    ratio: float = 1.0

    def measure_quietly(self, files: Sequence[Path], _: str, **__: Any) -> Measurement:
        times = [1.0, *[self.ratio] * (len(files) - 1)]
        timings = tuple(Timing(t, t, t, 10) for t in times)
        return Measurement(timings, 0.05, np.array([times] * 10))


def test_the_data_of_these_tests_springs_when_the_test_images_are_asked_for() -> None:
    with pytest.raises(AssertionError, match="the test images were loaded"):
        _ = small_digits().test


def test_search_and_ranking(tmp_path: Path) -> None:
    data = small_digits()
    result = run(tmp_path, data=data)
    rank_by_shared_weights(result.supernet, [CHOICE], data)


def test_training_augments_no_validation_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmented: list[int] = []

    def note(images: torch.Tensor) -> torch.Tensor:
        augmented.append(len(images))
        return images

    monkeypatch.setattr(training_loop, "build_augmentation", lambda **_: note)
    data = small_digits()
    settings = TrainingSettings(epochs=2, batch_size=32, device="cpu")
    trained = training_loop.train(network(), data, settings=settings, out=tmp_path)
    assert augmented == [32] * (2 * (len(data.train) // 32))  # validated twice, never through it
    assert len(trained.history) == 2


def test_calibration_of_the_quantized_file(tmp_path: Path) -> None:
    data = small_digits()
    export_onnx(network(), tmp_path / "fp32.onnx", card=card(data))
    report = quantize_file(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", data)
    assert report.calibration_images == len(data.train)


@pytest.mark.parametrize(
    ("ratio", "accuracy", "allowed", "accepted"),
    [
        (0.5, 0.90, 0.01, True),
        (1.04, 0.90, 0.01, True),  # slower, but within the noise
        (1.06, 0.90, 0.01, False),
        (0.5, 0.885, 0.01, False),
        (0.5, 0.885, 0.02, True),
    ],
)
def test_the_judge(
    tmp_path: Path, ratio: float, accuracy: float, allowed: float, accepted: bool
) -> None:
    config = {**CONFIG, "max_accuracy_drop": allowed}
    judge = stages.Judge(config, tmp_path, small_digits(), Stopwatch(ratio=ratio))
    fp32 = stages.Stage("fp32", tmp_path / "a.onnx", "train", 1, 1, 0.90)
    pruned = stages.Stage("pruned", tmp_path / "b.onnx", "pruned", 1, 1, accuracy)
    judge.decide(pruned, best=fp32, trained=fp32)
    assert pruned.accepted is accepted
    assert pruned.reason.startswith("accepted" if accepted else "rejected")
    again = stages.Stage("pruned", tmp_path / "b.onnx", "pruned", 1, 1, accuracy)
    other_day = replace(judge, device=Stopwatch(ratio=9.0))
    other_day.decide(again, best=fp32, trained=fp32)  # a resumed run decides as it did before
    assert (again.accepted, again.reason) == (pruned.accepted, pruned.reason)


def test_stages_look_once_all_is_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[list[str]] = []

    def load_test() -> Images:
        looks.append(sorted(path.name for path in tmp_path.glob("models/*.decision.json")))
        return data.validation

    data = replace(small_digits(), load_test=load_test)
    save_network(tmp_path / "train", network(), card(data))

    def no_pruning(*_: Any, **__: Any) -> SimpleNamespace:
        shutil.copytree(tmp_path / "train", tmp_path / "pruned")
        return SimpleNamespace(after=SimpleNamespace(dense_bytes=1000, stored_bytes=1000))

    monkeypatch.setattr(stages, "compress_and_save", no_pruning)
    device = Stopwatch(ratio=0.9)
    made = stages.stages_of(CONFIG, tmp_path, data, device, resume=False)
    assert [stage.name for stage in made] == ["fp32", "pruned", "int8"]
    assert looks == [["int8.decision.json", "pruned.decision.json"]]
