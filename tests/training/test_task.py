"""A task of the user's own: its loss descends, its metric is reported, its last layers are used."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from fbnas.space import Architecture, SearchSpace, build_network
from fbnas.training import CLASSIFICATION, Task, TrainingSettings, evaluate, load_data, train

EXAMPLE = Path(__file__).parents[2] / "scripts" / "multi_label" / "example.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("multi_label_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_four_properties_of_digits_are_searched_and_learned(tmp_path: Path) -> None:
    right = example().main(tmp_path, epochs=8)
    assert right > 0.85  # always answering the more frequent half: 0.54


def test_properties_are_those_of_the_digit() -> None:
    module, digits = example(), load_data("digits").validation
    labels = module.with_properties(digits).labels
    seven = labels[digits.labels == 7]
    assert torch.equal(seven, torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand_as(seven))


class Dense(nn.Module):
    """Scores at every place of the features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.place = nn.Conv2d(channels, classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.place(features)


def test_last_layers_of_a_task_take_the_classifier_s_place() -> None:
    space = SearchSpace.load("quickstart")
    dense = Task(
        loss=lambda outputs, labels: nn.functional.cross_entropy(outputs.mean((2, 3)), labels),
        metric=lambda outputs, labels: outputs.mean((2, 3)).argmax(1) == labels,
        classifier=lambda space, classes: Dense(space.head, classes),
    )
    network = build_network(
        space, Architecture(("k3_e1",) * 7, space.name), 10, classifier=dense.classifier
    )
    side = space.final_size
    assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 10, side, side)
    data = load_data("digits", resize=True, space=space, limit=300)
    before, _ = evaluate(network, data.validation, mean=data.mean, std=data.std, task=dense)
    result = train(network, data, settings=TrainingSettings(epochs=6, ema=0.9), task=dense)
    after, accuracy = evaluate(
        result.network, data.validation, mean=data.mean, std=data.std, task=dense
    )
    assert after < before
    assert accuracy == result.validation_accuracy > 0.3


def test_classification_is_the_default_and_as_before() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    labels = torch.tensor([0, 0])
    expected = nn.functional.cross_entropy(scores, labels)
    assert torch.equal(CLASSIFICATION.loss(scores, labels), expected)
    assert CLASSIFICATION.metric(scores, labels).tolist() == [True, False]
