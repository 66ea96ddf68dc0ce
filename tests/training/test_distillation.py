"""Distillation: its losses are the formulas, teachers are shown the same and stay as they are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fbnas.errors import InputError
from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import (
    Data,
    Distillation,
    Ensemble,
    Task,
    TensorImages,
    TrainingSettings,
    evaluate,
    load_data,
    train,
)
from fbnas.training.distillation import Teaching, feature_loss, probabilities, soft_label_loss

SETTINGS = TrainingSettings(epochs=3, batch_size=32, ema=0.9, device="cpu")
IMAGE = torch.zeros(1, 1, 8, 8)


def network(width: int = 8, classes: int = 10) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(limit=400)


@pytest.fixture(scope="module")
def teacher(digits: Data) -> nn.Module:
    return train(network(24), digits, settings=replace(SETTINGS, epochs=8)).network


def softmax(scores: np.ndarray) -> np.ndarray:
    exponents = np.exp(scores - scores.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def test_the_loss_of_soft_labels_is_that_of_the_paper() -> None:
    ours, theirs = np.random.default_rng(0).normal(size=(2, 5, 7)) * 3
    p, q = softmax(theirs / 3), softmax(ours / 3)
    expected = 9 * (p * np.log(p / q)).sum(1).mean()
    soft = (torch.from_numpy(theirs) / 3).softmax(1)
    assert soft_label_loss(torch.from_numpy(ours), soft, 3.0).item() == pytest.approx(expected)


def test_with_heads_each_is_a_distribution_of_its_own() -> None:
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (torch.randn(5, 7, generator=generator) for _ in range(2))
    heads = [slice(0, 4), slice(4, 7)]
    soft = probabilities(nn.Identity(), theirs, 3.0, heads)
    both = Ensemble([nn.Identity(), nn.Identity()]).probabilities(theirs, 3.0, heads)
    torch.testing.assert_close(both, soft)
    expected = np.mean(
        [
            float(soft_label_loss(ours[:, rows], (theirs[:, rows] / 3).softmax(1), 3.0))
            for rows in heads
        ]
    )
    assert float(soft_label_loss(ours, soft, 3.0, heads)) == pytest.approx(expected, rel=1e-5)
    assert soft[:, :4].sum(1).numpy() == pytest.approx(1, abs=1e-6)


def test_at_high_temperatures_scores_are_matched() -> None:
    """Hinton et al., equation 4: the gradient is (z - v) / N, of scores whose means are 0."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 1, 6, generator=generator, dtype=torch.double)
    ours, theirs = (x - x.mean() for x in (ours, theirs))
    ours.requires_grad_()
    soft_label_loss(ours, (theirs / 1e3).softmax(1), 1e3).backward()
    assert ours.grad is not None
    assert torch.allclose(ours.grad, (ours - theirs).detach() / 6, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_whole_loss_is_its_formula(alpha: float) -> None:
    how = Distillation(alpha=alpha, temperature=2.0, feature_weight=0.7, layers=["2", "5:5"])
    student, teacher = network(8), network(16)
    teaching = Teaching(teacher, student, how, IMAGE, 10)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    student.eval(), teacher.eval()
    with teaching.listening():
        scores = student(images)
        found = teaching.loss(torch.tensor(1.5), scores, images)
    features = [
        ((teacher[: i + 1](images) - regress(student[: i + 1](images))) ** 2).mean() / 2
        for i, regress in zip((2, 5), teaching.regressors, strict=True)
    ]
    p, q = (teacher(images) / 2).softmax(1), (scores / 2).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    expected = (1 - alpha) * 1.5 + alpha * 4 * kl + 0.7 * sum(features) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_maps_of_other_sizes_are_averaged_to_the_smaller() -> None:
    ours, theirs = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)
    means = torch.tensor([2.5, 4.5, 10.5, 12.5])
    assert feature_loss(ours, theirs).item() == pytest.approx(((means**2).mean() / 2).item())
    assert feature_loss(theirs, ours) == feature_loss(ours, theirs)


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    members = [network(width).eval() for width in (4, 8)]
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 4.0):
        expected = sum((m(images) / temperature).softmax(1) for m in members) / 2
        found = probabilities(Ensemble(members), images, temperature)
        assert torch.allclose(found, expected)
    scores = Ensemble(members).eval()(images)
    assert torch.allclose(scores.softmax(1), probabilities(Ensemble(members), images), atol=1e-6)


def test_the_last_map_before_the_classifier_is_matched_by_default() -> None:
    space = SearchSpace.from_dict(
        {
            "name": "tiny",
            "resolution": 8,
            "input_channels": 1,
            "stem": {"channels": 8, "stride": 1},
            "stages": [{"channels": 8, "layers": 1, "stride": 2}],
            "head": 16,
        }
    )
    fbnet = build_network(space, Architecture(("k3_e1",), "tiny"), classes=10)
    teaching = Teaching(network(), fbnet, Distillation(feature_weight=1.0), IMAGE, 10)
    assert [(ours, theirs) for ours, _, theirs, _ in teaching.pairs] == [("head", "5")]
    assert isinstance(teaching.regressors[0], nn.Identity)  # of one width: compared as they are


def test_a_network_learns_from_a_teacher_alone(digits: Data, teacher: nn.Module) -> None:
    """With alpha = 1 labels say nothing: wrong ones end at the same weights, which are good."""
    settings = replace(SETTINGS, epochs=8, distillation={"alpha": 1.0, "temperature": 2.0})
    images = digits.train
    assert isinstance(images, TensorImages)
    wrong = replace(digits, train=replace(images, labels=(images.labels + 1) % 10))
    students = [network(16), network(16)]
    for student, data in zip(students, (digits, wrong), strict=True):
        train(student, data, settings=settings, teacher=teacher)
    for ours, theirs in zip(*(s.state_dict().values() for s in students), strict=True):
        assert torch.equal(ours, theirs)
    prepared = {"mean": digits.mean, "std": digits.std}
    assert evaluate(students[0], digits.validation, **prepared)[1] > 0.6


def test_a_teacher_of_no_weight_changes_nothing(digits: Data, teacher: nn.Module) -> None:
    alone = train(network(), digits, settings=SETTINGS)
    settings = replace(SETTINGS, distillation={"alpha": 0.0})
    beside = train(network(), digits, settings=settings, teacher=teacher)
    assert [r["loss"] for r in alone.history] == [r["loss"] for r in beside.history]


class Spy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        SEEN.append((self.training, torch.is_grad_enabled(), images.clone()))
        return self.inner(images)


SEEN: list[tuple[bool, bool, Tensor]] = []


def test_both_see_the_same_augmented_images_and_the_teacher_stays(digits: Data) -> None:
    spy, student, shown = Spy().train(), network(), list[Tensor]()
    before = {name: value.clone() for name, value in spy.state_dict().items()}
    SEEN.clear()
    student.register_forward_hook(
        lambda module, args, _: shown.append(args[0].clone()) if module.training else None
    )
    settings = replace(
        SETTINGS, epochs=1, ema=0.0, augment={"crop_padding": 2}, distillation={"alpha": 0.5}
    )
    train(student, digits, settings=settings, teacher=spy)
    taught = [images for _, _, images in SEEN if len(images) > 1]
    assert not any(training or gradients for training, gradients, _ in SEEN)
    assert len(taught) == len(digits.train) // 32
    for theirs, ours in zip(taught, shown, strict=False):
        assert torch.equal(theirs, ours)
    assert spy.training
    assert all(torch.equal(before[name], value) for name, value in spy.state_dict().items())


def test_regressors_are_trained_and_leave_nothing(
    digits: Data, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Teaching] = []

    class Kept(Teaching):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)
            self.before = self.regressors[0].weight.detach().clone()

    monkeypatch.setattr("fbnas.training.loop.Teaching", Kept)
    settings = replace(SETTINGS, distillation={"feature_weight": 1.0})
    student = network()
    names = list(student.state_dict())
    train(student, digits, settings=settings, teacher=teacher)
    assert list(student.state_dict()) == names
    assert not any(module._forward_hooks for module in student.modules())
    assert made[0].before.shape == (48, 16, 1, 1)
    assert not torch.equal(made[0].before, made[0].regressors[0].weight)


class Stopped(Exception):  # noqa: N818 - it says what happened
    pass


@pytest.fixture
def interrupted(digits: Data, teacher: nn.Module, tmp_path: Path) -> Path:
    """A training with a teacher that ends after the checkpoint of its first epoch."""

    def stop(_: dict[str, Any]) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train(
            network(), digits, settings=TAUGHT, out=tmp_path / "r", on_epoch=stop, teacher=teacher
        )
    return tmp_path / "r"


TAUGHT = replace(SETTINGS, augment={"flip": True}, distillation={"feature_weight": 0.5})


def test_a_resumed_training_ends_at_the_same_numbers(
    digits: Data, teacher: nn.Module, interrupted: Path
) -> None:
    whole = train(network(), digits, settings=TAUGHT, teacher=teacher)
    resumed = train(
        network(), digits, settings=TAUGHT, teacher=teacher, out=interrupted, resume=True
    )
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name


@pytest.mark.parametrize("change", ["settings", "teacher", "none"])
def test_resuming_with_another_lesson_is_refused(
    digits: Data, teacher: nn.Module, interrupted: Path, change: str
) -> None:
    settings = replace(TAUGHT, distillation={"alpha": 0.7}) if change == "settings" else TAUGHT
    other = {"settings": teacher, "teacher": network(12), "none": None}[change]
    with pytest.raises(InputError, match="made with distillation="):
        train(network(), digits, settings=settings, teacher=other, out=interrupted, resume=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, "distillation.alpha is 1.5; expected from 0"),
        ({"temperature": 0.0}, "distillation.temperature is 0.0; expected more than 0"),
        ({"feature_weight": -1.0}, "feature_weight is -1.0; expected 0 "),
        ({"layers": ["5"]}, "a weight of more than 0 for them"),
        ({"temprature": 2.0}, "Did you mean 'temperature'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TrainingSettings(distillation=options)


FEATURES = {"feature_weight": 1.0}


@pytest.mark.parametrize(
    ("make", "distillation", "words"),
    [
        (lambda: network(8, classes=7), {}, r"scores of shape \(7,\), the data has 10 classes"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), {}, "cannot take images of"),
        (lambda: Ensemble([network()]), FEATURES, "an ensemble.*expected one network"),
        (network, {**FEATURES, "layers": ["9"]}, "Unknown layer with a feature map: '9'"),
        (network, {**FEATURES, "layers": ["2:8"]}, "Unknown layer with a feature map: '8'"),
    ],
    ids=["classes", "images", "ensemble", "layer", "its layer"],
)
def test_teachers_that_do_not_fit_are_refused(
    digits: Data, make: Callable[[], nn.Module], distillation: dict[str, Any], words: str
) -> None:
    settings = replace(SETTINGS, distillation=distillation)
    with pytest.raises(InputError, match=words):
        train(network(), digits, settings=settings, teacher=make())


def test_other_tasks_have_no_soft_labels(digits: Data) -> None:
    task = Task(loss=lambda scores, labels: scores.mean())
    with pytest.raises(InputError, match="another than classification; expected no teacher"):
        train(network(), digits, settings=SETTINGS, task=task, teacher=network())


def test_an_ensemble_of_nobody_is_refused() -> None:
    with pytest.raises(InputError, match="no networks; expected at least one"):
        Ensemble([])
