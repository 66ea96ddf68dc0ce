"""Pruning by steps: never below the floor, the last good step restored, the rest undone."""

import copy

import pytest
import torch
from digits_network import Trained, accuracy, fit
from random_images import random_images
from torch import nn

from fbnas.compression import IterativePruning, PruningStep, compress_
from fbnas.compression.pruning import become_
from fbnas.errors import InputError
from fbnas.space import count

SHAPE = (3, 8, 8)


def plain(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, groups=width),
        nn.Conv2d(width, 2 * width, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    ).eval()


def widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


class Judged:
    """Accuracies told one after the other, whatever the network; and what was trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, accuracies: list[float]) -> None:
        self.tuned: list[nn.Module] = []
        answers = iter([accuracies[0], *accuracies])  # compress_ judges before the method does
        last = accuracies[-1]
        monkeypatch.setattr(
            "fbnas.compression.method.Tools.accuracy", lambda tools, model: next(answers, last)
        )

    def train(self, model: nn.Module) -> int:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * (len(self.tuned) + 1))
        self.tuned.append(copy.deepcopy(model))
        return len(self.tuned)


METHOD = IterativePruning(
    step_ratio=0.25, max_accuracy_drop=0.1, steps=9, importance="magnitude", round_to=2
)


def test_the_last_good_step_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain()
    parts = list(model.modules())
    judged = Judged(monkeypatch, [0.9, 0.95, 0.81, 0.79, 0.99])
    data = random_images(3, 8)
    report = compress_(model, METHOD, input_shape=SHAPE, train=judged.train, data=data)
    steps: tuple[PruningStep, ...] = report.changes
    assert [step.kept for step in steps] == [True, True, False]
    assert [step.accuracy for step in steps] == [0.95, 0.81, 0.79]
    assert all(step.floor == pytest.approx(0.8) for step in steps)
    assert report.trained == 2
    good = judged.tuned[1]
    assert widths(model) == widths(good) != widths(judged.tuned[2])
    for name, value in good.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert list(model.modules()) == parts  # the same modules, changed
    x = torch.randn(2, *SHAPE)
    assert torch.equal(model(x), good.eval()(x))
    assert report.after.count == count(good, SHAPE)


def test_a_first_step_below_the_floor_leaves_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain()
    before = copy.deepcopy(model.state_dict())
    judged = Judged(monkeypatch, [0.9, 0.5])
    report = compress_(
        model, METHOD, input_shape=SHAPE, train=judged.train, data=random_images(3, 8)
    )
    assert [step.kept for step in report.changes] == [False]
    assert report.trained is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_steps_leave_a_share_of_the_channels_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(monkeypatch, [0.9])
    model = plain(64)
    compress_(model, METHOD, input_shape=SHAPE, train=judged.train, data=random_images(3, 8))
    for number, tuned in enumerate(judged.tuned, start=1):
        for found, full in zip(widths(tuned), [64, 64, 128], strict=True):
            assert abs(found - full * 0.75**number) <= 1.01
    assert len(judged.tuned) == 9
    assert widths(model) == widths(judged.tuned[-1])


def test_steps_that_rounding_leaves_empty_cost_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(monkeypatch, [0.9])
    model = plain(16)
    method = IterativePruning(step_ratio=0.1, steps=6, importance="magnitude", round_to=8)
    report = compress_(
        model, method, input_shape=SHAPE, train=judged.train, data=random_images(3, 8)
    )
    assert [step.number for step in report.changes] == [2, 3, 5]  # 32 to 24, 16 to 8, 24 to 16
    assert widths(model) == [8, 8, 16]
    assert len(judged.tuned) == 3


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_global_steps_take_their_share_of_all_channels(
    monkeypatch: pytest.MonkeyPatch, importance: str
) -> None:
    judged = Judged(monkeypatch, [0.9])
    model = plain(64)
    method = IterativePruning(
        step_ratio=0.2, steps=3, importance=importance, round_to=1, global_=True, images=64
    )
    compress_(model, method, input_shape=SHAPE, train=judged.train, data=random_images(3, 8))
    for number, tuned in enumerate(judged.tuned, start=1):
        assert sum(widths(tuned)[1:]) == pytest.approx(192 * 0.8**number, abs=2)


def test_on_digits_the_floor_holds_and_the_network_is_smaller(trained: Trained) -> None:
    model = copy.deepcopy(trained.network)
    method = IterativePruning(step_ratio=0.25, steps=3, max_accuracy_drop=0.02, round_to=4)
    report = compress_(
        model,
        method,
        input_shape=trained.card.input_shape,
        train=lambda pruned: fit(pruned, trained.data, epochs=4, rate=0.02),
        data=trained.data,
    )
    assert accuracy(model, trained.data) >= accuracy(trained.network, trained.data) - 0.02 - 1e-9
    assert report.after.macs < 0.75 * report.before.macs
    kept = [step for step in report.changes if step.kept]
    assert report.after.accuracy == pytest.approx(kept[-1].accuracy)


def test_a_network_becomes_its_changed_copy() -> None:
    model = plain()
    other = copy.deepcopy(model)
    other[0] = nn.Conv2d(3, 16, 5, padding=2)
    model[1].register_buffer("extra", torch.ones(1))
    become_(model, other)
    x = torch.randn(2, *SHAPE)
    assert torch.equal(model(x), other(x))
    assert model.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"step_ratio": 0.0}, r"step_ratio is 0\.0; expected a fraction, 0 < step_ratio < 1"),
        ({"max_accuracy_drop": -0.1}, r"max_accuracy_drop is -0\.1; expected a fraction"),
        ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ({"round_to": 0}, "round_to is 0; expected a whole number"),
        ({"importance": "tailor"}, "Did you mean 'taylor'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        IterativePruning(**settings)


def test_without_images_there_is_no_floor() -> None:
    with pytest.raises(InputError, match="compress_ got no data"):
        compress_(plain(), METHOD, input_shape=SHAPE)
