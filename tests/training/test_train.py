"""What training learns, keeps, writes and refuses."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fbnas.errors import InputError
from fbnas.files import load_checkpoint, read_jsonl
from fbnas.training import (
    Data,
    TensorImages,
    TrainingDiverged,
    TrainingSettings,
    batches,
    evaluate,
    load_data,
    recalibrate_bn,
    train,
)
from fbnas.training.loop import _optimizer
from fbnas.training.state import Average

SETTINGS = TrainingSettings(epochs=3, batch_size=32, ema=0.9, device="cpu")
ROW = {"epoch", "loss", "accuracy", "validation_loss", "validation_accuracy", "lr", "seconds"} | {
    "data_wait_seconds"
}


def no_test_images() -> TensorImages:
    raise AssertionError("training read the test images")


@pytest.fixture(scope="module")
def digits() -> Data:
    return replace(load_data(limit=400), load_test=no_test_images)


def small_network(classes: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def preprocessing(data: Data) -> dict:
    return {"mean": data.mean, "std": data.std}


def test_training_learns_and_never_reads_the_test_images(digits: Data) -> None:
    network = small_network()
    before = evaluate(network, digits.validation, **preprocessing(digits))
    result = train(network, digits, settings=replace(SETTINGS, epochs=6))
    loss, accuracy = evaluate(network, digits.validation, **preprocessing(digits))
    assert result.network is network and not network.training
    assert before[1] < 0.3 and accuracy > 0.85
    assert loss < before[0]
    assert accuracy == pytest.approx(result.validation_accuracy)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(digits: Data) -> None:
    settings = replace(SETTINGS, epochs=1, augment={"crop_padding": 1})
    losses = [
        train(small_network(), digits, settings=settings, seed=seed).history[0]["loss"]
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_files_and_callback(digits: Data, tmp_path: Path) -> None:
    rows: list[dict] = []
    result = train(small_network(), digits, settings=SETTINGS, out=tmp_path, on_epoch=rows.append)
    assert rows == result.history == read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(row.keys() == ROW for row in rows)
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert load_checkpoint(tmp_path / "checkpoint.pt")["position"] == [3, 0]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_best_epoch_by_validation_is_kept(
    digits: Data, ema: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.2, 0.7, 0.7, 0.1])
    seen: list[dict] = []

    def judged(network: nn.Module, *_: object, **__: object) -> tuple[float, float]:
        seen.append({k: v.clone() for k, v in network.state_dict().items()})
        return 1.0, next(accuracies)

    monkeypatch.setattr("fbnas.training.loop.evaluate", judged)
    network = small_network()
    result = train(network, digits, settings=replace(SETTINGS, epochs=4, ema=ema))
    assert (result.best_epoch, result.validation_accuracy) == (1, 0.7)
    for name, value in network.state_dict().items():
        assert torch.equal(value, seen[1][name])
    assert not torch.equal(seen[1]["0.weight"], seen[2]["0.weight"])


def test_the_learning_rate_follows_the_epochs_asked_for(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Callable | None = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr("fbnas.training.loop.torch.optim.SGD", Spy)
    for epochs in (1, 4):
        rates.clear()
        train(small_network(), digits, settings=replace(SETTINGS, epochs=epochs))
        assert len(rates) == epochs * (len(digits.train) // 32)
        assert max(rates) == pytest.approx(0.1)
        assert rates[0] < 0.05 and rates[-1] < 0.03


def test_biases_and_bn_do_not_decay() -> None:
    network = small_network()
    decay, free = _optimizer(network, SETTINGS).param_groups
    assert decay["weight_decay"] == 4e-5 and free["weight_decay"] == 0
    assert {tuple(p.shape) for p in decay["params"]} == {(16, 1, 3, 3), (32, 16, 3, 3), (10, 128)}
    assert len(decay["params"]) + len(free["params"]) == len(list(network.parameters()))


def test_moving_average_by_its_formula() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    average = Average(network, decay=0.15)
    expected = 2.0
    for step, weight in enumerate((5.0, -1.0, 7.0)):
        nn.init.constant_(network.weight, weight)
        average.update()
        keep = min(0.15, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weight
    assert average.network.weight.item() == pytest.approx(expected)
    assert Average(network, decay=0.0).network is network


def test_recalibrated_statistics_equal_those_of_all_the_images() -> None:
    torch.manual_seed(0)
    images = TensorImages(
        torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.zeros(64).long()
    )
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)).eval()
    network[0].running_mean.fill_(100.0)
    recalibrate_bn(network, network, batches(images, 16, mean=(0.0,), std=(1.0,)))
    values = images.pixels.float() / 255
    assert network[0].running_mean.item() == pytest.approx(values.mean().item(), rel=1e-5)
    assert network[0].running_var.item() == pytest.approx(values.var().item(), rel=0.01)
    assert network[0].momentum == 0.1 and not network.training


def test_evaluate_counts_by_hand_and_puts_the_mode_back() -> None:
    pixels = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).view(4, 1, 1, 1)
    images = TensorImages(pixels, torch.tensor([0, 1, 0, 0]))
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).train()
    network[1].weight.data = torch.tensor([[0.0], [2.0]])
    network[1].bias.data = torch.tensor([1.0, 0.0])  # black: class 0 by 1; white: class 1 by 1
    loss, accuracy = evaluate(network, images, mean=(0.0,), std=(1.0,), batch_size=3)
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert accuracy == 0.75
    assert loss == pytest.approx((3 * right + wrong) / 4)
    assert network.training


def test_bf16_trains(digits: Data) -> None:
    result = train(small_network(), digits, settings=replace(SETTINGS, precision="bf16"))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert next(result.network.parameters()).dtype == torch.float32


class Explodes(nn.Module):
    """Divides by zero once it has been through `steps` batches of training."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.body = small_network()
        self.left = steps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.left -= 1
        return self.body(images) / (0.0 if self.left < 0 else 1.0)


def test_nan_loss_stops_with_the_epoch_and_keeps_the_checkpoint(
    digits: Data, tmp_path: Path
) -> None:
    steps = len(digits.train) // 32
    recalibration = steps  # 512 images are asked for, there are fewer
    network = Explodes(steps + recalibration + 2)
    with pytest.raises(TrainingDiverged, match=r"not a finite number in epoch 2.*lower") as caught:
        train(network, digits, settings=replace(SETTINGS, ema=0.0), out=tmp_path)
    assert "\n" not in str(caught.value)
    stored = load_checkpoint(tmp_path / "checkpoint.pt")
    assert stored["position"] == [1, 0]
    assert all(value.isfinite().all() for value in stored["network"].values())


def test_a_full_disk_leaves_the_previous_checkpoint(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_network(), digits, settings=replace(SETTINGS, epochs=1), out=tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    settings = replace(SETTINGS, epochs=2)

    def full(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    rows: list[dict] = []

    def fill_the_disk(row: dict) -> None:
        rows.append((tmp_path / "checkpoint.pt").read_bytes())
        monkeypatch.setattr(torch, "save", full)

    with pytest.raises(OSError, match="No space left"):
        train(small_network(), digits, settings=settings, out=tmp_path, on_epoch=fill_the_disk)
    assert len(rows) == 1 and rows[0] != before
    assert (tmp_path / "checkpoint.pt").read_bytes() == rows[0]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["position"] == [1, 0]


def test_a_new_run_removes_the_checkpoint_of_an_older_one(digits: Data, tmp_path: Path) -> None:
    train(small_network(), digits, settings=replace(SETTINGS, epochs=1), out=tmp_path)
    with pytest.raises(TrainingDiverged):
        train(Explodes(0), digits, settings=SETTINGS, out=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": replace(SETTINGS, epochs=5)}, r"made with epochs=3, now epochs=5.*overwrite"),
        ({"seed": 4}, "made with seed=0, now seed=4"),
        ({"network": small_network(classes=11)}, "holds the weights of another network"),
    ],
)
def test_resume_refuses_another_run(
    digits: Data, tmp_path: Path, changes: dict, words: str
) -> None:
    train(small_network(), digits, settings=SETTINGS, out=tmp_path)
    options = {"network": small_network(), "settings": SETTINGS, **changes}
    with pytest.raises(InputError, match=words) as caught:
        train(data=digits, out=tmp_path, resume=True, **options)
    assert "\n" not in str(caught.value)


def test_resume_refuses_a_damaged_checkpoint_and_a_missing_folder(
    digits: Data, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK half a file")
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        train(small_network(), digits, settings=SETTINGS, out=tmp_path, resume=True)
    with pytest.raises(InputError, match="expected out=DIR"):
        train(small_network(), digits, settings=SETTINGS, resume=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3}, "Unknown training setting 'epoch'. Did you mean 'epochs'"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"lr": -1}, "lr is -1; expected more than 0"),
        ({"batch_size": 1}, "batch_size is 1; expected at least 2"),
        ({"ema": 1.0}, "ema is 1.0; expected"),
        ({"precision": "fp16"}, "precision is fp16; expected fp32 or bf16"),
    ],
)
def test_wrong_settings_are_refused(content: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainingSettings.from_dict(content)


def test_wrong_device_is_refused(digits: Data) -> None:
    with pytest.raises(InputError, match="device gpu cannot be used .*expected auto, cpu"):
        train(small_network(), digits, settings=replace(SETTINGS, device="gpu"))


def test_judging_leaves_frozen_layers_frozen(digits: Data) -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).train()
    network[1].eval()
    evaluate(network, digits.validation, mean=digits.mean, std=digits.std)
    assert [module.training for module in network] == [True, False, True]
    with pytest.raises(RuntimeError):
        evaluate(nn.Sequential(*network, nn.Linear(3, 1)), digits.validation, mean=(0,), std=(1,))
    assert [module.training for module in network] == [True, False, True]
